"""Rows of several segments as other rows, for models that cannot take them as they are. B rows, L columns."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .attention import DENSE_TOKENS
from .segments import SEGMENTS_PER_BLOCK, visible_from


class Apart(NamedTuple):
    """Other rows with the same tokens, padded on the right, and where the token of each place of the rows given is; padding is anywhere."""

    input_ids: Int[Tensor, "others tokens"]
    positions: Int[Tensor, "others tokens"]
    segments: Int[Tensor, "others tokens"]
    rows: Int[Tensor, "rows columns"]
    columns: Int[Tensor, "rows columns"]


def aligned(
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> Apart | None:
    """Rows of one sequence each, moved to the left where they are padded there; None if a row has more in it."""
    is_token = segments >= 0
    first = is_token.int().argmax(1)
    order = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    moved = (order + first[:, None]) % segments.shape[1]
    ids, positions, segments = (x.gather(1, moved) for x in (input_ids, positions, segments))
    # One of them is what most of the time ends here.
    is_one = (segments == segments[:, :1]) & (positions == order)
    if not bool((is_one | (segments < 0)).all()) or bool(((segments[:, :-1] < 0) & (segments[:, 1:] >= 0)).any()):
        return None
    rows = torch.arange(len(segments), device=segments.device)[:, None].expand_as(segments)
    return Apart(ids, positions, segments, rows, (order - first[:, None]) % segments.shape[1])


def in_shorter_rows(
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> Apart:
    """The prompts of each row with their answers, in rows of at most DENSE_TOKENS; `as_sequences` if one alone is longer."""
    lines: list[Tensor] = []
    numbers = torch.where(segments < 0, -1, segments.long() // SEGMENTS_PER_BLOCK).cpu()
    for row, number_L in enumerate(numbers):
        open_line = len(lines)
        for number in number_L.unique():
            if number < 0:
                continue
            places = row * segments.shape[1] + (number_L == number).nonzero().flatten()
            if len(places) > DENSE_TOKENS:
                return as_sequences(input_ids, positions, segments)
            if len(lines) > open_line and len(lines[-1]) + len(places) <= DENSE_TOKENS:
                lines[-1] = torch.cat([lines[-1], places])
            else:
                lines.append(places)
    return _gathered(input_ids, positions, segments, lines, lines)


def as_sequences(
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> Apart:
    """Every token behind all that it sees, in as few sequences as hold all tokens: those of each answer's and branch's last token."""
    lines: list[Tensor] = []
    new: list[Tensor] = []
    segments_on_host = segments.cpu()
    for row, segments_L in enumerate(segments_on_host):
        open_L = segments_L >= 0
        for last in reversed(range(len(open_L))):
            if not open_L[last]:
                continue
            seen = (visible_from(segments_L, last) & (segments_L >= 0)).nonzero().flatten()
            lines.append(row * len(open_L) + seen)
            new.append(torch.where(open_L[seen], lines[-1], -1))
            open_L[seen] = False
    apart = _gathered(input_ids, positions, segments, lines, new)
    length = torch.arange(apart.input_ids.shape[1], device=segments.device)
    return apart._replace(positions=length.expand_as(apart.positions), segments=apart.segments.clamp(max=0))


def _gathered(input_ids: Tensor, positions: Tensor, segments: Tensor, lines: list[Tensor], new: list[Tensor]) -> Apart:
    """Rows of these places; a token is where its place is among the `new` ones of a row."""
    rows, columns = torch.zeros(2, segments.numel(), dtype=torch.long)
    for number, places in enumerate(new):
        is_new = places >= 0
        rows[places[is_new]] = number
        columns[places[is_new]] = is_new.nonzero().flatten()
    taken = nn.utils.rnn.pad_sequence(lines or [torch.zeros(1, dtype=torch.long)], batch_first=True, padding_value=-1)
    taken = taken.to(segments.device)
    ids, at, of = (x.flatten()[taken.clamp_min(0)] for x in (input_ids, positions, segments))
    is_padding = taken < 0
    return Apart(
        ids.masked_fill(is_padding, 0),
        at.masked_fill(is_padding, 0),
        of.masked_fill(is_padding, -1),
        rows.reshape(segments.shape).to(segments.device),
        columns.reshape(segments.shape).to(segments.device),
    )
