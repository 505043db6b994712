"""Explanations of latents and their scores, from samples and a judge that is passed in. Nothing here knows how a judge is reached.

First every latent is explained; then all are scored, since a latent's baseline is the explanation of another. What a judge could not
answer is left out of a score and counted: a score of which too little could be asked is None, never a default.
"""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sarm.contracts.ids import hash_share
from sarm.contracts.judging import Question, Reply
from sarm.interpret import questions
from sarm.interpret.questions import AnswerFormat
from sarm.interpret.sampling import Example, Samples
from sarm.interpret.scores import Detection, detection, simulation

# A question, and which repetition of it.
Ask = Callable[[Question, int], Awaitable[Reply]]
MIN_EXAMPLES = 2


@dataclass(frozen=True)
class Explained:
    """How explaining a latent ended."""

    samples: Samples
    status: str
    text: str = ""
    reason: str = ""
    select_detection: float | None = None


@dataclass(frozen=True)
class Judged:
    """One text of a score: what was said of it, None where no answer could be used."""

    score: str
    example: Example
    said: int | None
    status: str


@dataclass(frozen=True)
class Scores:
    """Scores of one explanation, and every text behind them."""

    detection: Detection | None = None
    simulation: float | None = None
    intruder: float | None = None
    baseline_other: float | None = None
    baseline_none: float | None = None
    num_asked: int = 0
    num_scored: int = 0
    reason: str = ""
    judged: Sequence[Judged] = field(default=(), repr=False)


@dataclass(frozen=True)
class Scoring:
    """How scores are asked for."""

    ask: Ask
    texts_per_question: int
    min_coverage: float


async def explain(samples: Samples, scoring: Scoring) -> Explained:
    """The best of the candidate explanations, by detection on the `select` texts; the first where these cannot tell."""
    sets = [sample for sample in samples.explain if len(sample) >= MIN_EXAMPLES]
    if not sets:
        found = max((len(sample) for sample in samples.explain), default=0)
        return Explained(samples, "dead", reason=f"{found} texts to explain it from, {MIN_EXAMPLES} are needed")
    shown = [[one.shown(samples.largest) for one in sample] for sample in sets]
    replies = await asyncio.gather(*(scoring.ask(questions.explain(texts), 0) for texts in shown))
    texts = list(dict.fromkeys(reply.answer["hypothesis"] for reply in replies if reply.answer is not None))
    if not texts:
        return Explained(samples, replies[0].status, reason=replies[0].reason)
    if len(texts) == 1:
        return Explained(samples, "ok", texts[0])
    values = [
        await _detection(scoring=scoring, samples=samples, texts=samples.select, explanation=text, name="select")
        for text in texts
    ]
    best = max(range(len(texts)), key=lambda i: -1.0 if (one := values[i][0]) is None else one.value)
    chosen = values[best][0]
    return Explained(samples, "ok", texts[best], select_detection=chosen.value if chosen else None)


async def score(explained: Explained, other: str | None, scoring: Scoring) -> Scores:
    """All scores of an explanation on the `test` texts; `other` is another latent's explanation, if there is one."""
    samples, test = explained.samples, explained.samples.test
    if not explained.text:
        return Scores()
    (own, judged), simulated, found, of_other, of_none = await asyncio.gather(
        _detection(scoring=scoring, samples=samples, texts=test, explanation=explained.text, name="detection"),
        _simulation(scoring, samples, explained.text),
        _intruder(scoring, samples),
        _detection(scoring=scoring, samples=samples, texts=test, explanation=other or "", name="baseline_other"),
        _detection(scoring=scoring, samples=samples, texts=test, explanation="", name="baseline_none"),
    )
    num_scored = sum(one.said is not None for one in judged)
    return Scores(
        detection=own,
        simulation=simulated[0],
        intruder=found,
        baseline_other=of_other[0].value if of_other[0] and other else None,
        baseline_none=of_none[0].value if of_none[0] else None,
        num_asked=len(test),
        num_scored=num_scored,
        reason="" if own else _why(test, num_scored),
        judged=[*judged, *simulated[1], *(of_other[1] if other else ()), *of_none[1]],
    )


async def score_label(samples: Samples, label: str, scoring: Scoring) -> Scores:
    """Detection alone, for a label that no judge wrote."""
    value, judged = await _detection(
        scoring=scoring, samples=samples, texts=samples.test, explanation=label, name="detection"
    )
    num_scored = sum(one.said is not None for one in judged)
    reason = "" if value else _why(samples.test, num_scored)
    return Scores(value, num_asked=len(samples.test), num_scored=num_scored, reason=reason, judged=judged)


@dataclass(frozen=True)
class Rated:
    """One answer to a rubric; `rating` is None unless status is ok."""

    latent: int
    rubric: str
    judge: str
    repeat: int
    rating: int | None
    status: str
    reason: str


