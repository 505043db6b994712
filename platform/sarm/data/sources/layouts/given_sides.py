"""Layouts whose columns say which answer is the better one: `chosen` and `rejected`, and what others call them."""

from collections.abc import Callable, Sequence

from sarm.data.sources.conversations import Message
from sarm.data.sources.layouts.layout import Answers, Fault, Fields, Layout, has, present
from sarm.data.sources.layouts.prompts import (
    AROUND,
    answer_in,
    instruction_in,
    is_transcript,
    messages_in,
    prompt_in,
    split,
    turns_in,
    with_system,
)

_SIDES = (("chosen",), ("rejected",))
_CONVERSATION = ("conversations", "conversation", "messages", "trajectory")
# Where a question stands if there is no column `prompt`.
_QUESTIONS = ("instruction", "question", "input", "query")
_GIVEN = "as the columns say"


def _both(fields: Fields, kind: type) -> bool:
    return isinstance(fields.get("chosen"), kind) and isinstance(fields.get("rejected"), kind)


def _is_conversations(fields: Fields) -> bool:
    return _both(fields, list) and not _is_texts(fields)


def _is_texts(fields: Fields) -> bool:
    """Whether both sides are lists of texts; an empty one tells nothing."""
    sides = [fields["chosen"], fields["rejected"]] if _both(fields, list) else []
    return any(sides) and all(isinstance(text, str) for side in sides for text in side)


def _is_transcripts(fields: Fields) -> bool:
    is_split = fields.get("prompt") is None and not any(has(fields, name) for name in (*_QUESTIONS, *_CONVERSATION))
    return _both(fields, str) and is_split and is_transcript(fields["chosen"]) and is_transcript(fields["rejected"])


def _read_conversations(fields: Fields) -> Sequence[Answers]:
    chosen, rejected = messages_in(fields["chosen"]), messages_in(fields["rejected"])
    is_whole = bool(chosen) and chosen[0]["role"] != "assistant"
    # Beside a whole conversation a text is its first turn once more, in some spelling, and other columns are copies of it.
    columns = ("prompt", *_CONVERSATION, *_QUESTIONS)
    column = next((name for name in columns if has(fields, name)), None)
    if column is None or (is_whole and not (column == "prompt" and isinstance(fields["prompt"], list))):
        answers = split(chosen, rejected, [])
        if column == "prompt" and isinstance(fields["prompt"], str) and not _is_asked(fields["prompt"], answers.prompt):
            raise Fault("prompt_differs")
        return [answers._replace(prompt=with_system(answers.prompt, fields))]
    return [split(chosen, rejected, prompt_in(fields, column))]


def _is_asked(text: str, messages: Sequence[Message]) -> bool:
    """Whether a text is what some message says, in whole or in part, or a spelling of the conversation; spaces do not count."""
    said, turns = "".join(text.split()), ["".join(turn["content"].split()) for turn in messages]
    return not said or any(turn and (said in turn or turn in said) for turn in turns)


def _read_transcripts(fields: Fields) -> Sequence[Answers]:
    answers = split(turns_in(fields["chosen"]), turns_in(fields["rejected"]), [])
    return [answers._replace(prompt=with_system(answers.prompt, fields))]


def _read_lists(fields: Fields) -> Sequence[Answers]:
    prompt = prompt_in(fields, "prompt")
    found = [Answers(prompt, chosen, rejected) for chosen in fields["chosen"] for rejected in fields["rejected"]]
    if not found:
        raise Fault("empty_answer")
    return found


def _reader(
    prompt: Callable[[Fields], list[Message]], chosen: str, rejected: str
) -> Callable[[Fields], Sequence[Answers]]:
    """A reader of rows with one answer a side, each a text, a message or a list of one."""

    def read(fields: Fields) -> Sequence[Answers]:
        asked = prompt(fields)
        sides = {"chosen": fields.get(chosen), "rejected": fields.get(rejected)}
        return [Answers(asked, *(answer_in(present(sides, side)) for side in sides))]

    return read


def _asks(column: str | None) -> Callable[[Fields], bool]:
    """Whether a row has two sides of one answer each, and its question in this column (None: in none of them, or in `prompt`)."""

    def fits(fields: Fields) -> bool:
        if not _both(fields, str) or _is_transcripts(fields) or _has_messages(fields):
            return False
        named = "" if has(fields, "prompt") else next((name for name in _QUESTIONS if has(fields, name)), "")
        return named == (column or "")

    return fits


def _has_messages(fields: Fields) -> bool:
    return not has(fields, "prompt") and any(isinstance(fields.get(name), list) for name in _CONVERSATION)


