"""Figures as JSON."""

import math
from dataclasses import dataclass, field

from sarm.contracts.figures import OPTIONAL, SPREAD, plain_values


@dataclass(frozen=True)
class Mean:
    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    num_pairs: int
    mean: Mean | None = field(metadata=SPREAD)
    note: str | None = field(default=None, metadata=OPTIONAL)
    share: float | None
    by_subset: dict[str, Mean]


def test_fields_keep_their_order_and_spread_ones_their_place():
    mean = Mean(1.5, (1.0, math.inf))
    found = plain_values([Measured(num_pairs=3, mean=mean, share=None, by_subset={"b": mean, "a": mean})])
    expected = {"num_pairs": 3, "value": 1.5, "ci95": [1.0, math.inf], "share": None}
    own = {"value": 1.5, "ci95": [1.0, math.inf]}
    assert found == [expected | {"by_subset": {"b": own, "a": own}}]
    assert list(found[0]) == ["num_pairs", "value", "ci95", "share", "by_subset"]
    assert list(found[0]["by_subset"]) == ["b", "a"]


def test_optional_and_spread_figures_without_a_value_have_no_key():
    assert plain_values(Measured(num_pairs=0, mean=None, note="no pair", share=None, by_subset={})) == {
        "num_pairs": 0, "note": "no pair", "share": None, "by_subset": {},
    }  # fmt: skip
