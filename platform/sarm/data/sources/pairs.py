"""Preference pairs out of the sources that `--data.pairs` names, whatever their layout.

A layout is known by its columns:

- `chosen`, `rejected` as message lists that share all but the last message (Skywork, UltraFeedback binarized); lists of the
  answer alone take the prompt from a `prompt` column;
- `chosen`, `rejected` as strings and `prompt` as string or message list (also our own pairs/v1);
- `chosen`, `rejected` as strings of `Human:` and `Assistant:` turns without `prompt` (HH);
- `prompt`, `response_0`, `response_1` and `safer_response_id` or `better_response_id` (SafeRLHF).

`subset` (or `category`) and `margin` are carried over where they exist.
"""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from sarm.data.sources.conversations import Message, fault_of_content, fault_of_messages, read_messages
from sarm.data.sources.demo import demo_pairs
from sarm.data.sources.rows import (
    Reject,
    Row,
    data_set_rows,
    fault_of,
    file_rows,
    is_data_set,
    parquet_schema,
    source_files,
)
from sarm.data.sources.tiny import tiny_pairs
from sarm.settings.checks import UserError

MADE_IN_CODE = ("demo:harm", "tiny:pairs")

LAYOUTS = "chosen + rejected (+ prompt), or prompt + response_0 + response_1 + safer_response_id"
_SAFE_RLHF = ("prompt", "response_0", "response_1")
_SAFER_IDS = ("safer_response_id", "better_response_id")
_COLUMNS = ("prompt", "chosen", "rejected", *_SAFE_RLHF[1:], *_SAFER_IDS, "subset", "category", "margin")

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[^\S\n]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# A few odd rows may open a file, but columns that none of these have are columns of another kind of data.
_PEEKED_ROWS = 20


class RawPair(NamedTuple):
    """One preference: the messages before the answers, the better and the worse answer, and where they are from."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str
    subset: str | None
    margin: float | None


class _Fault(Exception):  # noqa: N818 - a row's reason word on its way to a Reject, seen nowhere else
    """Why a row is no pair."""


def check_source(spec: str) -> None:
    """The cheap checks of a source: its files exist, have a known extension, and the columns of a known layout.

    Raises UserError.
    """
    for path in source_files(spec, MADE_IN_CODE):
        if path.name.endswith(".parquet"):
            _require_layout(str(path), parquet_schema(path).names)
        else:
            _require_layout_of_first(str(path), list(islice(file_rows(path), _PEEKED_ROWS)))


def open_pairs(spec: str, limit: int | None = None) -> Iterator[RawPair | Reject]:
    """The pairs of one source in order, at most `limit` of them, and a `Reject` for each row that is no usable pair.

    `spec` is a path or glob of .jsonl, .jsonl.gz, .jsonl.zst or .parquet files, `hf:NAME[:SPLIT]`, `demo:harm` or `tiny:pairs`.
    Reasons: those of a row (`bad_json`, `not_an_object`, `invalid_utf8`, `corrupt_file`), of a string (`not_text`,
    `nul_byte`, `lone_surrogate`), of a content (`too_long`, `already_templated`: a rendered conversation, in whatever template), and `no_chosen`, `no_rejected`, `no_prompt`, `no_preference`, `empty_prompt`,
    `empty_answer`, `equal_answers`, `prompt_differs`, `bad_roles`.
    Raises UserError, before the first pair, for a source that does not exist or whose columns fit no layout.
    """
    check_source(spec)
    return _pairs(spec, limit)


def parse_pair(fields: dict[str, Any], source: str) -> RawPair | str:
    """The pair in one row, or the reason word why it is none."""
    try:
        prompt, chosen, rejected = _read(fields)
        _check(prompt, chosen, rejected)
    except _Fault as fault:
        return str(fault)
    subset = fields.get("subset", fields.get("category"))
    return RawPair(prompt, chosen, rejected, source, subset if _is_clean(subset) else None, _margin(fields))


def _pairs(spec: str, limit: int | None) -> Iterator[RawPair | Reject]:
    kept = 0
    for row in _rows(spec):
        if isinstance(row, Reject):
            yield row
            continue
        pair = parse_pair(row.fields, spec)
        kept += isinstance(pair, RawPair)
        yield Reject(pair, row.where) if isinstance(pair, str) else pair
        if kept == limit:
            return


def _rows(spec: str) -> Iterator[Row | Reject]:
    if spec in MADE_IN_CODE:
        made: Iterable[dict[str, Any] | Reject] = tiny_pairs() if spec == "tiny:pairs" else demo_pairs()
        for number, fields in enumerate(made):
            yield fields if isinstance(fields, Reject) else Row(fields, f"{spec} row {number}")
    elif is_data_set(spec):
        rows = data_set_rows(spec)
        first = list(islice(rows, _PEEKED_ROWS))
        _require_layout_of_first(spec, first)
        yield from first
        yield from rows
    else:
        for path in source_files(spec, MADE_IN_CODE):
            columns = None
            if path.name.endswith(".parquet"):
                columns = [name for name in parquet_schema(path).names if name in _COLUMNS]
            yield from file_rows(path, columns)


def _require_layout_of_first(where: str, rows: Iterable[Row | Reject]) -> None:
    columns = list(dict.fromkeys(name for row in rows if isinstance(row, Row) for name in row.fields))
    # Nothing readable at all is counted by the reader, not judged by columns.
    if columns:
        _require_layout(where, columns)


def _require_layout(where: str, columns: Iterable[str]) -> None:
    names = set(columns)
    if not {"chosen", "rejected"} <= names and not (names.issuperset(_SAFE_RLHF) and names.intersection(_SAFER_IDS)):
        raise UserError(f"{where} holds no preference pairs: it has {', '.join(columns)}, expected {LAYOUTS}.")


def _read(fields: dict[str, Any]) -> tuple[list[Message], str, str]:
    if "chosen" not in fields and "response_0" in fields:
        return _read_safe_rlhf(fields)
    chosen, rejected = _present(fields, "chosen"), _present(fields, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split(_messages(chosen), _messages(rejected), fields)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _Fault("not_text")
    if fields.get("prompt") is None and _HH_TURN.match(chosen) and _HH_TURN.match(rejected):
        return _split(_turns(chosen), _turns(rejected), fields)
    return _prompt(fields), chosen, rejected


def _read_safe_rlhf(fields: dict[str, Any]) -> tuple[list[Message], str, str]:
    safer = next((fields[name] for name in _SAFER_IDS if fields.get(name) is not None), None)
    if safer not in (0, 1):
        raise _Fault("no_preference")
    answers = {
        "chosen": fields.get(f"response_{int(safer)}"),
        "rejected": fields.get(f"response_{1 - int(safer)}"),
    }
    return _prompt(fields), _present(answers, "chosen"), _present(answers, "rejected")


def _split(chosen: list[Message], rejected: list[Message], fields: dict[str, Any]) -> tuple[list[Message], str, str]:
    """The shared prompt and the two answers of two conversations."""
    if not chosen or not rejected:
        raise _Fault("empty_answer")
    if chosen[:-1] != rejected[:-1]:
        raise _Fault("prompt_differs")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise _Fault("bad_roles")
    prompt = chosen[:-1] or (_prompt(fields) if fields.get("prompt") is not None else [])
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _prompt(fields: dict[str, Any]) -> list[Message]:
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
    found = read_messages(items)
    if isinstance(found, str):
        raise _Fault(found)
    return found


def _present(fields: dict[str, Any], name: str) -> Any:
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


def _margin(fields: dict[str, Any]) -> float | None:
    margin = fields.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        return None
    return float(margin)
