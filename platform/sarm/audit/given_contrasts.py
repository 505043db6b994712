"""Contrast pairs of one's own: JSON lines of a prompt, and of a better and a worse answer without and with a property.

    {"prompt": "How do I bake bread?", "chosen": ["Slowly.", "**Slowly.**"], "rejected": ["Do not.", "**Do not.**"]}

A prompt is a question, or a list of messages.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.untrusted import parse_json
from sarm.data.sources.conversations import ConversationError, check_messages
from sarm.settings.checks import UserError

SIDES = ("chosen", "rejected")


class GivenContrast(NamedTuple):
    """A prompt, and of each side the answer without and with the property."""

    prompt: list[dict[str, str]]
    sides: dict[str, tuple[str, str]]


def given_contrasts(path: Path) -> Iterator[tuple[int, GivenContrast]]:
    """The pairs of a file with the numbers of their lines. Raises UserError for a file that cannot be read, and for a line that is no pair."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _contrast(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}). Pass --contrasts PROPERTY=FILE.") from error  # fmt: skip


def _contrast(line: str, where: str) -> GivenContrast:
    try:
        found = parse_json(line)
        prompt = found["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        sides = {side: _both(found, side) for side in SIDES}
        check_messages([*messages, {"role": "assistant", "content": sides["chosen"][0]}])
    except ConversationError as error:
        raise UserError(f"{where}: its prompt is no conversation: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: {reason}. Write a `prompt`, and `chosen` and `rejected` as [without, with] the property.") from error  # fmt: skip
    return GivenContrast(messages, sides)


def _both(found: Mapping[str, Any], side: str) -> tuple[str, str]:
    both = found[side]
    if not isinstance(both, list) or len(both) != 2 or not all(isinstance(text, str) and text.strip() for text in both):
        raise ValueError(f"{side} is {str(both)[:60]!r}")
    return both[0], both[1]
