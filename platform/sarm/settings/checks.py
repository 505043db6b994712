"""Checks of a user's settings, and the error that says in one line what to mend."""

import math

# Work in which nothing happens ends within 300 s, looking included; Ray and torch would let it hang for half an hour.
NO_PROGRESS_SECONDS = 290.0
# Before its first block a pass may boot nodes, pull images and load models. Where nothing there gives a sign of life, this is the limit.
NO_START_SECONDS = 1800.0

# Fields with this metadata say how a job runs, not what comes out.
OPERATIONAL = {"operational": True}
# Fields with this metadata decide nothing at their default: what was made before there were such fields stays what it is.
ABSENT_AT_DEFAULT = {"absent_at_default": True}


class UserError(ValueError):
    """A mistake that the user can mend: shown as one line, exit status 2."""


class StalledError(Exception):
    """Work in which nothing has happened for too long, with the cause as far as it can be seen: the same command may succeed, exit status 75."""


class StoppedError(Exception):
    """Work that was asked to stop and has: the same command goes on with it, exit status 75."""


def check(section: object, flag: str, holds: bool, must_be: str) -> None:
    """Raise UserError unless the condition holds; `flag` ends in the name of the field that it is about."""
    if not holds:
        name = flag.rpartition(".")[2]
        got = getattr(section, name)
        raise UserError(f"{name} must be {must_be}, got {got!r}. Pass --{flag.replace('_', '-')}.")


def check_least(section: object, flags: str, **least: int) -> None:
    """Fields that must be unset or have at least the given value; `flags` is how their flags begin."""
    for name, smallest in least.items():
        value = getattr(section, name)
        check(section, flags + name, value is None or value >= smallest, f"at least {smallest}")


def check_tokens(section: object, flag: str) -> None:
    """A number of tokens a pass: 0, which leaves it to the device's memory, or at least 64."""
    tokens = getattr(section, flag.rpartition(".")[2])
    check(section, flag, tokens == 0 or tokens >= 64, "0 or at least 64")


def check_rate(section: object, flag: str, *, zero_allowed: bool = False) -> None:
    """A field that must be a finite number above 0 (or at least 0)."""
    rate = getattr(section, flag.rpartition(".")[2])
    check(section, flag, math.isfinite(rate) and (rate > 0 or (zero_allowed and rate == 0)), "finite and above 0")
