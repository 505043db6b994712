"""Layouts with scores: several answers in a row, or one answer in a row, whose pairs are made with the other rows of its prompt.

Every two answers of different scores are a pair, the higher (of ranks, the lower) one chosen. A margin is not made of scores: their unit is
not that of a reward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sarm.data.sources.conversations import Message
from sarm.data.sources.layouts.layout import Answers, Fault, Fields, Judged, Layout, has, number_of, present
from sarm.data.sources.layouts.prompts import AROUND, answer_in, instruction_in, messages_in, prompt_in, said_in

_EVERY_TWO = "every two answers of different scores, the higher one chosen"
_OTHER_ROWS = "each answer with the others of its prompt in the same source"


def pairs_of(prompt: list[Message], scored: Sequence[tuple[Any, float | None]]) -> Sequence[Answers]:
    """Every two answers of different scores; answers without one make no pair. Raises Fault."""
    if len(scored) < 2:
        raise Fault("one_answer")
    known = [(answer, score) for answer, score in scored if score is not None]
    found = [Answers(prompt, a, b) for a, of_a in known for b, of_b in known if of_a > of_b]
    if not found:
        raise Fault("no_preference")
    return found


def _scores(value: Any, sign: int = 1) -> list[float | None]:
    if not isinstance(value, list):
        raise Fault("no_scores")
    return [None if (number := number_of(one)) is None else sign * number for one in value]


def _read_ultra_feedback(fields: Fields) -> Sequence[Answers]:
    scored = []
    for one in fields["completions"]:
        if not isinstance(one, Mapping):
            raise Fault("not_text")
        score = next((one[name] for name in ("overall_score", "fine-grained_score") if one.get(name) is not None), None)
        scored.append((one.get("response"), number_of(score)))
    return pairs_of(prompt_in(fields, "instruction", "prompt"), scored)


def _of_objects(
    question: tuple[str, ...], text: str, score: tuple[str, ...], sign: int
) -> Callable[[Fields], Sequence[Answers]]:
    """A reader of `answers`, a list of objects with a text and a score (`sign` -1: a rank)."""

    def read(fields: Fields) -> Sequence[Answers]:
        scored = []
        for one in fields["answers"]:
            if not isinstance(one, Mapping):
                raise Fault("not_text")
            number = number_of(next((one[name] for name in score if one.get(name) is not None), None))
            scored.append((one.get(text), None if number is None else sign * number))
        return pairs_of(prompt_in(fields, *question), scored)

    return read


def _holds(fields: Fields, column: str, key: str) -> bool:
    items = fields.get(column)
    return isinstance(items, list) and any(isinstance(one, Mapping) and key in one for one in items)


def _read_lists(fields: Fields) -> Sequence[Answers]:
    answers = present(fields, *_ANSWERS)
    higher = next((fields[name] for name in _SCORES if has(fields, name)), None)
    scores = _scores(higher) if higher is not None else _scores(present(fields, *_RANKS), sign=-1)
    if len(answers) != len(scores):
        raise Fault("scores_differ_in_number")
    return pairs_of(prompt_in(fields, *_QUESTIONS), [(answer_in(a), s) for a, s in zip(answers, scores, strict=True)])


def _read_targets(fields: Fields) -> Sequence[Answers]:
    targets = fields["targets"]
    choices, labels = (targets.get(name) for name in ("choices", "labels")) if isinstance(targets, Mapping) else (0, 0)
    if not isinstance(choices, list) or not isinstance(labels, list) or len(choices) != len(labels):
        raise Fault("scores_differ_in_number")
    return pairs_of(prompt_in(fields, "input"), list(zip(choices, _scores(labels), strict=True)))


_QUESTIONS = ("prompt", "instruction", "question")
_ANSWERS = ("responses", "generations", "candidates", "all_generated_responses")
_SCORES = ("scores", "ratings", "rating", "rewards", "all_rm_scores")
_RANKS = ("ranks", "ranking", "rankings")


def _label(value: Any) -> float:
    """1 for a good answer, 0 for a bad one. Raises Fault."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise Fault("no_label")
    return float(value)


def _rating(value: Any) -> float:
    """A score. Raises Fault."""
    number = number_of(value)
    if number is None:
        raise Fault("no_score")
    return number


