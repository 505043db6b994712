"""The flags of `jobs/reward_card.py`, and of its form with `--web`."""

from dataclasses import dataclass, field
from pathlib import Path

from sarm.settings.checks import UserError, check
from sarm.settings.results_root import READ, WRITTEN, place_paths


@dataclass(frozen=True, kw_only=True)
class RewardCard:
    """One conversation's reward as a sum of named features, sentence by sentence and token by token."""

    model: Path = field(metadata=READ)
    """SARM folder."""
    edit: Path | None = field(default=None, metadata=READ)
    """Folder of an edit of features inside the model, with which it is read."""
    prompt: str = ""
    """What the user says."""
    response: str = ""
    """The answer to reward."""
    conversation: Path | None = field(default=None, metadata=READ)
    """JSON file with a list of `{role, content}` that ends with the assistant's turn, instead of --prompt and --response."""
    contexts: Path | None = field(default=None, metadata=READ)
    """contexts/v1 folder whose terms name the features; unset: `contexts` beside the model if it is there, and of this model."""
    explanations: Path | None = field(default=None, metadata=READ)
    """explanations/v1 folder whose explanations name them; unset: `explanations` beside the model if it is there, and of this model."""
    features: int = 8
    """Features named for the whole answer; the others are one sum."""
    out: Path = field(default=Path("outputs/reward_card.html"), metadata=WRITTEN)
    """HTML file to write."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        place_paths(self)
        if self.conversation is None and not (self.prompt and self.response):
            raise UserError("there is no conversation. Pass --prompt and --response, or --conversation FILE.json.")
        if self.conversation is not None and (self.prompt or self.response):
            raise UserError("there are two conversations. Pass --conversation, or --prompt and --response.")
        if self.features < 1:
            raise UserError(f"features must be at least 1, got {self.features}. Pass --features.")


@dataclass(frozen=True, kw_only=True)
class CardPage:
    """A page on which prompts and answers of one's own are scored, explained and compared, by a server on this machine."""

    web: bool = True
    """Serve the page, until Ctrl-C."""
    model: Path = field(metadata=READ)
    """SARM folder."""
    edit: Path | None = field(default=None, metadata=READ)
    """Folder of an edit of features inside the model, with which it is read. Unset: the folder `feature_edit` in the model's, if it is there."""
    contexts: Path | None = field(default=None, metadata=READ)
    """contexts/v1 folder whose terms name the features; unset: `contexts` beside the model if it is there, and of this model."""
    explanations: Path | None = field(default=None, metadata=READ)
    """explanations/v1 folder whose explanations name them; unset: `explanations` beside the model if it is there, and of this model."""
    port: int = 0
    """Port to listen on; 0: a free one."""
    browser: bool = True
    """Open the page in a browser, where there is one; its address is printed in any case."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        place_paths(self)
        check(self, "web", self.web, "set: without it, leave it out, and pass --prompt and --response")
        check(self, "port", 0 <= self.port < 65536, "between 0 and 65535")
