"""Every knob of the platform: one frozen dataclass per concern, and one per job that names the concerns the job reads.

The flags of a job are the fields below (`--sae.k 27`), and their help texts are these docstrings. A field marked
`OPERATIONAL` says how fast or where a stage runs, not what it computes: changing it does not make a finished stage foreign.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import tyro

from sarm.checks import OPERATIONAL as OPERATIONAL
from sarm.checks import UserError as UserError
from sarm.checks import check as _check
from sarm.checks import check_least as _check_least
from sarm.extraction_config import Extraction as Extraction
from sarm.reading_config import Contexts as Contexts
from sarm.reading_config import Pages as Pages
from sarm.results_root import absolute_out
from sarm.reward_config import Reward as Reward
from sarm.sae_config import AlsoSaes as AlsoSaes
from sarm.sae_config import Sae as Sae

# `run` and `out` are too common to be typed with a prefix: `--out`, `--seed`, `--dry-run`.
Flat = tyro.conf.arg(name="")


Job = TypeVar("Job")
ModelsLogged = Literal["reference", "copy", "none"]

StageName = Literal[
    "prepare_data",
    "extract_activations",
    "train_sae",
    "train_sarm",
    "evaluate",
    "collect_contexts",
    "feature_pages",
]
"""The stages of the chain by the names of their jobs, in order."""
STAGES: tuple[StageName, ...] = get_args(StageName)


def _check_place(out: Path) -> None:
    """Raise UserError for an output folder that the shell or a mistyped address made."""
    text = str(out)
    reason = ""
    if not out.name:
        reason = "it names no folder of its own"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        reason = "it is an address, and stages write files: mount the bucket and pass its path"
    elif "$" in text:
        reason = "it holds a variable that the shell did not fill in"
    elif any(ord(character) < 32 for character in text):
        reason = "it holds control characters"
    elif any(len(part.encode("utf-8", "replace")) > 200 for part in out.parts):
        reason = "a part of it is longer than 200 bytes"
    if reason:
        shown = repr(text if len(text) <= 60 else text[:60] + "...")
        raise UserError(f"the output folder {shown} cannot be used: {reason}. Pass --out FOLDER.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a job writes, what it logs to and which machines it may use."""

    out: Path = field(default=Path("outputs/run"), metadata=OPERATIONAL)
    """Folder of the run; every stage writes one folder inside it. In a submitted job a relative one stands under `$SARM_RESULTS` (default ~/sarm-outputs)."""
    seed: int = 0
    """Seed of every random choice: initialisation, shuffling, permutations."""
    mlflow_uri: str = field(default="", metadata=OPERATIONAL)
    """MLflow tracking URI (server, or absolute sqlite path). Empty: `MLFLOW_TRACKING_URI`, else sqlite beside `out`."""
    experiment: str = field(default="sarm", metadata=OPERATIONAL)
    """MLflow experiment."""
    mlflow_models: ModelsLogged = field(default="reference", metadata=OPERATIONAL)
    """How reward models are registered in MLflow: `reference` names the folder, which has to stay; `copy` copies it; `none` registers none."""
    ray_address: str = field(default="", metadata=OPERATIONAL)
    """Ray cluster to join (`auto`, `HOST:PORT`). Empty: the cluster of the submitted job, else a local one."""
    num_workers: int = field(default=1, metadata=OPERATIONAL)
    """Ray Train workers of the SAE and reward training; one GPU each where the cluster has GPUs."""
    num_actors: int = field(default=1, metadata=OPERATIONAL)
    """Ray Data actors of extraction and scoring; one GPU each where the cluster has GPUs."""
    max_restarts: int = field(default=3, metadata=OPERATIONAL)
    """Times in a row that workers are started again after one of them died, without a newer training state in between."""
    cpus_per_worker: int = field(default=0, metadata=OPERATIONAL)
    """CPU cores (and torch threads) of each worker and actor; 0 shares out the cluster's."""
    supervise: bool = field(default=False, metadata=OPERATIONAL)
    """Run the job in a process of its own that is started again when it dies, as often in a row as `max_restarts` says."""
    submit: str = field(default="", metadata=OPERATIONAL)
    """Dashboard of a Ray cluster (http://HOST:8265) to hand the job to, supervised; the same job is not started there twice."""
    config: str = field(default="", metadata=OPERATIONAL)
    """YAML or JSON file of settings, as `--dry-run --json` prints them. It goes over the preset, and flags go over it."""
    dry_run: bool = field(default=False, metadata=OPERATIONAL)
    """Print what the job would do and cost, then stop."""
    json: bool = field(default=False, metadata=OPERATIONAL)
    """With `--dry-run`: print the resolved settings as JSON instead, for `--config`."""
    debug: bool = field(default=False, metadata=OPERATIONAL)
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        _check_place(self.out)
        is_name = 0 < len(self.experiment) <= 100 and re.fullmatch(r"[A-Za-z0-9][\w .+()-]*", self.experiment, re.ASCII)
        _check(self, "experiment", bool(is_name), "1 to 100 letters, digits, spaces and ._+-()")
        # Ray Train changes the workers' directory, so a relative path would mean another folder there.
        object.__setattr__(self, "out", absolute_out(self.out))
        _check_least(self, "", num_workers=1, num_actors=1, cpus_per_worker=0, max_restarts=0)


