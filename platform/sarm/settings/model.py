"""The language model, where it is cut, and how messages become tokens."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from sarm.settings.chat_template import template_text
from sarm.settings.checks import ABSENT_AT_DEFAULT, check, check_least
from sarm.settings.registered import listing
from sarm.settings.results_root import READ, place_paths


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The language model, where it is cut, and how messages become tokens."""

    common: ClassVar[tuple[str, ...]] = ("name", "layer", "max_length")
    name: Annotated[str, listing("built-in models")] = field(default="demo:smollm2", metadata=READ)
    """Folder, Hugging Face id, or a built-in one: `demo:` comes from a package, `tiny:` is random and for tests."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face model; pin a commit for a run to be repeated."""
    gguf_file: str = ""
    """File inside `name` to load instead of safetensors."""
    layer: int = 15
    """Number of blocks to keep; activations are the residual stream after block `layer` (`hidden_states[layer]`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Dtype of the frozen backbone in extraction and scoring; training keeps fp32 master weights whatever this is. `auto`: bfloat16 on GPUs that multiply it, else float32; what is finished keeps its own."""
    max_length: int = 512
    """Tokens of a sequence at most; longer ones lose their beginning, never the rewarded final token."""
    system_prompt: str | None = None
    """System turn put before conversations that have none; unset leaves it to the model's chat template."""
    chat_template: str = field(default="", metadata=ABSENT_AT_DEFAULT)
    """Chat template of a tokenizer that has none, or several: a file, or the name of one that it has; unset is its own, or `default`."""

    rewarded_token: Literal["end_of_turn", "last"] = field(default="end_of_turn", metadata=ABSENT_AT_DEFAULT)
    """Where a reward is read: at the token that ends the answer's turn, as SARMs are read, or at the last that the template writes (`last`), as reward models of others are read: white space behind the end of turn counts, and the CLS token of those that are read there. Pass `last` to train dictionaries where such a model reads its reward."""

    def __post_init__(self) -> None:
        place_paths(self)
        object.__setattr__(self, "chat_template", template_text(self.chat_template, "--model.chat-template"))
        check(self, "model.name", bool(self.name), "a folder or a Hugging Face id")
        check_least(self, "model.", layer=1, max_length=8)