def _one_answer(
    name: str,
    rule: str,
    question: tuple[str, ...],
    answer: str,
    value: tuple[str, ...],
    read_value: Callable[[Any], float],
) -> Layout:
    """A layout of one answer a row, with a label or a score."""

    def read(fields: Fields) -> Judged:
        said = next((fields[column] for column in value if fields.get(column) is not None), None)
        return Judged(prompt_in(fields, *question), answer_in(present(fields, answer)), read_value(said))

    def fits(fields: Fields) -> bool:
        holds = fields.get(answer) is None or not isinstance(fields[answer], list) or _is_messages(fields[answer])
        has_value = any(column in fields and not isinstance(fields[column], list) for column in value)
        return answer in fields and holds and has_value

    return Layout(name=name, rule=rule, needs=(question, (answer,), value), may_have=AROUND, fits=fits, read=read)


def _is_messages(items: list[Any]) -> bool:
    return all(isinstance(one, Mapping) for one in items)


def _read_tagged(fields: Fields) -> Judged:
    value = _label(fields.get("kto_tag", fields.get("label")))
    if has(fields, "instruction"):
        return Judged(instruction_in(fields, "instruction"), present(fields, "output"), value)
    messages = messages_in(present(fields, "messages", "conversations"))
    if not messages or messages[-1]["role"] != "assistant":
        raise Fault("bad_roles")
    return Judged(prompt_in({**fields, "messages": messages[:-1]}, "messages"), said_in(messages[-1]), value)


SCORED: tuple[Layout, ...] = (
    Layout(
        name="UltraFeedback",
        rule=f"{_EVERY_TWO} (`overall_score`, else `fine-grained_score`)",
        needs=(("instruction", "prompt"), ("completions",)),
        may_have=AROUND,
        fits=lambda fields: _holds(fields, "completions", "response"),
        read=_read_ultra_feedback,
    ),
    Layout(
        name="Nectar",
        rule="every two answers of different ranks, the lower rank chosen",
        needs=(("prompt",), ("answers",)),
        may_have=AROUND,
        fits=lambda fields: _holds(fields, "answers", "rank"),
        read=_of_objects(("prompt", "question"), "answer", ("rank",), -1),
    ),
    Layout(
        name="Stack Exchange preferences",
        rule=f"{_EVERY_TWO} (`pm_score`)",
        needs=(("question",), ("answers",)),
        may_have=AROUND,
        fits=lambda fields: _holds(fields, "answers", "pm_score"),
        read=_of_objects(("question", "prompt"), "text", ("pm_score",), 1),
    ),
    Layout(
        name="Several responses with scores or ranks",
        rule=f"{_EVERY_TWO}; of ranks the lower one",
        needs=(_QUESTIONS, _ANSWERS, (*_SCORES, *_RANKS)),
        may_have=AROUND,
        fits=lambda fields: any(isinstance(fields.get(name), list) for name in _ANSWERS) and any(name in fields for name in (*_SCORES, *_RANKS)),
        read=_read_lists,
    ),
    Layout(
        name="HHH alignment: choices with labels",
        rule=f"{_EVERY_TWO} (`labels`)",
        needs=(("input",), ("targets",)),
        may_have=AROUND,
        fits=lambda fields: has(fields, "targets"),
        read=_read_targets,
    ),
    Layout(
        name="LLaMA-Factory KTO",
        rule=f"{_OTHER_ROWS}, true against false",
        needs=(("instruction", "messages", "conversations"), ("kto_tag", "label")),
        may_have=("output", "input", "history", *AROUND),
        fits=lambda fields: "kto_tag" in fields or (isinstance(fields.get("messages"), list) and "label" in fields),
        read=_read_tagged,
    ),
    _one_answer(
        name="TRL KTO: a completion and a label",
        rule=f"{_OTHER_ROWS}, true against false",
        question=("prompt",),
        answer="completion",
        value=("label",),
        read_value=_label,
    ),
    _one_answer(
        name="BeaverTails",
        rule=f"{_OTHER_ROWS}, safe against unsafe",
        question=("prompt",),
        answer="response",
        value=("is_safe",),
        read_value=_label,
    ),
    _one_answer(
        name="HelpSteer 1 and 2",
        rule=f"{_OTHER_ROWS}, the more helpful one chosen",
        question=("prompt",),
        answer="response",
        value=("helpfulness",),
        read_value=_rating,
    ),
    _one_answer(
        name="A response and a score",
        rule=f"{_OTHER_ROWS}, the higher score chosen",
        question=_QUESTIONS,
        answer="response",
        value=("score", "rating", "reward"),
        read_value=_rating,
    ),
)  # fmt: skip
