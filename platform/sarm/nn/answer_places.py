"""Where a reward is read in rows of token ids: behind the template's last opening of an answer (`SarmConfig.answer_place`).

B rows, L columns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Places(NamedTuple):
    """Rows with their rewarded columns: ids and mask [B, L] or, if answers were closed, [B, L + 1]; the others [B]."""

    input_ids: Tensor
    mask: Tensor
    columns: Tensor
    cut_off: Tensor
    unopened: Tensor
    unscored: Tensor


def find_places(input_ids: Tensor, mask: Tensor, place: Mapping[str, Any], end_id: int) -> Places:
    """The first end of turn behind the last opening; the last end of turn where the template marks no opening. Nothing is closed yet."""
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    shown = mask.bool()
    ends = shown & (input_ids == end_id)
    opened = _occurrences(input_ids.masked_fill(~shown, -1), place["opening"])
    has_opening = opened.any(-1)
    last_opening = (opened * (order + 1)).amax(-1) - 1
    if not place["opening"]:
        columns = (ends * (order + 1)).argmax(-1)
        # Then an answer is cut off if text follows the last end of turn.
        cut_off = ((shown & (order > columns[:, None])).sum(-1) > place["trailing"]) | ~ends.any(-1)
        none = torch.zeros_like(has_opening)
        return Places(input_ids=input_ids, mask=mask, columns=columns, cut_off=cut_off, unopened=none, unscored=none)
    behind = ends & (order > last_opening[:, None])
    columns = behind.int().argmax(-1)
    # Ends of turn may be padding that no mask hides.
    follows = (shown & (order > columns[:, None]) & ~ends).sum(-1) > place["trailing"]
    # Its beginning was cut off to fit: then nothing but the answer is left, and no turn begins in it.
    turns = torch.tensor(place["turns"], device=input_ids.device, dtype=input_ids.dtype)
    begins = shown & torch.isin(input_ids, turns) & ~_end_of_opening(input_ids, shown, place)
    is_tail = ~has_opening & ends.any(-1) & ~begins.any(-1) & ~follows
    cut_off = ~(behind.any(-1) & (has_opening | is_tail))
    return Places(
        input_ids=input_ids,
        mask=mask,
        columns=columns,
        cut_off=cut_off,
        unopened=~(has_opening | is_tail),
        unscored=follows & ~cut_off,
    )


def closed(places: Places, end_id: int) -> Places:
    """The same with an end of turn behind each answer that was cut off, so that no row is rewarded at its prompt."""
    if not places.cut_off.any():
        return places
    order = torch.arange(places.input_ids.shape[1], device=places.input_ids.device)
    last = (places.mask.bool() * (order + 1)).argmax(-1)
    rows = places.cut_off.nonzero().flatten()
    columns = torch.where(places.cut_off, last + 1, places.columns)
    input_ids, mask = F.pad(places.input_ids, (0, 1), value=end_id), F.pad(places.mask, (0, 1))
    input_ids[rows, columns[rows]], mask[rows, columns[rows]] = end_id, 1
    return places._replace(input_ids=input_ids, mask=mask, columns=columns)


def without_padding(input_ids: Tensor, first: int, end_id: int, pad_id: int | None) -> Tensor:
    """A mask [B, L] for rows that came without.

    Hides one repeated token before the beginning of a conversation, a run of the pad token or of the end of turn at the beginning of a row, and
    the pad token behind the conversation.
    """
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    run = (input_ids == input_ids[:, :1]).long().cumprod(-1).sum(-1)
    begins = input_ids == first
    behind_run = begins.gather(1, run.clamp_max(input_ids.shape[1] - 1)[:, None]).squeeze(1)
    is_padding = input_ids[:, 0] == end_id
    if pad_id is not None:
        is_padding |= input_ids[:, 0] == pad_id
    is_padding &= run < input_ids.shape[1]
    hidden = torch.where(begins[:, 0], run - 1, torch.where(behind_run | is_padding, run, torch.zeros_like(run)))
    mask = order >= hidden[:, None]
    if pad_id is not None and pad_id != end_id:
        mask &= ~(input_ids == pad_id).long().flip(-1).cumprod(-1).flip(-1).bool()
    return mask.long()


def _end_of_opening(input_ids: Tensor, shown: Tensor, place: Mapping[str, Any]) -> Tensor:
    """Which tokens [B, L] are what truncation left of an opening: the end of it, at the beginning of a row or behind its BOS."""
    opening = place["opening"]
    left = torch.zeros_like(shown)
    start_B = shown.int().argmax(-1)
    for row, start in enumerate(start_B.tolist()):
        own = input_ids[row].tolist()
        for begin in (start, start + 1) if own[start] == place["first"] else (start,):
            for length in range(len(opening) - 1, 0, -1):
                if own[begin : begin + length] == opening[-length:]:
                    left[row, begin : begin + length] = True
                    break
    return left


def _occurrences(input_ids: Tensor, part: list[int]) -> Tensor:
    """Whether the tokens `part` end at each place [B, L]."""
    length = len(part)
    if not 0 < length <= input_ids.shape[1]:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    wanted = torch.tensor(part, device=input_ids.device, dtype=input_ids.dtype)
    found = (input_ids.unfold(1, length, 1) == wanted).all(-1)
    return F.pad(found, (length - 1, 0))