def _is_beside_messages(fields: Fields) -> bool:
    sides = _both(fields, dict) or _both(fields, str)
    return sides and (_has_messages(fields) or _both(fields, dict))


def _asked_in(*names: str) -> Callable[[Fields], list[Message]]:
    return lambda fields: prompt_in(fields, *names)


def _read_openai(fields: Fields) -> Sequence[Answers]:
    asked = fields.get("input")
    tools = asked.get("tools") if isinstance(asked, dict) else None
    read = _reader(_asked_in("input"), "preferred_output", "non_preferred_output")
    return read({**fields, "tools": tools or fields.get("tools")})


def _read_two_outputs(fields: Fields) -> Sequence[Answers]:
    outputs = fields["output"]
    if len(outputs) != 2:
        raise Fault("not_two_answers")
    return [Answers(instruction_in(fields, "instruction"), *outputs)]


GIVEN_SIDES: tuple[Layout, ...] = (
    Layout(
        name="TRL, Skywork, UltraFeedback binarized, Tulu: conversations",
        rule=f"{_GIVEN}; conversations that share all but the last message. An explicit prompt goes before them unless they begin with it",
        needs=_SIDES,
        may_have=("prompt", *_CONVERSATION, *_QUESTIONS, *AROUND),
        fits=_is_conversations,
        read=_read_conversations,
    ),
    Layout(
        name="RewardBench 2, RM-Bench: lists of answers",
        rule="each chosen answer against each rejected one",
        needs=(("prompt",), *_SIDES),
        may_have=AROUND,
        fits=_is_texts,
        read=_read_lists,
    ),
    Layout(
        name="HH: transcripts",
        rule=f"{_GIVEN}; `Human:` and `Assistant:` turns that share all but the last",
        needs=_SIDES,
        may_have=AROUND,
        fits=_is_transcripts,
        read=_read_transcripts,
    ),
    Layout(
        name="TRL, RewardBench: prompt and two answers",
        rule=f"{_GIVEN}; the prompt is a text, a transcript or a conversation",
        needs=(("prompt",), *_SIDES),
        may_have=AROUND,
        fits=_asks(None),
        read=_reader(_asked_in("prompt"), "chosen", "rejected"),
    ),
    Layout(
        name="LLaMA-Factory ShareGPT, Axolotl: a conversation and two messages",
        rule=f"{_GIVEN}; answers are messages or texts behind the conversation",
        needs=((*_CONVERSATION, "prompt"), *_SIDES),
        may_have=(*_QUESTIONS, *AROUND),
        fits=_is_beside_messages,
        read=_reader(_asked_in("prompt", *_CONVERSATION, *_QUESTIONS), "chosen", "rejected"),
    ),
    Layout(
        name="LLaMA-Factory Alpaca",
        rule=f"{_GIVEN}; `input` stands below the instruction, `history` before it",
        needs=(("instruction",), *_SIDES),
        may_have=("input", "history", *AROUND),
        fits=_asks("instruction"),
        read=_reader(lambda fields: instruction_in(fields, "instruction"), "chosen", "rejected"),
    ),
    Layout(
        name="Orca DPO pairs",
        rule=_GIVEN,
        needs=(("question", "query"), *_SIDES),
        may_have=AROUND,
        fits=lambda fields: _asks("question")(fields) or _asks("query")(fields),
        read=_reader(_asked_in("question", "query"), "chosen", "rejected"),
    ),
    Layout(
        name="Distilabel Orca pairs",
        rule=_GIVEN,
        needs=(("input",), *_SIDES),
        may_have=AROUND,
        fits=_asks("input"),
        read=_reader(_asked_in("input"), "chosen", "rejected"),
    ),
    Layout(
        name="Argilla: chosen_response and rejected_response",
        rule=_GIVEN,
        needs=(("prompt", "instruction", "question", "input"), ("chosen_response",), ("rejected_response",)),
        may_have=AROUND,
        fits=lambda fields: has(fields, "chosen_response") or has(fields, "rejected_response"),
        read=_reader(_asked_in("prompt", "instruction", "question", "input"), "chosen_response", "rejected_response"),
    ),
    Layout(
        name="OpenAI preference fine-tuning",
        rule=_GIVEN,
        needs=(("input",), ("preferred_output",), ("non_preferred_output",)),
        may_have=AROUND,
        fits=lambda fields: has(fields, "preferred_output") or has(fields, "non_preferred_output"),
        read=_read_openai,
    ),
    Layout(
        name="Alpaca comparisons: two outputs",
        rule="the first output is the better one",
        needs=(("instruction",), ("output",)),
        may_have=("input", "history", *AROUND),
        fits=lambda fields: isinstance(fields.get("output"), list) and has(fields, "instruction"),
        read=_read_two_outputs,
    ),
)
