"""Layouts of preference data: how a row of a source says which of two answers is better. One entry in `LAYOUTS` each.

`subset` (or `category`) and `margin` are carried over where they exist.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from sarm.data.sources.conversations import Message, fault_of, fault_of_content, fault_of_messages, read_messages

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[^\S\n]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SAFER_IDS = ("safer_response_id", "better_response_id")
_CARRIED = ("subset", "category", "margin")


class RawPair(NamedTuple):
    """One preference: the messages before the answers, the better and the worse answer, and where they are from."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str
    subset: str | None
    margin: float | None


class Answers(NamedTuple):
    """The messages before the answers, the better and the worse answer; whether they are texts is checked afterwards."""

    prompt: list[Message]
    chosen: Any
    rejected: Any


class Layout(NamedTuple):
    """A way of writing preferences down. No row fits two."""

    needs: tuple[tuple[str, ...], ...]
    """Columns that a source has; of columns in one bracket, one is enough."""
    may_have: tuple[str, ...]
    """Other columns that are read."""
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether a row is written so."""
    read: Callable[[Mapping[str, Any]], Answers]
    """A fitting row's preference. Raises _Fault with the reason word."""


class _Fault(Exception):  # noqa: N818 - a row's reason word on its way to a Reject, seen nowhere else
    """Why a row is no pair."""


def parse_pair(fields: Mapping[str, Any], source: str) -> RawPair | str:
    """The pair in one row, or the reason word why it is none."""
    try:
        layout = next((layout for layout in LAYOUTS if layout.fits(fields)), None)
        if layout is None:
            _present(fields, "chosen")
            _present(fields, "rejected")
            return "not_text"
        prompt, chosen, rejected = layout.read(fields)
        _check(prompt, chosen, rejected)
    except _Fault as fault:
        return str(fault)
    subset = fields.get("subset", fields.get("category"))
    return RawPair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source=source,
        subset=subset if _is_clean(subset) else None,
        margin=_margin(fields),
    )


def layouts_in_words() -> str:
    """The columns of all layouts."""
    return ", or ".join(
        dict.fromkeys(
            " + ".join(names[0] for names in layout.needs) + "".join(f" (+ {name})" for name in layout.may_have)
            for layout in LAYOUTS
        )
    )


def has_layout(columns: Collection[str]) -> bool:
    """Whether a source with these columns holds preferences in a known layout."""
    return any(all(not set(names).isdisjoint(columns) for names in layout.needs) for layout in LAYOUTS)


def read_columns(columns: Iterable[str]) -> list[str]:
    """Those of the columns that a layout may read."""
    known = {name for layout in LAYOUTS for names in (*layout.needs, layout.may_have) for name in names}
    return [name for name in columns if name in known or name in _CARRIED]


def _both(fields: Mapping[str, Any], kind: type) -> bool:
    return isinstance(fields.get("chosen"), kind) and isinstance(fields.get("rejected"), kind)


def _is_human_assistant(fields: Mapping[str, Any]) -> bool:
    if not _both(fields, str) or fields.get("prompt") is not None:
        return False
    return all(_HH_TURN.match(fields[side]) for side in ("chosen", "rejected"))


def _read_responses(fields: Mapping[str, Any]) -> Answers:
    safer = next((fields[name] for name in _SAFER_IDS if fields.get(name) is not None), None)
    if safer not in (0, 1):
        raise _Fault("no_preference")
    answers = {
        "chosen": fields.get(f"response_{int(safer)}"),
        "rejected": fields.get(f"response_{1 - int(safer)}"),
    }
    return Answers(_prompt(fields), _present(answers, "chosen"), _present(answers, "rejected"))


_ANSWERS = (("chosen",), ("rejected",))
LAYOUTS: tuple[Layout, ...] = (
    # Message lists that share all but the last message (Skywork, UltraFeedback binarized); lists of the answer alone take the
    # prompt from its column.
    Layout(
        needs=_ANSWERS,
        may_have=("prompt",),
        fits=lambda fields: _both(fields, list),
        read=lambda fields: _split(_messages(fields["chosen"]), _messages(fields["rejected"]), fields),
    ),
    # Texts of `Human:` and `Assistant:` turns without a prompt (HH).
    Layout(
        needs=_ANSWERS,
        may_have=("prompt",),
        fits=_is_human_assistant,
        read=lambda fields: _split(_turns(fields["chosen"]), _turns(fields["rejected"]), fields),
    ),
    # Two answers and a prompt, which is a text or a message list (also our own pairs/v1).
    Layout(
        needs=_ANSWERS,
        may_have=("prompt",),
        fits=lambda fields: _both(fields, str) and not _is_human_assistant(fields),
        read=lambda fields: Answers(_prompt(fields), fields["chosen"], fields["rejected"]),
    ),
    # SafeRLHF.
    Layout(
        needs=(("prompt",), ("response_0",), ("response_1",), _SAFER_IDS),
        may_have=(),
        fits=lambda fields: "chosen" not in fields and "response_0" in fields,
        read=_read_responses,
    ),
)


def _split(chosen: list[Message], rejected: list[Message], fields: Mapping[str, Any]) -> Answers:
    """The shared prompt and the two answers of two conversations."""
    if not chosen or not rejected:
        raise _Fault("empty_answer")
    if chosen[:-1] != rejected[:-1]:
        raise _Fault("prompt_differs")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise _Fault("bad_roles")
    prompt = chosen[:-1] or (_prompt(fields) if fields.get("prompt") is not None else [])
    return Answers(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _prompt(fields: Mapping[str, Any]) -> list[Message]:
    prompt = _present(fields, "prompt")
    if isinstance(prompt, list):
        return _messages(prompt)
    if not isinstance(prompt, str):
        raise _Fault("not_text")
    if _HH_TURN.match(prompt):
        turns = _turns(prompt)
        # The open turn of the answer to come.
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    return [{"role": "user", "content": prompt}]


def _turns(text: str) -> list[Message]:
    # re.split with one group: "", role, content, role, content, ...
    parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _messages(items: list[Any]) -> list[Message]:
    messages = read_messages(items)
    if isinstance(messages, str):
        raise _Fault(messages)
    return messages


def _present(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise _Fault(f"no_{name}")
    return fields[name]


def _check(prompt: list[Message], chosen: Any, rejected: Any) -> None:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _Fault("not_text")
    if not prompt:
        raise _Fault("empty_prompt")
    if prompt[-1]["role"] != "user":
        raise _Fault("bad_roles")
    if reason := fault_of_messages(prompt):
        raise _Fault("empty_prompt" if reason == "empty" else reason)
    for answer in (chosen, rejected):
        if reason := fault_of_content(answer):
            raise _Fault("empty_answer" if reason == "empty" else reason)
    if chosen.strip() == rejected.strip():
        raise _Fault("equal_answers")


def _is_clean(subset: Any) -> bool:
    return isinstance(subset, str) and fault_of(subset) is None


def _margin(fields: Mapping[str, Any]) -> float | None:
    margin = fields.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        return None
    return float(margin)
