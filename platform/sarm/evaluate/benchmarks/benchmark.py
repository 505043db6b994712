"""What a preference benchmark is: how its rows are read, scored and shown. Each has one file here, and one entry in `registry`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sarm.contracts.ids import prompt_id_of
from sarm.data.sources.conversations import Message
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow, plain_mean


class BadRow(NamedTuple):
    """A row that is left out: where it is, and why."""

    benchmark: str
    where: str
    reason: str


class Parsed(NamedTuple):
    """What one row says."""

    prompt: list[Message]
    chosen: list[str]
    rejected: list[str]
    subset: str


class Partner(NamedTuple):
    """The row of the same subset without which a row means nothing, and the cluster that both belong to."""

    row_id: str
    cluster: str


class Measure(NamedTuple):
    """A number beside the figures, under `key` in the report and `label` on the page; None where it is not defined."""

    key: str
    label: str
    of: Callable[[Sequence[ScoredRow], Mapping[str, float]], float | None]


@dataclass(frozen=True)
class BenchmarkRow:
    """One prompt with its completions, the first `num_correct` of which are correct; `row_id` is unique in its subset.

    `cluster` is what an interval keeps together: the prompt, or the prompts of a row and its partner.
    """

    benchmark: str
    subset: str
    row_id: str
    cluster: str
    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    num_correct: int
    where: str

    @property
    def prompt_id(self) -> str:
        return prompt_id_of(self.prompt)


def wins_all(row: ScoredRow) -> bool:
    """Whether every correct completion scores above every wrong one."""
    return bool((row.scores[: row.num_correct, None] > row.scores[None, row.num_correct :]).all())


def wins_most(row: ScoredRow) -> bool:
    """Whether the only correct completion scores highest, or several win more than half of their comparisons with wrong ones."""
    won = row.scores[: row.num_correct, None] > row.scores[None, row.num_correct :]
    return bool(won.all() if row.num_correct == 1 else won.mean() > 0.5)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark; what a new one need not say has a default."""

    name: str
    """In `--benchmarks` and in reports."""
    title: str
    """On pages."""
    prefix: str
    """Before its metrics."""
    parse: Callable[[Mapping[str, Any]], Parsed]
    """A row's official fields as a prompt with its completions. Raises Fault with the reason why it is none."""
    observe: Callable[[Sequence[ScoredRow]], Observations]
    """What its means are taken over."""
    combine: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """From means to figures; also takes means with leading axes, one entry a set of means."""
    mean: Callable[[str, Sequence[float]], float] = plain_mean
    data_set: str = ""
    """The public data set, `hf:NAME:SPLIT`; empty for a user's own data."""
    scores_empty: bool = False
    """Whether an empty completion is scored, as the official code does it, and its row not left out."""
    subsets: Mapping[str, int] | None = None
    """Its subsets with their published number of rows. None: any subset, and rows need no id."""
    fault: Callable[[Parsed, str], str | None] = lambda parsed, row_id: None
    """Why a row with this id cannot be used, though it could be parsed."""
    partner: Callable[[str, str], Partner | None] = lambda subset, row_id: None
    """The partner of the row with this subset and id."""
    is_right: Callable[[ScoredRow], bool] = wins_most
    """Whether a row counts as right where right and wrong is all there is."""
    pooled_sizes: Callable[[Mapping[str, int]], Mapping[str, int]] = lambda sizes: {}
    """Rows behind the figures that are neither a subset nor `overall`, from the rows by subset."""
    controls: tuple[Measure, ...] = ()
    """Its own among the controls."""
    measures: tuple[Measure, ...] = ()
    """Its own beside the controls."""

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        """Every figure of the rows, in the order of the official code's floating-point sums."""
        means = {part: self.mean(part, values) for part, values in self.observe(rows).by_part().items()}
        return {name: float(value) for name, value in self.combine(means).items()}

    def with_partners(self, rows: Sequence[ScoredRow]) -> list[ScoredRow]:
        """Without rows whose partner has no score: what is made of both is undefined."""
        present = {(row.subset, row.row_id) for row in rows}
        return [row for row in rows if self.lacks(row.subset, row.row_id, present) is None]

    def lacks(self, subset: str, row_id: str, present: set[tuple[str, str]]) -> str | None:
        """The id of the row's partner if it is not among those that are present (subset, id)."""
        partner = self.partner(subset, row_id)
        return None if partner is None or (subset, partner.row_id) in present else partner.row_id
