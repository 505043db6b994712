"""What a report is, so that it can be cited: of which run, by which code, of which model and data, made by which command.

All of it is of the run and none of the moment of writing: the same run gives the same bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sarm.report.render import bibtex

_LIKE_A_KEY, _HASH_SHOWN = re.compile(r"[^A-Za-z0-9]+"), 16


@dataclass(frozen=True, kw_only=True)
class Citation:
    """The facts that a citation of a run's report names; what is empty is left out."""

    title: str
    date: str
    """Day on which the evaluation was finished, UTC, as YYYY-MM-DD."""
    version: str
    """Of this package, which wrote the report."""
    commits: tuple[str, ...] = ()
    """Of the code that made the run's folders, oldest first."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """What was read, by what it was read as: preferences, texts."""
    seed: int | None = None
    manifests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the manifests of the model and its data, by what they are of."""
    command: str = ""
    """The command line that made the evaluation."""

    def rows(self) -> dict[str, str]:
        """The facts in reading order."""
        found = {
            "report": self.title,
            "evaluated (UTC)": self.date,
            "written by": f"sarm {self.version}",
            "code": ", ".join(self.commits),
            **self.sources,
            "seed": "" if self.seed is None else str(self.seed),
            **{f"{name}: manifest (SHA-256)": digest for name, digest in self.manifests.items()},
            "command": self.command,
        }
        return {name: text for name, text in found.items() if text}

    def entry(self) -> str:
        """The BibTeX entry. It has no author: that is whoever made the run."""
        model = next(iter(self.manifests.values()), "")
        year, month, _ = self.date.split("-")
        code = f", code {self.commits[-1][:12]}" if self.commits else ""
        hashes = [f"{name} {digest[:_HASH_SHOWN]}" for name, digest in self.manifests.items()]
        fields = {
            "title": f"Reward model report: {self.title}",
            "year": year,
            "month": month,
            "howpublished": f"sarm {self.version}{code}",
            "note": f"SHA-256 of the manifests begins with: {', '.join(hashes)}" if hashes else "",
        }
        name = _LIKE_A_KEY.sub("-", self.title).strip("-").lower() or "run"
        return bibtex("misc", "-".join(["sarm", name[:40], model[:8] or year]), fields)
