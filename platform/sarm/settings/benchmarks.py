"""The flags of `jobs/evaluate.py --model ...` and `jobs/compare.py`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from sarm.settings.chat_template import template_text
from sarm.settings.checks import ABSENT_AT_DEFAULT, OPERATIONAL, UserError, check_tokens
from sarm.settings.registered import listing
from sarm.settings.results_root import READ, place_paths
from sarm.settings.run import Flat, RunSettings

PROBES = ("typos", "casing", "whitespace", "markdown", "quoting")


@dataclass(frozen=True, kw_only=True)
class Benchmarking:
    """Score benchmarks with a reward model and report every figure with its interval."""

    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/benchmarks"))
    model: str = field(metadata=READ)
    """SARM folder, folder or Hugging Face id of a scalar-head reward model, or `module:function` / `file.py:function` of conversations to numbers."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face model."""
    benchmarks: Annotated[tuple[str, ...], listing("known benchmarks")] = field(default=(), metadata=READ)
    """`NAME=SOURCE` of a known benchmark; a source is a file, a glob or `owner/name` on Hugging Face, and may be left out for the public data set."""
    head: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """Where the reward is: unset finds the model's head by its name; `token:ID` is the logit of a token of a language model without one."""
    objectives: tuple[float, ...] = field(default=(), metadata=ABSENT_AT_DEFAULT)
    """Weight of each output of a head with several, in their order; the reward is their weighted sum."""
    chat_template: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """Chat template of a tokenizer that has none, or several: a file, or the name of one that it has."""
    edit: Path | None = field(default=None, metadata=READ | ABSENT_AT_DEFAULT)
    """Folder of an edit of features inside the model (`jobs/debias.py` writes them). Unset: the folder `feature_edit` in the model's, if it is there."""
    protocol: Literal["exact", "official"] = "exact"
    """`exact`: one BOS, left truncation that keeps the rewarded token; `official`: the tokenisation of the benchmarks' own code, with its known faults."""
    max_length: int | None = None
    """Tokens of a conversation at most; unset: what a SARM was trained with, else 2048."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model's body; heads are float32. `auto`: bfloat16 on GPUs that multiply it, else float32."""
    batch_tokens: int = field(default=0, metadata=OPERATIONAL)
    """Tokens of one forward pass, padding included; 0: as many as the device has memory for."""
    limit: int | None = None
    """Score about this many rows of each benchmark, chosen by hash of the prompt."""
    allow_partial: bool = False
    """Score a benchmark of which under half the rows can be used."""
    probes: tuple[str, ...] = ()
    """Meaning-preserving edits to repeat the scoring under: typos, casing, whitespace, markdown, quoting."""
    probe_rows: int = 100
    """Rows of each benchmark that are edited."""
    drift_items: int = 32
    """Completions that are scored a second time, alone, to see whether a batch changes scores; 0: none."""

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """`dtype`; float32 where nobody has chosen for a device yet."""
        return "float32" if self.dtype == "auto" else self.dtype

    def __post_init__(self) -> None:
        place_paths(self)
        object.__setattr__(self, "chat_template", template_text(self.chat_template, "--chat-template"))
        if unknown := [probe for probe in self.probes if probe not in PROBES]:
            raise UserError(f"unknown probe {unknown[0]}, known are {', '.join(PROBES)}. Pass --probes.")
        if not self.benchmarks:
            raise UserError("there is no benchmark. Pass --benchmarks NAME=SOURCE ...")
        names = [text.partition("=")[0] for text in self.benchmarks]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{repeated[0]} is named twice. Pass each of --benchmarks once; a source may be a glob.")
        if self.objectives and not (any(self.objectives) and all(map(math.isfinite, self.objectives))):
            raise UserError(f"the weights of the outputs are {self.objectives}, expected numbers that are not all 0. Pass --objectives.")  # fmt: skip
        check_tokens(self, "batch_tokens")
        for name, least in (("max_length", 8), ("limit", 1), ("probe_rows", 1), ("drift_items", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}. Pass --{name.replace('_', '-')}.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compare two finished evaluations item by item."""

    uses_cluster: ClassVar[bool] = False
    run_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")] = field(metadata=READ)
    """Folder that `jobs/evaluate.py --model` wrote: the model whose gain is measured."""
    run_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")] = field(metadata=READ)
    """Folder of the model that it is compared with."""
    run: Annotated[RunSettings, Flat] = RunSettings(out=Path("outputs/comparison"))
    permutations: int = 10_000
    """Random swaps of the two models' results, whole prompts at a time, behind each p-value where more than 12 prompts differ."""

    def __post_init__(self) -> None:
        place_paths(self)
        if self.permutations < 100:
            raise UserError(f"permutations must be at least 100, got {self.permutations}. Pass --permutations.")
