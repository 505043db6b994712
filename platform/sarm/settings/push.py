"""The flags of `jobs/push.py`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from sarm.settings.checks import UserError
from sarm.settings.results_root import READ, WRITTEN, place_paths


@dataclass(frozen=True, kw_only=True)
class Push:
    """A SARM with its model card, in a folder or on the Hugging Face hub."""

    model: Path = field(metadata=READ)
    """SARM folder. The run that it lies in gives the card its data and figures."""
    edit: Path | None = field(default=None, metadata=READ)
    """Folder of an edit of features inside the model, which is then among its weights. Unset: the folder `feature_edit` in the model's, if it is there."""
    to: Path | None = field(default=None, metadata=WRITTEN)
    """Folder to write: a new one, or one that this command wrote."""
    hub: str = ""
    """Repository to write on the hub, as `owner/name`; the token is that of `hf auth login`, or HF_TOKEN."""
    licence: str = ""
    """Licence of the model, as the hub names it: `apache-2.0`, `llama3.1`, `other`. The base model's licence binds it too."""
    private: bool = False
    """Make a repository on the hub that only its owners see; one that is there and that others see is refused."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        place_paths(self)
        if (self.to is None) == (not self.hub):
            raise UserError("there is one place to push to: pass either --to FOLDER or --hub OWNER/NAME.")
        if self.hub and not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", self.hub, re.ASCII):
            raise UserError(f"a repository is owner/name, got {self.hub[:80]!r}. Pass --hub.")
        if self.hub and not self.licence:
            raise UserError("a model on the hub needs a licence. Pass --licence, and look at that of the base model.")
        if self.licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.licence):
            raise UserError(f"a licence is a name of the hub's, such as apache-2.0, got {self.licence[:80]!r}. Pass --licence.")  # fmt: skip
