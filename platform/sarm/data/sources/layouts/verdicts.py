"""Layouts with two answers and a verdict between them: a name, a number or a vote. A tie, or no verdict, is `no_preference`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sarm.data.sources.conversations import Message
from sarm.data.sources.layouts.layout import Answers, Fault, Fields, Layout, has, number_of, present
from sarm.data.sources.layouts.prompts import (
    AROUND,
    answer_in,
    instruction_in,
    json_list,
    messages_in,
    prompt_in,
    split,
    with_system,
)

_SAFER_IDS = ("safer_response_id", "better_response_id")
_FIRST = frozenset(("a", "model_a", "response_a", "answer_a", "a>b", "a>>b", "first", "output_1", "left"))
_SECOND = frozenset(("b", "model_b", "response_b", "answer_b", "b>a", "b>>a", "second", "output_2", "right"))


def _in_order(fields: Fields, prompt: list[Message], columns: Sequence[str], better: int | None) -> Sequence[Answers]:
    """The answers in these two columns, the better one (0 or 1) first. Raises Fault."""
    if better is None:
        raise Fault("no_preference")
    sides = {"chosen": fields.get(columns[better]), "rejected": fields.get(columns[1 - better])}
    return [Answers(prompt, *(answer_in(present(sides, side)) for side in sides))]


def _by_number(value: Any, first: float, second: float) -> int | None:
    number = number_of(int(value) if isinstance(value, bool) else value)
    return {first: 0, second: 1}.get(number) if number is not None else None


def _by_sign(value: Any) -> int | None:
    """Below zero the first is better, above it the second."""
    number = number_of(value)
    return None if not number else int(number > 0)


def _by_name(value: Any) -> int | None:
    said = value.strip().lower().strip("[]") if isinstance(value, str) else ""
    return 0 if said in _FIRST else 1 if said in _SECOND else None


def _by_scores(fields: Fields, columns: Sequence[str]) -> int | None:
    first, second = (number_of(fields.get(name)) for name in columns)
    return None if first is None or second is None or first == second else int(second > first)


def _two(fields: Fields, columns: Sequence[str]) -> bool:
    return any(has(fields, name) for name in columns)


def _simple(
    name: str,
    rule: str,
    question: tuple[str, ...],
    columns: tuple[str, str],
    verdict: tuple[str, ...],
    better: Callable[[Any], int | None],
    asked: Callable[[Fields], list[Message]] | None = None,
    may_have: tuple[str, ...] = (),
) -> Layout:
    """A layout whose verdict is the first of some columns that has a value."""

    def read(fields: Fields) -> Sequence[Answers]:
        said = next((fields[column] for column in verdict if fields.get(column) is not None), None)
        prompt = asked(fields) if asked else prompt_in(fields, *question)
        return _in_order(fields, prompt, columns, better(said))

    return Layout(
        name=name,
        rule=rule,
        needs=(question, (columns[0],), (columns[1],), verdict),
        may_have=(*may_have, *AROUND),
        fits=lambda fields: _two(fields, columns) and any(column in fields for column in verdict),
        read=read,
    )


def _read_two_conversations(fields: Fields) -> Sequence[Answers]:
    better = _by_name(fields.get("winner"))
    if better is None:
        raise Fault("no_preference")
    both = [messages_in(json_list(present(fields, name))) for name in ("conversation_a", "conversation_b")]
    return [_behind_system(split(both[better], both[1 - better], []), fields)]


def _read_votes(fields: Fields) -> Sequence[Answers]:
    """Turns of the user and of two models, in lists; what the models said before the last turn has to be the same."""
    votes = [_by_number(fields.get(f"winner_model_{side}"), 0, 1) for side in "ab"]
    if sorted(vote or 0 for vote in votes) != [0, 1]:
        raise Fault("no_preference")
    asked, *answers = (json_list(present(fields, name)) for name in ("prompt", "response_a", "response_b"))
    texts = [value if isinstance(value, list) else [value] for value in (asked, *answers)]
    if len({len(turns) for turns in texts}) != 1 or not texts[0]:
        raise Fault("prompt_differs")
    if not all(isinstance(text, str) for turns in texts for text in turns):
        raise Fault("null_content" if any(text is None for turns in texts for text in turns) else "not_text")
    both = [
        [message for ask, answer in zip(texts[0], side, strict=True) for message in (_turn("user", ask), _turn("assistant", answer))]
        for side in texts[1:]
    ]  # fmt: skip
    better = votes.index(1)
    return [_behind_system(split(both[better], both[1 - better], []), fields)]


def _behind_system(answers: Answers, fields: Fields) -> Answers:
    return answers._replace(prompt=with_system(answers.prompt, fields))


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _read_web_gpt(fields: Fields) -> Sequence[Answers]:
    question = fields.get("question")
    asked = {"question": question.get("full_text") if isinstance(question, Mapping) else question}
    better = _by_scores(fields, ("score_0", "score_1"))
    return _in_order(fields, prompt_in({**fields, **asked}, "question"), ("answer_0", "answer_1"), better)


def _read_summaries(fields: Fields) -> Sequence[Answers]:
    info, summaries = fields["info"], fields["summaries"]
    if not isinstance(info, Mapping) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Fault("not_two_answers")
    asked = {name: info.get(name) for name in ("post", "article")}
    texts = {str(n): one.get("text") if isinstance(one, Mapping) else None for n, one in enumerate(summaries)}
    return _in_order(
        texts, prompt_in({**fields, **asked}, "post", "article"), ("0", "1"), _by_number(fields.get("choice"), 0, 1)
    )


VERDICTS: tuple[Layout, ...] = (
    _simple(
        name="SafeRLHF",
        rule="the response of `safer_response_id`, else of `better_response_id`",
        question=("prompt",),
        columns=("response_0", "response_1"),
        verdict=_SAFER_IDS,
        better=lambda value: _by_number(value, 0, 1),
    ),
    _simple(
        name="HelpSteer 3",
        rule="the second response where `overall_preference` is above 0, the first below",
        question=("context", "prompt"),
        columns=("response1", "response2"),
        verdict=("overall_preference",),
        better=_by_sign,
    ),
    _simple(
        name="HelpSteer 2 preferences",
        rule="the second response where `preference_strength` is above 0, the first below",
        question=("prompt",),
        columns=("response_1", "response_2"),
        verdict=("preference_strength",),
        better=_by_sign,
    ),
    _simple(
        name="SHP",
        rule="`human_ref_A` where `labels` is 1, `human_ref_B` where it is 0",
        question=("history",),
        columns=("human_ref_A", "human_ref_B"),
        verdict=("labels",),
        better=lambda value: _by_number(value, 1, 0),
    ),
    Layout(
        name="Chatbot Arena: two conversations and a winner",
        rule="the conversation of `winner`, where both share all but the last message",
        needs=(("conversation_a",), ("conversation_b",), ("winner",)),
        may_have=AROUND,
        fits=lambda fields: _two(fields, ("conversation_a", "conversation_b")) and "winner" in fields,
        read=_read_two_conversations,
    ),
    Layout(
        name="Chatbot Arena: turns and votes",
        rule="the model whose `winner_model_*` is 1; turns are lists, also as JSON text",
        needs=(("prompt",), ("response_a",), ("response_b",), ("winner_model_a",), ("winner_model_b",)),
        may_have=AROUND,
        fits=lambda fields: _two(fields, ("response_a", "response_b")) and "winner_model_a" in fields,
        read=_read_votes,
    ),
    _simple(
        name="Two responses and a winner",
        rule="the one that is named: `A`, `model_a`, `response_a`, `A>B` ...",
        question=("prompt", "instruction", "question"),
        columns=("response_a", "response_b"),
        verdict=("winner", "preference", "preferred", "label"),
        better=_by_name,
    ),
    _simple(
        name="JudgeBench",
        rule="`response_A` where `label` is `A>B`",
        question=("question", "prompt"),
        columns=("response_A", "response_B"),
        verdict=("label", "winner"),
        better=_by_name,
    ),
    _simple(
        name="Prometheus preferences",
        rule="the response of `orig_preference`",
        question=("orig_instruction",),
        columns=("orig_response_A", "orig_response_B"),
        verdict=("orig_preference",),
        better=_by_name,
    ),
    _simple(
        name="AlpacaFarm, LLMBar",
        rule="the output of `preference` or `label`, 1 or 2",
        question=("instruction", "input"),
        columns=("output_1", "output_2"),
        verdict=("preference", "label"),
        better=lambda value: _by_number(value, 1, 2),
        asked=lambda fields: instruction_in(fields, "instruction") if has(fields, "instruction") else prompt_in(fields, "input"),
        may_have=("input",),
    ),
    Layout(
        name="WebGPT comparisons",
        rule="the answer with the higher score",
        needs=(("question",), ("answer_0",), ("answer_1",), ("score_0",), ("score_1",)),
        may_have=AROUND,
        fits=lambda fields: _two(fields, ("answer_0", "answer_1")) and "score_0" in fields,
        read=_read_web_gpt,
    ),
    Layout(
        name="Summaries with feedback",
        rule="the summary of `choice`, 0 or 1; the prompt is the post or article",
        needs=(("info",), ("summaries",), ("choice",)),
        may_have=AROUND,
        fits=lambda fields: has(fields, "info", "summaries"),
        read=_read_summaries,
    ),
)  # fmt: skip
