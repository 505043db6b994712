"""When a claim counts as shown: by rules that were fixed before anything was measured.

A claim says that a figure lies above a bound (a difference above 0, an accuracy above one half, a difference that is no worse than -0.02).
It is decided by the figure's 95 % interval over prompts, and by nothing else:

shown           the whole interval lies above the bound
contradicted    the whole interval lies below it
not shown       the interval holds the bound
not measured    there are fewer than 40 prompts, fewer than 3 seeds where models are trained, or no figure
"""

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shown", "not shown", "contradicted", "not measured"]

MIN_PROMPTS, MIN_SEEDS = 40, 3
# Two-sided 5 %, and four of five studies that find what is there (Cohen 1988, section 1.4).
_Z_ALPHA, _Z_POWER = 1.959963984540054, 0.8416212335729143


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval; `seeds` 0 where nothing is trained."""

    value: float
    low: float
    high: float
    prompts: int
    seeds: int = 0


def verdict(found: Measured | None, bound: float, trains: bool) -> Verdict:
    """What the figure says of "above the bound"; `trains` for claims on trained models, which need several seeds."""
    if found is None or found.prompts < MIN_PROMPTS or (trains and found.seeds < MIN_SEEDS):
        return "not measured"
    if not all(map(math.isfinite, (found.value, found.low, found.high))):
        return "not measured"
    if found.low > bound:
        return "shown"
    return "contradicted" if found.high < bound else "not shown"


def smallest_seen(found: Measured) -> float:
    """The smallest distance from the bound that four of five such studies would have shown.

    The interval's half width stands for 1.96 standard errors: what is seen with power 0.8 is 2.8 of them.
    """
    return (found.high - found.low) / 2 * (_Z_ALPHA + _Z_POWER) / _Z_ALPHA
