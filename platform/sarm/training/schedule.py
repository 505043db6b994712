"""Learning-rate factors as functions of the share of a phase's samples seen, so they survive restarts and other worker counts."""

import math


def trapezoid(share: float, warmup_share: float, decay_share: float) -> float:
    """0 up to 1 over the warm-up, 1, then down to 0 over the decay (SAFER's intended SAE schedule)."""
    if share < warmup_share:
        return share / warmup_share
    return min(1.0, (1.0 - share) / decay_share) if decay_share > 0 else 1.0


def warmup_cosine(share: float, warmup_share: float) -> float:
    """0 up to 1 over the warm-up, then a half cosine down to 0."""
    if share < warmup_share:
        return share / warmup_share
    return 0.5 * (1.0 + math.cos(math.pi * (share - warmup_share) / (1.0 - warmup_share)))
