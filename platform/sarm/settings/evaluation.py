"""Held-out measurement and attribution."""

from dataclasses import dataclass

from sarm.settings.checks import check_least


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Held-out measurement and attribution."""

    top_features: int = 20
    """Features with the largest and with the smallest mean contribution that are reported."""
    contexts_per_feature: int = 8
    """Strongest contexts kept for each feature."""

    def __post_init__(self) -> None:
        check_least(self, "evaluation.", top_features=1, contexts_per_feature=1)
