"""What a live display shows, as lines that fit a terminal: the stage and how far it is, then the figures of it.

stage 3 of 7  train SAE  ━━━━━━━━━━━━──────────────────  42%  12 s left
sae_text  step 20  4.2 steps/s  loss 0.02088  fvu 0.09017
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sarm.engine.live.progress_line import Progress

if TYPE_CHECKING:
    from rich.text import Text

_WIDEST_BAR, _LEAST_BAR = 30, 5
# Done, to do, and what stands for a text's cut end.
_UNICODE, _ASCII = "━─…", "#-~"
_POSITIONS = ("stage {} of {}  ", "{}/{} ")


@dataclass
class Shown:
    """What there is to show. Times are of one clock, in seconds."""

    since: float
    """When the work began."""
    stage: str = ""
    """Of the chain."""
    position: tuple[int, int] | None = None
    """(number of the stage, how many there are)."""
    work: str = ""
    """What the stage does now."""
    progress: Progress | None = None
    progress_at: float = 0.0
    first: tuple[float, Progress] | None = None
    """What was heard first of the same work, and when: rates count from there."""
    bar: str = ""
    """How a library's own bar stands."""

    def begin(self, work: str, now: float) -> None:
        """Other work begins, or none."""
        self.work, self.since, self.progress, self.first = work, now, None, None

    def begin_stage(self, stage: str, number: int, num_stages: int, now: float) -> None:
        """Another stage of the chain begins."""
        self.stage, self.position = stage, (number, num_stages) if num_stages > 1 else None
        self.begin("", now)

    def take(self, progress: Progress, now: float) -> None:
        """The newest progress. What is done is no longer shown: what comes behind it, such as writing, takes its own time."""
        before = self.progress
        if progress.share >= 1:
            self.progress = None
            return
        # Workers that were started again begin at an earlier step.
        if before is None or before.name != progress.name or before.share > progress.share:
            self.first = now, progress
        self.progress, self.progress_at = progress, now

    @property
    def is_empty(self) -> bool:
        return not (self.stage or self.work or self.progress or self.bar)


def lines(shown: Shown, now: float, width: int, *, in_ascii: bool) -> "list[Text]":
    """One line or two of `width` columns at most."""
    from rich.text import Text

    signs = _ASCII if in_ascii else _UNICODE
    first = _first(shown, now, width, signs)
    figures = [shown.bar] if shown.bar else _figures(shown)
    said = _cut("  ".join(filter(None, figures)), width, signs)
    return [first, Text(said, style="dim")] if said else [first]


def _first(shown: Shown, now: float, width: int, signs: str) -> "Text":
    from rich.cells import cell_len
    from rich.text import Text

    progress, left = shown.progress, _left(shown, now)
    name = shown.work or shown.stage or (progress.name if progress else "")
    end = f"{progress.share:4.0%}" if progress else ""
    end += f"  {_time(now - shown.since)} so far" if left is None else f"  {_time(left)} left"
    # The longest with which the name is whole. The long form would rather be short than have no bar beside it.
    rooms = zip(_POSITIONS, (width - _LEAST_BAR - 3 if progress else width, width), strict=True)
    numbers = [(form.format(*shown.position), room) for form, room in rooms] if shown.position else []
    number = next((one for one, room in numbers if cell_len(one + name + end) <= room), "")
    name = _cut(name, width - cell_len(number + end), signs)
    line = Text.assemble((number, "dim"), (name, "bold"))
    room = min(_WIDEST_BAR, width - cell_len(line.plain + end) - 3)
    if progress is not None and room >= _LEAST_BAR:
        done = round(progress.share * room)
        line.append_text(Text.assemble("  ", (signs[0] * done, "green"), (signs[1] * (room - done), "dim"), " "))
    line.append(end)
    line.truncate(max(0, width), overflow="crop")
    return line


def _figures(shown: Shown) -> Sequence[str]:
    progress = shown.progress
    if progress is None:
        return []
    name = progress.name if progress.name != (shown.work or shown.stage or progress.name) else ""
    if progress.step is None:
        return [name, progress.amount, *progress.figures]
    return [name, f"step {progress.step:,}", _rate(shown), *progress.figures]


def _rate(shown: Shown) -> str:
    """Steps in a second (or a minute), since the first step that was heard of; '' before the second line."""
    if shown.first is None or shown.progress is None:
        return ""
    at, first = shown.first
    seconds, steps = shown.progress_at - at, (shown.progress.step or 0) - (first.step or 0)
    if seconds <= 0 or steps <= 0:
        return ""
    return f"{steps / seconds:.3g} steps/s" if steps >= seconds else f"{60 * steps / seconds:.3g} steps/min"


def _left(shown: Shown, now: float) -> float | None:
    """Seconds that the work takes still: as it said, or by what it has done since it was first heard of."""
    if (progress := shown.progress) is None or shown.first is None:
        return None
    since = now - shown.progress_at
    if progress.seconds_left is not None:
        return max(0.0, progress.seconds_left - since)
    at, first = shown.first
    if progress.share <= first.share:
        return None
    left = (shown.progress_at - at) * (1 - progress.share) / (progress.share - first.share)
    return max(0.0, left - since)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _cut(text: str, width: int, signs: str) -> str:
    """The text, or its beginning and a sign that there was more, in `width` columns at most."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + signs[2] if width > 0 else ""
