"""Rows of tokens for one forward pass. Answers to one prompt share a row: the prompt once, then each answer.

Segment 0 is the shared prompt, 1, 2, ... the answers, -1 padding; positions restart after the prompt at every answer, so a
packed answer is computed as if it stood alone (`sarm.nn.backbone`). Short rows of a batch stand behind one another, each in a block
of segments of its own, in lines as long as the longest row or as much longer as saves padding; what is then left is padded on the right.

Behind tokens of an answer may stand branches: what the template closes a turn with, as if the answer stopped there. Nothing sees them.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sarm.nn.segments import ANSWERS_PER_BLOCK, SEGMENTS_PER_BLOCK

# Attention to all of a line costs as much as the rest of a block where a line has some 6 d_in tokens; of the widths in use, the least.
_ATTENTION_EQUALS_REST = 3_500
_LINES_LESS_TRIED, _SLACKS = 3, (1.0, 1.05)


class Row(NamedTuple):
    """One row: its tokens, and for each key the column whose activation is wanted."""

    ids: list[int]
    segments: list[int]
    positions: list[int]
    taken: list[tuple[Hashable, int]]


class TokenBatch(NamedTuple):
    """Padded rows as the model takes them; `keys[n]` names the activation at (`rows[n]`, `columns[n]`)."""

    input_ids: Int[Tensor, "rows columns"]
    position_ids: Int[Tensor, "rows columns"]
    segment_ids: Int[Tensor, "rows columns"]
    rows: Int[Tensor, " taken"]
    columns: Int[Tensor, " taken"]
    keys: list[Hashable]

    def model_inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Keyword arguments of the reward model's forward."""
        return {
            "input_ids": self.input_ids.to(device),
            "position_ids": self.position_ids.to(device),
            "segment_ids": self.segment_ids.to(device),
            "rewarded_rows": self.rows.to(device),
            "rewarded_columns": self.columns.to(device),
        }


def text_row(key: Hashable, ids: Sequence[int], columns: Sequence[int]) -> Row:
    """A plain sequence of which several columns are wanted, keyed (key, column)."""
    return Row(list(ids), [0] * len(ids), list(range(len(ids))), [((key, c), c) for c in columns])


def answer_row(key: Hashable, ids: Sequence[int]) -> Row:
    """A prompt with one answer of which the last token is wanted."""
    return Row(list(ids), [0] * len(ids), list(range(len(ids))), [(key, len(ids) - 1)])


def answer_rows(
    answers: Sequence[tuple[Hashable, Sequence[int]]],
    row_tokens: int,
    columns: Mapping[Hashable, Sequence[int]] | None = None,
    closing: Sequence[int] = (),
) -> list[Row]:
    """Rows of at most `row_tokens` tokens holding all answers to one prompt (a longer single answer gets a row of its own).

    Each answer is (key, ids of prompt and answer); what the sequences of a row have in common is stored once. The wanted
    column of an answer is its last token, keyed `key`, and the tokens c that `columns[key]` names, keyed (key, c). With `closing`, these
    tokens stand as a branch behind each such c, and it is the last of them that is wanted; answers that have c in common share the branch.
    """
    columns = columns or {}
    rows: list[Row] = []

    def own_tokens(answer: tuple[Hashable, Sequence[int]]) -> int:
        return len(answer[1]) + len(closing) * len(columns.get(answer[0], ()))

    waiting = sorted(answers, key=lambda answer: len(answer[1]))
    while waiting:
        members = [waiting.pop(0)]
        shared = len(members[0][1]) - 1
        while waiting:
            grown = min(shared, _common_prefix(members[0][1], waiting[0][1]))
            length = grown + sum(own_tokens(answer) - grown for answer in [*members, waiting[0]])
            if grown == 0 or length > row_tokens:
                break
            members.append(waiting.pop(0))
            shared = grown
        rows.append(_shared_row(members, shared if len(members) > 1 else 0, columns, closing))
    return rows


def token_batches(rows: Iterable[Row], batch_tokens: int, pad_id: int, *, join: bool = True) -> list[TokenBatch]:
    """`row_batches`, collated."""
    return [collate(batch, pad_id, join=join) for batch in row_batches(rows, batch_tokens)]