async def rate(
    samples: Samples, rubric: str, judge: str, ask: Ask, repeats: int, answer_format: AnswerFormat
) -> list[Rated]:
    """Ratings of the texts that the first explanation was written from; each repetition sees them in another order."""
    texts = samples.explain[0] if samples.explain else []
    if len(texts) < MIN_EXAMPLES:
        return []
    orders = [texts if r == 0 else sorted(texts, key=lambda one: hash_share(f"{r}:{one.text_id}")) for r in range(repeats)]  # fmt: skip
    asked = [questions.rate(rubric, [one.shown(samples.largest) for one in order], answer_format) for order in orders]
    replies = await asyncio.gather(*(ask(question, r) for r, question in enumerate(asked)))
    return [
        Rated(latent=samples.latent, rubric=rubric, judge=judge, repeat=r, rating=reply.answer["score"] if reply.answer else None, status=reply.status, reason=reply.reason)
        for r, reply in enumerate(replies)
    ]  # fmt: skip


def other_explanations(explained: Sequence[Explained]) -> dict[int, str]:
    """For each latent the explanation of another one, chosen by hash among those that differ from its own."""
    known = [one for one in explained if one.text]
    others = {}
    for one in known:
        start = int(len(known) * hash_share(f"other:{one.samples.latent}"))
        around = (known[(start + step) % len(known)] for step in range(len(known)))
        if found := next((other.text for other in around if other.text != one.text), None):
            others[one.samples.latent] = found
    return others


async def _detection(
    scoring: Scoring, samples: Samples, texts: Sequence[Example], explanation: str, name: str
) -> tuple[Detection | None, list[Judged]]:
    said = await _per_text(scoring, texts, name, lambda batch: questions.detect(explanation, [one.shown() for one in batch]))  # fmt: skip
    answered = [one for one in said if one.said is not None]
    if not texts or len(answered) < scoring.min_coverage * len(texts):
        return None, said
    return detection([one.example.fires for one in answered], [bool(one.said) for one in answered]), said


async def _simulation(scoring: Scoring, samples: Samples, explanation: str) -> tuple[float | None, list[Judged]]:
    texts = samples.test
    said = await _per_text(scoring, texts, "simulation", lambda batch: questions.simulate(explanation, [one.shown() for one in batch]))  # fmt: skip
    levels = [(one.example.activation, one.said) for one in said if one.said is not None]
    if not texts or len(levels) < scoring.min_coverage * len(texts):
        return None, said
    return simulation([a for a, _ in levels], [guess for _, guess in levels]), said


async def _intruder(scoring: Scoring, samples: Samples) -> float | None:
    sets = samples.intruders
    asked = [questions.intruder([one.shown() for one in texts]) for texts, _ in sets]
    replies = await asyncio.gather(*(scoring.ask(question, 0) for question in asked))
    found = [reply.answer["intruder"] == place for reply, (_, place) in zip(replies, sets, strict=True) if reply.answer]
    return sum(found) / len(found) if found and len(found) >= scoring.min_coverage * len(sets) else None


async def _per_text(
    scoring: Scoring, texts: Sequence[Example], name: str, question: Callable[[Sequence[Example]], Question]
) -> list[Judged]:
    step = scoring.texts_per_question
    batches = [texts[start : start + step] for start in range(0, len(texts), step)]
    replies = await asyncio.gather(*(scoring.ask(question(batch), 0) for batch in batches))
    return [
        Judged(name, one, int(reply.answer[f"text_{i}"]) if reply.answer else None, reply.status)
        for batch, reply in zip(batches, replies, strict=True)
        for i, one in enumerate(batch, start=1)
    ]


def _why(test: Sequence[Example], num_scored: int) -> str:
    fires = sum(one.fires for one in test)
    if not fires or fires == len(test):
        return f"{fires} test texts where it fires and {len(test) - fires} where it is silent: both are needed"
    return f"{num_scored} of {len(test)} test texts were judged"


def explanation_row(explained: Explained, place: str, explainer: str, scores: Scores, ratings: Sequence[Rated]) -> dict[str, Any]:  # fmt: skip
    """A row of explanations/v1; ratings are medians over judges and repetitions."""
    row = {
        "latent": explained.samples.latent,
        "place": place,
        "explainer": explainer,
        "explanation": explained.text,
        "status": explained.status,
        "reason": explained.reason or scores.reason,
        "num_scored": scores.num_scored,
    }
    if scores.detection:
        row |= {"detection": scores.detection.value, "detection_low": scores.detection.low, "detection_high": scores.detection.high}  # fmt: skip
    row |= {name: getattr(scores, name) for name in ("simulation", "intruder", "baseline_other", "baseline_none")}
    return row | {rubric: median_rating(ratings, rubric) for rubric in questions.RUBRICS}


def median_rating(ratings: Sequence[Rated], rubric: str) -> float | None:
    """Median of the usable ratings; None if there are none."""
    levels = [one.rating for one in ratings if one.rubric == rubric and one.rating is not None]
    return float(statistics.median(levels)) if levels else None
