"""Lines that say how far a piece of work is: training and passes print them, and the live display reads them back.

    NAME  42%  step STEP  FIGURE  FIGURE  N s left
    NAME DONE of TOTAL WHAT  FIGURE  FIGURE  N s left
    [HH:MM:SS] DONE of TOTAL WHAT

Who prints may be another process, so the line itself is all that is handed over.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_BETWEEN = "  "
_END = rf"(?:{_BETWEEN}(?P<left>\d+) s left)?"
_COUNT = r"(?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<what>\w+)"
_FORMS = (
    re.compile(rf"(?P<name>\S.*?) +(?P<percent>\d+)%{_BETWEEN}step (?P<step>\d+){_BETWEEN}(?P<figures>.*?){_END}"),
    re.compile(rf"(?P<name>[^\[\s].*?) {_COUNT}{_BETWEEN}(?P<figures>.*?){_END}"),
    re.compile(rf"\[\d\d:\d\d:\d\d\] {_COUNT}(?: .*)?"),
)
# What Ray writes before a worker's line on a cluster of others.
_PREFIX = re.compile(r"\([^()]*\bpid=\d+[^()]*\) ")
_CONTROLS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class Progress(NamedTuple):
    """How far something is."""

    name: str
    """What it is; '' where the line does not say."""
    share: float
    """Of the work, between 0 and 1."""
    step: int | None
    """Of a training."""
    amount: str
    """`20 of 40 rows`, of what is no training."""
    figures: tuple[str, ...]
    """Each a figure with its name or unit."""
    seconds_left: float | None


def training_line(title: str, share: float, step: int, figures: Sequence[str], seconds_left: float | None) -> str:
    """The line of a training after `step`, with `share` of it done."""
    end = "" if seconds_left is None else f"{_BETWEEN}{seconds_left:.0f} s left"
    return f"{title} {share:4.0%}{_BETWEEN}step {step}{_BETWEEN}{_BETWEEN.join(figures)}{end}"


def pass_line(name: str, done: int, total: int, what: str, figures: Sequence[str], seconds_left: float) -> str:
    """The line of a pass that has done so many of its rows."""
    return f"{name} {count(done, total, what)}{_BETWEEN}{_BETWEEN.join(figures)}{_BETWEEN}{seconds_left:.0f} s left"


def count(done: int, total: int, what: str) -> str:
    """`20 of 40 rows`; said alone (`say`), it is a progress line too."""
    return f"{done:,} of {total:,} {what}"


def read(line: str) -> Progress | None:
    """What a progress line says; None for every other line."""
    line = bare(line)
    for form in _FORMS:
        if (match := form.fullmatch(line)) is not None:
            return _progress(match.groupdict())
    return None


def bare(line: str) -> str:
    """The line without colours and what moves the cursor, and without Ray's name of the process that printed it."""
    return _PREFIX.sub("", _CONTROLS.sub("", line), count=1).rstrip()


def _progress(said: dict[str, str | None]) -> Progress | None:
    done, total = (int((said.get(key) or "0").replace(",", "")) for key in ("done", "total"))
    if said.get("percent") is None and not total:
        return None
    share = int(said["percent"]) / 100 if said.get("percent") else done / total  # type: ignore[arg-type]
    left, step = said.get("left"), said.get("step")
    return Progress(
        name=said.get("name") or "",
        share=min(1.0, share),
        step=int(step) if step else None,
        amount=count(done, total, said["what"] or "") if total else "",
        figures=tuple(filter(None, (said.get("figures") or "").split(_BETWEEN))),
        seconds_left=float(left) if left else None,
    )