def row_batches(rows: Iterable[Row], batch_tokens: int) -> list[list[Row]]:
    """Rows sorted by length and cut into batches of at most `batch_tokens` tokens, padding included (at least one row each)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def padded_tokens(rows: Sequence[Row]) -> int:
    """Tokens of a batch of these rows, padding included."""
    bins = _bins(rows)
    return len(bins) * _width(bins)


def collate(rows: Sequence[Row], pad_id: int, *, join: bool = True) -> TokenBatch:
    """One batch of these rows; without `join` each has a line of its own, in this order, for models that do not know segments."""
    bins = _bins(rows) if join else [[row] for row in rows]
    length = _width(bins)
    joined = [_joined(members) for members in bins] if join else list(rows)

    def padded(lists: list[list[int]], value: int) -> Int[Tensor, "rows columns"]:
        return torch.tensor([items + [value] * (length - len(items)) for items in lists])

    taken = [(key, index, column) for index, row in enumerate(joined) for key, column in row.taken]
    return TokenBatch(
        input_ids=padded([row.ids for row in joined], pad_id),
        position_ids=padded([row.positions for row in joined], 0),
        segment_ids=padded([row.segments for row in joined], -1),
        rows=torch.tensor([row for _, row, _ in taken], dtype=torch.long),
        columns=torch.tensor([column for _, _, column in taken], dtype=torch.long),
        keys=[key for key, _, _ in taken],
    )


def _bins(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in lines; of the lengths tried, the one whose padding and attention cost least."""
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    if not ordered:
        return []
    longest, total = len(ordered[0].ids), sum(len(row.ids) for row in ordered)
    best = _first_fit(ordered, longest)
    for fewer in range(len(best) - 1, max(0, len(best) - 1 - _LINES_LESS_TRIED), -1):
        for slack in _SLACKS:
            bins = _first_fit(ordered, max(longest, math.ceil(slack * total / fewer)))
            best = min(best, bins, key=_cost)
    return best


def _first_fit(ordered: Sequence[Row], length: int) -> list[list[Row]]:
    """The rows, longest first, each behind the first others that leave it room within `length`."""
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in ordered:
        place = next((i for i, free in enumerate(room) if free >= len(row.ids)), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(length)
        bins[place].append(row)
        room[place] -= len(row.ids)
    return bins


def _width(bins: Sequence[Sequence[Row]]) -> int:
    return max((sum(len(row.ids) for row in members) for members in bins), default=0)


def _cost(bins: Sequence[Sequence[Row]]) -> float:
    width = _width(bins)
    return len(bins) * width * (1 + width / _ATTENTION_EQUALS_REST)


def _joined(members: Sequence[Row]) -> Row:
    """The rows behind one another, blind to each other."""
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    taken: list[tuple[Hashable, int]] = []
    for block, row in enumerate(members):
        taken += [(key, len(ids) + column) for key, column in row.taken]
        segments += [block * SEGMENTS_PER_BLOCK + segment for segment in row.segments]
        ids += row.ids
        positions += row.positions
    return Row(ids, segments, positions, taken)


def _shared_row(
    members: Sequence[tuple[Hashable, Sequence[int]]],
    shared: int,
    columns: Mapping[Hashable, Sequence[int]],
    closing: Sequence[int],
) -> Row:
    ids = list(members[0][1][:shared])
    segments, positions = [0] * shared, list(range(shared))
    taken: list[tuple[Hashable, int]] = []
    ends: set[Hashable] = set()
    for number, (key, sequence) in enumerate(members, start=1):
        named = [((key, c), c if c < shared else len(ids) + c - shared) for c in columns.get(key, ())]
        ids += sequence[shared:]
        segments += [number] * (len(sequence) - shared)
        positions += range(shared, len(sequence))
        taken += [*named, (key, len(ids) - 1)]
        ends.add(key)
    row = Row(ids, segments, positions, taken)
    return _with_branches(row, ends, closing) if closing else row


def _with_branches(row: Row, ends: Collection[Hashable], closing: Sequence[int]) -> Row:
    """The row with `closing` behind every column that is wanted under another key than those of `ends`."""
    behind = {column for key, column in row.taken if key not in ends}
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    moved: list[int] = []
    branches: dict[int, int] = {}
    for column, (token, segment, position) in enumerate(zip(row.ids, row.segments, row.positions, strict=True)):
        moved.append(len(ids))
        ids.append(token)
        segments.append(segment)
        positions.append(position)
        if column in behind:
            ids += closing
            segments += [segment + (len(branches) + 1) * ANSWERS_PER_BLOCK] * len(closing)
            positions += range(position + 1, position + 1 + len(closing))
            branches[column] = len(ids) - 1
    assert len(branches) < ANSWERS_PER_BLOCK
    taken = [(key, moved[column] if key in ends else branches[column]) for key, column in row.taken]
    return Row(ids, segments, positions, taken)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, short of both ends so that every answer keeps its rewarded token to itself."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)
