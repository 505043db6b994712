"""What `jobs/prepare_data.py --inspect` prints: what a source is taken for, its rows by reason, and examples as a model reads them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sarm.data.sources.inspection import Example, Seen, inspect_source, rule_of
from sarm.data.sources.pair_notes import has_names, truncation_note
from sarm.data.sources.shown_text import clean_text, one_line
from sarm.data.sources.tool_turns import MORE
from sarm.settings.data import DataSettings
from sarm.settings.inspection import Inspecting, Template
from sarm.settings.model import ModelSettings

_OPEN, _CLOSE = "⟦", "⟧"
# Characters of an example: its beginning, and its end, where the reward is read.
_BEGINNING, _END = 300, 300
_COLUMNS_SHOWN = 30


class Read(NamedTuple):
    """A conversation as a model reads it: its text without the rewarded token, that token, and whether it lost its beginning."""

    text: str
    rewarded: str
    truncated: bool
    has_names: bool = True
    """Whether the template writes the names of those who speak."""


Render = Callable[[Sequence[dict[str, str]], str], Read]


def inspect(settings: Inspecting) -> None:
    """Print it. Raises UserError for a source that cannot be read."""
    try:
        _inspect(settings)
    except BrokenPipeError:
        # `| head` has seen enough. What is still in the buffer must go nowhere too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _inspect(settings: Inspecting) -> None:
    columns = DataSettings(columns=settings.data.columns).column_names
    seen = inspect_source(settings.inspect, columns, settings.data.text_field, settings.rows)
    print("\n".join([*_about(settings.inspect, seen), *_rows(seen)]), flush=True)
    render = _of_model(settings.model) if settings.model.name else _chat_ml
    is_chat = any(not isinstance(example.messages, str) for example in seen.examples)
    if settings.model.name and is_chat:
        _line("template", _of_template(seen, render, settings.model))
    if settings.examples and seen.examples:
        how = settings.model.name or "a plain ChatML template; --model.name shows the model's own"
        print(f"\nexamples  by {how}; {_OPEN}rewarded token{_CLOSE}" if is_chat else "\nexamples")
    for number, example in enumerate(_one_a_row(seen.examples)[: settings.examples], start=1):
        print("\n".join(_shown(number, example, render)), flush=True)


def _one_a_row(examples: Sequence[Example]) -> list[Example]:
    """The first pair of each row, then the others: one row with many answers would fill the screen."""
    first: list[Example] = []
    others: list[Example] = []
    rows: set[str] = set()
    for example in examples:
        (others if example.where and example.where in rows else first).append(example)
        rows.add(example.where)
    return first + others


def _about(spec: str, seen: Seen) -> list[str]:
    more = len(seen.columns) - _COLUMNS_SHOWN
    columns = ", ".join(one_line(name) for name in seen.columns[:_COLUMNS_SHOWN]) + (
        f" and {more} more" if more > 0 else ""
    )
    kind = (
        "preferences"
        if seen.is_pairs
        else "texts"
        if not seen.examples or isinstance(seen.examples[0].messages, str)
        else "conversations"
    )
    lines = [
        ("source", spec),
        ("container", seen.container),
        ("columns", columns or "made in code"),
        ("taken for", kind),
    ]
    for name, number in seen.layouts.most_common():
        lines += [("layout", f"{name} ({number:,} rows)"), ("", f"chosen: {rule_of(name)}")]
    return [_lined(*line) for line in lines]


def _rows(seen: Seen) -> list[str]:
    looked = (
        f"{seen.num_rows:,}, all that there are" if seen.is_whole else f"the first {seen.num_rows:,} were looked at"
    )
    lines = [("rows", looked)]
    lines.append(("used", f"{seen.num_used:,} rows" + (f", {seen.num_pairs:,} pairs" if seen.is_pairs else "")))
    lines.append(("rejected", f"{sum(seen.rejected.values()):,} rows"))
    lines += [
        ("", f"{number:,} {reason}, first {one_line(seen.first[reason])}")
        for reason, number in seen.rejected.most_common()
    ]
    if seen.left_out:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in seen.left_out.most_common())
        lines.append(("left out", f"answers of rows that are used otherwise: {reasons}"))
    if seen.notes.longer_share is not None:
        lines.append(
            ("length", f"the longer answer is chosen in {seen.notes.longer_share:.1%} of {seen.notes.unequal:,} pairs")
        )
    lines += [("note", sentence) for sentence in seen.notes.sentences()]
    return [_lined(*line) for line in lines]


def _of_template(seen: Seen, render: Render, model: Template) -> str:
    """How many answers the template refuses, and how many lose their beginning."""
    from sarm.data.sources.conversations import ConversationError

    refused: Counter[str] = Counter()
    truncated = total = nameless = 0
    for example in seen.examples:
        if isinstance(example.messages, str):
            continue
        prompt, answer = example.messages[:-1], example.messages[-1]["content"]
        for text in (answer, *([example.rejected] if example.rejected is not None else [])):
            try:
                read = render(prompt, text)
                truncated += read.truncated
                nameless += has_names(prompt) and not read.has_names
                total += 1
            except ConversationError as error:
                refused[error.reason] += 1
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in refused.most_common())
    note = truncation_note(truncated, total, model.max_length)
    return (
        f"{total:,} answers encoded, {truncated:,} cut at {model.max_length:,} tokens; refused: {reasons or 'none'}"
        + (f"\n          {nameless:,} have messages with a name, which the template does not write" if nameless else "")
        + (f"\n          {note}" if note else "")
    )


def _shown(number: int, example: Example, render: Render) -> list[str]:
    from sarm.data.sources.conversations import ConversationError

    where = f"  {one_line(example.where)}" if example.where else ""
    lines = [f"\n[{number}]{where}"]
    if isinstance(example.messages, str):
        return [*lines, _short(example.messages)]
    prompt, answer = example.messages[:-1], example.messages[-1]["content"]
    sides = (
        [("chosen", answer), ("rejected", example.rejected)] if example.rejected is not None else [("answer", answer)]
    )
    for side, text in sides:
        try:
            read = render(prompt, text or "")
            cut = " (its beginning is cut off)" if read.truncated else ""
            lines += [f"--- {side}{cut}", f"{_short(read.text)}{_OPEN}{clean_text(read.rewarded)}{_CLOSE}"]
        except ConversationError as error:
            lines += [f"--- {side}: {error.reason}", one_line(str(error))]
    return lines


def _short(text: str) -> str:
    text = clean_text(text)
    return text if len(text) <= _BEGINNING + _END else f"{text[:_BEGINNING]} … {text[-_END:]}"


def _chat_ml(prompt: Sequence[dict[str, str]], answer: str) -> Read:
    turns = "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}{turn.get(MORE) or ''}<|im_end|>\n" for turn in prompt
    )
    return Read(f"{turns}<|im_start|>assistant\n{answer}", "<|im_end|>", False)


def _of_model(model: Template) -> Render:
    """By the model's own tokenizer, as every stage reads conversations."""
    from sarm.data.formats.models import model_folder
    from sarm.data.tokens.chat import load_chat_tokenizer
    from sarm.data.tokens.said_beside import NAMES

    settings = ModelSettings(
        name=model.name,
        revision=model.revision,
        max_length=model.max_length,
        system_prompt=model.system_prompt,
        chat_template=model.chat_template,
    )
    chat = load_chat_tokenizer(settings, model_folder(settings))
    decode: Any = chat.tokenizer.decode

    def render(prompt: Sequence[dict[str, str]], answer: str) -> Read:
        (tokens,) = chat.encode_responses(prompt, [answer])
        return Read(decode(tokens.ids[:-1]), decode(tokens.ids[-1:]), tokens.num_truncated > 0, NAMES in chat.says)

    return render


def _lined(name: str, text: str) -> str:
    return f"{name:<10}{text}"


def _line(name: str, text: str) -> None:
    print(_lined(name, text), flush=True)
