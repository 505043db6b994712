"""Options of the job that converts SAEs; nothing heavy is imported here, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sarm.settings.checks import check, check_least
from sarm.settings.results_root import READ, WRITTEN, place_paths


@dataclass(frozen=True, kw_only=True)
class ConvertSae:
    """Write an SAE in another library's format, or read one of theirs."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")] = field(metadata=READ)
    """Folder or .pt file that holds the SAE, or the name of one on the Hugging Face hub: `hf:OWNER/NAME[@REVISION]/FOLDER`."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = field(metadata=WRITTEN)
    """Folder to write; new or empty."""
    format: Literal["saelens", "saelens_residual", "sparsify", "dictionary_learning", "pt", "sarm", "attached"] = (
        "saelens"
    )
    """What to write. `saelens_residual` lets SAELens standardise; `sarm` is a finished SAE stage for the next job; `attached` is a reward model of others (--model) with this SAE at one of its layers, which audits, contexts, pages and cards read as they read a SARM."""
    from_format: Literal["auto", "saelens", "sparsify", "dictionary_learning", "pt", "gemma_scope", "llama_scope"] = (
        "auto"
    )
    """What to read; `auto` goes by the names of the files. Files of Qwen Scope, Goodfire and OpenAI are `pt`."""
    k: int | None = None
    """Active latents, for files that do not say it (the papers' .pt)."""
    model: str = field(default="", metadata=READ)
    """Language model whose activations the SAE is for; it must be the one that the file names, if it names one."""
    layer: int | None = None
    """Blocks that are kept of it: `hidden_states[layer]`, one more than the number of the block that is hooked. It must be what the file says, if it says it."""
    other_model: bool = False
    """Take the SAE for --model though its file names another one, such as the base model of an instruct one."""
    pairs: Path | None = field(default=None, metadata=READ)
    """With `--format attached`: the pairs/v1 folder whose training responses the linear approximation of the reward is measured on."""
    responses: int = 256
    """With `--format attached`: how many of them."""
    head: str = ""
    """With `--format attached`: where the model's reward is, as `jobs/evaluate.py --head` takes it."""
    max_length: int = 2048
    """With `--format attached`: tokens of a conversation at most."""
    relu: bool = False
    """Drop negative latents of a signed TopK SAE, for formats that have a ReLU."""
    standardised: bool = False
    """The SAE was trained on standardised activations, though its file does not say so. Without it, a reward model feeds it what the file's publisher does."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        source = self.source
        place_paths(self)
        if source.as_posix().startswith("hf:") and not source.exists():
            object.__setattr__(self, "source", source)
        check_least(self, "", k=1, layer=1, responses=2, max_length=8)


@dataclass(frozen=True, kw_only=True)
class ConvertSarm:
    """Read a reward model in the papers' layout, or write one of this platform in it, or as vLLM loads it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")] = field(metadata=READ)
    """Folder of the reward model: its config says which of the two layouts it is in."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = field(metadata=WRITTEN)
    """Folder to write; new or empty."""
    format: Literal["sarm", "papers", "sae", "vllm"] = "sarm"
    """What to write: this platform's folder, the papers' checkpoint, the SAE alone as a finished stage for the next job, or a folder that vLLM serves with this package installed."""
    layer: int | None = None
    """Blocks that are kept, for checkpoints without `sarm_param`."""
    k: int | None = None
    """Active latents, for checkpoints without `sarm_param`."""
    topk: bool | None = None
    """Whether latents compete, for checkpoints without `sarm_param` (they do unless said otherwise)."""
    model: str = field(default="", metadata=READ)
    """Language model that the SAE's activations come from, for `--format sae`."""
    on_cut_off: Literal["refuse", "penalise"] | None = None
    """What happens inside vLLM to an answer without an end of turn, for `--format vllm`; unset is what the model does. `penalise` gives it the model's fixed reward."""
    scale: Literal["standardised", "raw"] | None = None
    """Which rewards vLLM gives, for `--format vllm`; unset is `standardised`: minus the mean of the training pairs' rewards, divided by their standard deviation."""
    max_length: int = 4096
    """Tokens of a sequence at most, for checkpoints that do not say it."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        place_paths(self)
        check_least(self, "", layer=1, k=1, max_length=8)
        for name in ("on_cut_off", "scale"):
            check(self, name, self.format == "vllm" or getattr(self, name) is None, "left out, unless --format is vllm")