@dataclass(frozen=True, kw_only=True)
class ChainRun(Run):
    """Where a job of the chain of stages writes, and which stages it runs."""

    only: bool = field(default=False, metadata=OPERATIONAL)
    """Run this job's own stage alone, on the finished folders that are there; without it the job first makes what is missing."""
    redo_from: StageName | None = field(default=None, metadata=OPERATIONAL)
    """Move the folders of this stage and of all later ones aside (to `OUT.aside/TIME`), then make them again."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The language model, where it is cut, and how messages become tokens."""

    name: str = "demo:smollm2"
    """Folder, Hugging Face id, `demo:smollm2` (SmolLM2-135M-Instruct from a package) or `tiny:llama` (random, for tests)."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face model; pin a commit for a run to be repeated."""
    gguf_file: str = ""
    """File inside `name` to load instead of safetensors."""
    layer: int = 15
    """Number of blocks to keep; activations are the residual stream after block `layer` (`hidden_states[layer]`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen backbone in extraction and scoring; training keeps fp32 master weights whatever this is."""
    max_length: int = 512
    """Tokens of a sequence at most; longer ones lose their beginning, never the rewarded final token."""
    system_prompt: str | None = None
    """System turn put before conversations that have none; unset leaves it to the model's chat template."""

    def __post_init__(self) -> None:
        _check(self, "model.name", bool(self.name), "a folder or a Hugging Face id")
        _check_least(self, "model.", layer=1, max_length=8)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Sources of text and of preferences, and how they are cleaned and split."""

    texts: tuple[str, ...] = ()
    """Text sources: files or globs (.jsonl, .jsonl.gz, .jsonl.zst, a .tar of these, .parquet), `hf:NAME[:SPLIT]`, `demo:openwebtext`, `demo:wikipedia`, `tiny:texts`."""
    pairs: tuple[str, ...] = ()
    """Preference sources: files or globs as above, `hf:NAME[:SPLIT]`, `demo:harm`, `tiny:pairs`."""
    text_field: str = "text"
    """Column that holds the text, or conversations as lists of messages."""
    max_texts: int | None = None
    """Keep at most this many texts of each source."""
    max_pairs: int | None = None
    """Keep at most this many pairs of each source."""
    max_pairs_per_prompt: int | None = 60
    """Keep at most this many pairs of one prompt (chosen by hash), so that no prompt outweighs the others."""
    heldout_share: float = 0.2
    """Share of prompts, by hash of the prompt, that are held out for evaluation."""

    def __post_init__(self) -> None:
        _check(self, "data.heldout_share", 0 < self.heldout_share < 1, "between 0 and 1")
        _check_least(self, "data.", max_texts=1, max_pairs=1, max_pairs_per_prompt=1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out measurement and attribution."""

    top_features: int = 20
    """Features with the largest and with the smallest mean contribution that are reported."""
    contexts_per_feature: int = 8
    """Strongest contexts kept for each feature."""

    def __post_init__(self) -> None:
        _check_least(self, "evaluation.", top_features=1, contexts_per_feature=1)


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Clean, de-duplicate and split the sources into corpus/v1 and pairs/v1."""

    stage: ClassVar[StageName] = "prepare_data"
    uses_cluster: ClassVar[bool] = False
    """Whether the job may need Ray; one that says nothing may."""
    run: Annotated[ChainRun, Flat] = ChainRun()
    data: Data = Data()


@dataclass(frozen=True, kw_only=True)
class ExtractActivations(PrepareData):
    """Write the residual stream at sentence ends and at the rewarded tokens as activations/v1."""

    stage: ClassVar[StageName] = "extract_activations"
    uses_cluster: ClassVar[bool] = True
    model: Model = Model()
    extraction: Extraction = Extraction()


@dataclass(frozen=True, kw_only=True)
class _TrainingSae(ExtractActivations):
    sae: Sae = Sae()


@dataclass(frozen=True, kw_only=True)
class TrainSae(_TrainingSae):
    """Train the TopK SAE on sentence ends, then on chat ends; several at once, if asked."""

    stage: ClassVar[StageName] = "train_sae"
    also: AlsoSaes = AlsoSaes()


@dataclass(frozen=True, kw_only=True)
class TrainSarm(_TrainingSae):
    """Train the SARM (and the scalar-head baseline) on the preference pairs."""

    stage: ClassVar[StageName] = "train_sarm"
    reward: Reward = Reward()


@dataclass(frozen=True, kw_only=True)
class Evaluate(TrainSarm):
    """Score held-out pairs, attribute rewards to features, write the report."""

    stage: ClassVar[StageName] = "evaluate"
    evaluation: Evaluation = Evaluation()


@dataclass(frozen=True, kw_only=True)
class CollectContexts(TrainSarm):
    """Collect the texts that make each latent of the trained reward model fire, and how often they do."""

    stage: ClassVar[StageName] = "collect_contexts"
    contexts: Contexts = Contexts()


@dataclass(frozen=True, kw_only=True)
class Pipeline(Evaluate):
    """Every stage, from sources to report and feature pages; also the whole of a preset."""

    stage: ClassVar[StageName] = "feature_pages"
    contexts: Contexts = Contexts()
    pages: Pages = Pages()

    def part(self, job: type[Job]) -> Job:
        """The same settings as the config of one job, e.g. `preset.part(TrainSae)`; what only that job has stays at its default."""
        own = {f.name for f in dataclasses.fields(self)}
        return job(**{f.name: getattr(self, f.name) for f in dataclasses.fields(job) if f.name in own})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FeaturePages(Pipeline):
    """Write pages that show each feature with its contexts, weight and scores."""


def identity(config: Any, *, seed: int | None = None) -> dict[str, Any]:
    """The fields of `config` that decide what is computed, as JSON values: two runs with equal identities give equal results."""
    fields = {
        f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if not f.metadata.get("operational")
    }
    return fields if seed is None else {**fields, "seed": seed}


def as_json(config: Any) -> str:
    """The whole resolved config, for `--dry-run`, manifests and MLflow."""
    return json.dumps(_plain(dataclasses.asdict(config)), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
