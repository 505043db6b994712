"""The table of claims, as `docs/evidence.md` and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.evidence import pieces
from tests.evidence.claims import Claim
from tests.evidence.pieces import Piece
from tests.evidence.verdicts import MIN_PROMPTS, MIN_SEEDS, Measured, Verdict, smallest_seen, verdict

_INTRODUCTION = f"""# What is shown, and what is not

`make evidence` makes this page from the files in `docs/evidence/`, each of which one command measured. A claim is a figure that has to lie
above a bound, and both were fixed before the first measurement. It is **shown** if the figure's whole 95 % interval lies above the bound,
**contradicted** if it lies below, and **not shown** if it holds the bound. Nothing is decided on fewer than {MIN_PROMPTS} prompts, or
{MIN_SEEDS} seeds where models are trained. Intervals are by prompt. The last column is the smallest distance from the bound that four of
five studies of this size would have shown.
"""


@dataclass(frozen=True)
class Row:
    """A claim and what was found."""

    claim: Claim
    found: Measured | None
    verdict: Verdict
    pieces_done: int
    pieces_all: int

    def as_json(self) -> dict[str, Any]:
        """What `outputs/evidence.json` has of it."""
        return {
            "claim": self.claim.name,
            "says": self.claim.says,
            "bound": self.claim.bound,
            "unit": self.claim.unit,
            "paper": self.claim.paper,
            "found": None if self.found is None else asdict(self.found),
            "smallest_seen": None if self.found is None else smallest_seen(self.found),
            "verdict": self.verdict,
            "pieces": [self.pieces_done, self.pieces_all],
            "command": command(self.claim),
        }


def command(claim: Claim) -> str:
    """What measures a claim alone."""
    return f"make evidence CLAIMS={claim.name}"


def rows(claims: Iterable[Claim], every: Sequence[Piece], kept: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each claim; `kept` is what was measured, by piece."""
    made = []
    for claim in claims:
        own = pieces.chosen(every, [claim.study])
        done = [kept[piece.name]["found"] for piece in own if piece.name in kept]
        found = claim.figure({claim.study: done}) if done else None
        made.append(Row(claim, found, verdict(found, claim.bound, claim.trains), len(done), len(own)))
    return made


def page(made: Sequence[Row], kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    lines = [_INTRODUCTION, "| claim | verdict | figure | prompts, seeds | papers | could have been seen |", "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [_line(row) for row in made]
    lines += ["", "## Each claim by one command", "", "| claim | command | pieces measured |", "|---|---|---|"]
    lines += [
        f"| `{row.claim.name}` | `{command(row.claim)}` | {row.pieces_done} of {row.pieces_all} |" for row in made
    ]
    machines = sorted({_machine(one["machine"]) for one in kept.values()})
    hours = sum(one["seconds"] for one in kept.values()) / 3600
    measured = f"{len(kept)} pieces, {hours:.1f} hours of them, on {'; '.join(machines)}." if kept else "Nothing yet."
    return "\n".join([*lines, "", "## Measured", "", measured, ""])


def _line(row: Row) -> str:
    claim, found, bold = row.claim, row.found, f"**{row.verdict}**"
    if found is None:
        return f"| {claim.says} | {bold} | - | - | {claim.paper} | - |"
    value, low, high = (claim.scale * number for number in (found.value, found.low, found.high))
    sign = "+" if claim.is_difference else ""
    figure = (
        f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f}) {claim.unit}, bound {claim.scale * claim.bound:g}"
    )
    seeds = f", {found.seeds} seeds" if claim.trains else ""
    return f"| {claim.says} | {bold} | {figure} | {found.prompts} prompts{seeds} | {claim.paper} | {claim.scale * smallest_seen(found):.1f} |"


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor']} ({machine['capability']}, {machine['threads']} threads, torch {machine['torch']})"
