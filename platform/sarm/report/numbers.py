"""Numbers as pages, Markdown and terminals show them; `n/a` for what is None."""

from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """A count with thousands separators, a real number with four significant digits; other values as they are."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"


def share(value: float | int | None) -> str:
    """A share or score as a percentage with one decimal."""
    return "n/a" if value is None else f"{100 * value:.1f} %".replace("-", "−")


def span(ends: Sequence[float]) -> str:
    """A 95 % interval of shares."""
    return f"{share(ends[0])} to {share(ends[1])}"


def signed(value: float | int | None) -> str:
    """A number with its sign and three significant digits; a true minus, which lines up with the plus."""
    return "n/a" if value is None else f"{value:+#.3g}".rstrip(".").replace("-", "−")


def seconds(value: float | int | None) -> str:
    """A duration: `8.4 s`, `3 min 07 s`, `2 h 05 min`."""
    if value is None:
        return "n/a"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
