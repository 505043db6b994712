"""Estimates in words: two figures, and a unit that fits. More figures than that would claim to be known."""

_UNITS = ((365 * 86400.0, "years"), (2 * 86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def rounded(value: float) -> str:
    """Two significant figures, without an exponent: 4.9, 35, 410, 1,200, 0.02."""
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        return "< 0.01"
    two = float(f"{value:.2g}")
    return f"{two:,.0f}" if abs(two) >= 10 else f"{two:g}"


def about(value: float) -> str:
    """`about 4.9`, `less than 0.01`."""
    return "less than 0.01" if 0 < abs(value) < 0.01 else f"about {rounded(value)}"


def duration(seconds: float | None) -> str:
    """`40 s`, `12 min`, `4.9 h`, `3.2 days`."""
    if seconds is None:
        return "unknown"
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{rounded(seconds / (86400 if unit == 'days' else size))} {unit}"
    return f"{max(1, round(float(f'{seconds:.2g}')))} s"


def size(gigabytes: float | None) -> str:
    """`3 MB`, `5.2 GB`, `1.2 TB`."""
    if gigabytes is None:
        return "unknown"
    for scale, unit in ((1e3, "TB"), (1.0, "GB"), (1e-3, "MB")):
        if gigabytes >= scale:
            return f"{rounded(gigabytes / scale)} {unit}"
    return "< 1 MB" if gigabytes else "-"


def count(number: float) -> str:
    """`600`, `87,000`, `1.3 million`, `15 billion`."""
    for scale, word in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{rounded(number / scale)} {word}"
    return rounded(number) if number >= 10_000 else f"{number:,.0f}"
