"""What is claimed, and what decides each claim. A claim is fixed before it is measured; `verdicts` says how it is decided."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.evidence import credits
from tests.evidence.verdicts import Measured

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""What the measured pieces of each study found."""


@dataclass(frozen=True)
class Claim:
    """`says` is a sentence that is true if the figure lies above `bound`. `study` is the beginning of the names of the pieces that decide it."""

    name: str
    says: str
    study: str
    figure: Callable[[Found], Measured | None]
    bound: float = 0.0
    unit: str = "points of accuracy"
    scale: float = 100.0
    """The figure is shown times this."""
    is_difference: bool = True
    paper: str = "-"
    trains: bool = True


_ALL = {
    "ours:sarm": "sarm",
    "ours:scalar_head": "scalar_head",
    "ours:scalar_head_full": "scalar_head_full",
    "ours:random_encoder": "random_encoder",
    "ours:random_linear": "random_linear",
    "unaware:sarm": "unaware",
    "papers:sarm": "papers",
}
TRAININGS = "trainings/demo"


def _minus(model: str, other: str) -> Callable[[Found], Measured | None]:
    return lambda found: credits.difference(credits.joined(found.get(TRAININGS, ()), _ALL), model, other)


def _accuracy(model: str) -> Callable[[Found], Measured | None]:
    return lambda found: credits.accuracy(credits.joined(found.get(TRAININGS, ()), _ALL), model)


CLAIMS = [
    Claim(
        name="sarm_ranks",
        says="A SARM ranks unseen answers better than a coin.",
        study=TRAININGS,
        figure=_accuracy("sarm"),
        bound=0.5,
        unit="% of pairs right",
        is_difference=False,
    ),
    Claim(
        name="sarm_as_good_as_scalar",
        says="A SARM ranks at most two points worse than a scalar head on the same truncated backbone.",
        study=TRAININGS,
        figure=_minus("sarm", "scalar_head"),
        bound=-0.02,
        paper="+1.8 on RewardBench 2, 4B against 8B (SARM, table 1)",
    ),
    Claim(
        name="sarm_above_scalar",
        says="A SARM ranks better than a scalar head on the same truncated backbone.",
        study=TRAININGS,
        figure=_minus("sarm", "scalar_head"),
    ),
    Claim(
        name="sarm_as_good_as_whole",
        says="A SARM ranks at most two points worse than a scalar head on the whole backbone.",
        study=TRAININGS,
        figure=_minus("sarm", "scalar_head_full"),
        bound=-0.02,
    ),
    Claim(
        name="pretrained_above_random",
        says="A pretrained dictionary ranks better than a random one that is treated alike.",
        study=TRAININGS,
        figure=_minus("sarm", "random_encoder"),
    ),
    Claim(
        name="pretrained_above_random_linear",
        says="A pretrained dictionary ranks better than the papers' own random baseline, a trained linear map.",
        study=TRAININGS,
        figure=_minus("sarm", "random_linear"),
        paper="+5.2 on RewardBench 2 (SARM, table 2)",
    ),
    Claim(
        name="turn_ends_above_papers",
        says="A dictionary of turn ends ranks better than one by the papers' recipe.",
        study=TRAININGS,
        figure=_minus("sarm", "papers"),
    ),
    Claim(
        name="aware_above_unaware",
        says="A dictionary that knows the reward's direction ranks better than one that does not.",
        study=TRAININGS,
        figure=_minus("sarm", "unaware"),
    ),
]
