"""Segments of rows of tokens, and who sees whom; `sarm.nn.backbone` says what they are. B rows, L columns."""

import torch
from torch import Tensor

# More answers to one prompt, or more branches of one of them, do not fit a row.
ANSWERS_PER_BLOCK = 1 << 16
SEGMENTS_PER_BLOCK = ANSWERS_PER_BLOCK << 16


def visible(positions: Tensor, segments: Tensor, window: int | None) -> Tensor:
    """[B, L, L] of whether row i may look at column j."""
    order = torch.arange(segments.shape[1], device=segments.device)
    own, answer, prompt = (x[:, :, None] == segments[:, None, :].long() for x in seen_segments(segments))
    # No answer's number and no prompt's is that of a branch: nobody but itself sees one.
    seen = (order[:, None] >= order[None, :]) & (own | answer | prompt)
    if window is not None:
        seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
    return seen


def visible_from(segments_L: Tensor, column: int) -> Tensor:
    """[L] of what the token in this column of a row sees."""
    seen = torch.stack([number[column] for number in seen_segments(segments_L)])
    order = torch.arange(len(segments_L), device=segments_L.device)
    return (order <= column) & torch.isin(segments_L.long(), seen)


def seen_segments(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The segments that each token sees up to itself: its own, its answer's if it is a branch's, and its prompt's."""
    segments = segments.long()
    in_block = segments % SEGMENTS_PER_BLOCK
    return segments, segments - in_block + in_block % ANSWERS_PER_BLOCK, segments - in_block
