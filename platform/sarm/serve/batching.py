"""Which waiting answers are read together: the oldest first, beside it those of its prompt, then others while there is room.

Tokens are counted after sharing: a prompt once, however many answers to it a batch holds, and whichever requests they came with.
"""

from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sarm.data.tokens.beginnings import Beginnings
from sarm.data.tokens.packing import Row, answer_rows
from sarm.passes.reader import Reading

# So often younger answers of an older one's prompt may take the room of one that would have fitted.
_MAX_PASSED_OVER = 2
# How far a batch looks for what fits: a longer look would cost more than it saves.
_LOOK = 2048


@dataclass(frozen=True, eq=False)
class Read:
    """What the engine says of an answer: its reading, and what it took."""

    reading: Reading
    beginnings: tuple[Reading, ...] = ()
    """Of the answer's beginnings, where they were asked for."""
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    """Of the whole batch."""
    computed_tokens: int = 0
    """The answer's share of the tokens that were computed: its own, and of its prompt what no other answer had brought."""


@dataclass(eq=False)
class Waiting:
    """An answer in the queue: its tokens with its prompt's, and where its reading is awaited."""

    ids: Sequence[int]
    prompt_tokens: int
    """Tokens at the beginning that answers to the same prompt share."""
    prompt: Hashable
    """What answers to the same prompt have in common, and no others."""
    arrived: float
    beginnings: Beginnings | None = None
    """Where else it is read; then it is read in a row of its own."""
    future: "Future[Read]" = field(default_factory=Future)
    passed_over: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens are computed for it, if no other answer shares its prompt."""
        return len(self.ids) + (0 if self.beginnings is None else self.beginnings.tokens)


def take_batch(waiting: list[Waiting], budget: int) -> list[Waiting]:
    """Take the next batch out of the queue, which is in order of arrival: at most `budget` tokens, at least one answer.

    An answer that younger ones kept out twice is kept out by none a third time.
    """
    if not waiting:
        return []
    seen = waiting[:_LOOK]
    # In order of arrival, but first of all those that have been kept out.
    order = sorted(seen, key=lambda one: one.passed_over < _MAX_PASSED_OVER)
    first = order[0]
    if first.passed_over < _MAX_PASSED_OVER:
        order.sort(key=lambda one: one.prompt != first.prompt)
    taken: list[Waiting] = []
    prompts: set[Hashable] = set()
    used = 0
    for one in order:
        cost = cost_of(one, prompts)
        if taken and used + cost > budget:
            continue
        taken.append(one)
        prompts.add(one.prompt)
        used += cost
        if used >= budget:
            break
    chosen = {id(one) for one in taken}
    kept = [one for one in seen if id(one) not in chosen]
    last = max(one.arrived for one in taken)
    for one in kept:
        if one.arrived < last and one.tokens <= budget:
            one.passed_over += 1
    waiting[: len(seen)] = kept
    return taken


def cost_of(one: Waiting, prompts: set[Hashable]) -> int:
    """Tokens that the answer adds to a batch that has these prompts."""
    return one.tokens - (one.prompt_tokens if one.prompt in prompts else 0)


def rows_of(batch: Sequence[Waiting], row_tokens: int) -> list[Row]:
    """The rows of a batch, keyed by the answers' places in it: a row or more for each prompt."""
    groups: dict[Hashable, list[tuple[Hashable, Sequence[int]]]] = {}
    rows: list[Row] = []
    for place, one in enumerate(batch):
        if one.beginnings is None:
            groups.setdefault(one.prompt, []).append((place, one.ids))
        else:
            columns: dict[Hashable, Sequence[int]] = {place: one.beginnings.columns}
            rows += answer_rows([(place, one.ids)], row_tokens, columns, one.beginnings.closing)
    return rows + [row for answers in groups.values() for row in answer_rows(answers, row_tokens)]
