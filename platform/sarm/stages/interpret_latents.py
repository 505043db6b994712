"""What is asked and computed of each latent: its explanation, tests of it, tests of its extractive label, and ratings."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow.compute as pc

from sarm.engine.live.progress_line import count
from sarm.engine.llm.judge import Judge
from sarm.engine.terminal import say
from sarm.interpret import explaining
from sarm.interpret.context_store import ContextStore
from sarm.interpret.explaining import Explained, Rated, Scores, Scoring
from sarm.interpret.labels import Background, label
from sarm.interpret.sampling import Pool, Samples, draw_samples
from sarm.settings.judging import Interpret

_SECONDS_BETWEEN_LINES = 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Interpreted:
    """All that is known of one latent at the end."""

    explained: Explained
    label: str
    scores: Scores = Scores()
    label_scores: Scores = Scores()
    ratings: Sequence[Rated] = ()


@dataclass(frozen=True)
class _Texts:
    """Where latents' texts come from."""

    settings: Interpret
    store: ContextStore
    pool: Pool
    background: Background
    largest: Mapping[int, float]
    """The largest activation of each latent that fires at the place."""

    def samples(self, latent: int) -> Samples:
        settings = self.settings
        return draw_samples(
            latent,
            self.store.of(latent, settings.place).to_pylist(),
            self.largest.get(latent, 0.0),
            self.pool,
            num_explain=settings.num_explain,
            num_test=settings.num_test,
            num_negatives=settings.num_negatives,
            candidates=settings.candidates,
            intruder_trials=settings.intruder_trials,
        )

    def label(self, samples: Samples) -> str:
        # The label is made from the explaining texts only, because it is tested on the others, as any explanation is.
        texts = [example.text for sample in samples.explain for example in sample]
        return label(self.background.characteristic(texts))

    def why_silent(self, latent: int) -> str:
        return (
            "too few texts to explain it from"
            if latent in self.largest
            else f"latent {latent} fires nowhere in these texts"
        )


async def interpret_latents(
    settings: Interpret, store: ContextStore, pool: Pool, latents: Sequence[int], judges: Sequence[Judge]
) -> list[Interpreted]:
    """Every latent in turn: explained by the first judge, tested by it, rated by all; labelled alone where there is no judge."""
    at_place = store.latents.filter(pc.equal(store.latents["place"], settings.place))
    largest = dict(zip(at_place["latent"].to_pylist(), at_place["max"].to_pylist(), strict=True))
    texts = _Texts(settings, store, pool, Background(row["text"] for row in pool.rows), largest)
    if not judges:
        return [_labelled(texts, latent) for latent in latents]
    scoring = Scoring(judges[0].ask, settings.texts_per_question, settings.min_coverage)

    async def explain(latent: int) -> Interpreted:
        samples = texts.samples(latent)
        explained = await explaining.explain(samples, scoring)
        if explained.status == "dead" and latent not in largest:
            explained = Explained(samples, "dead", reason=texts.why_silent(latent))
        return Interpreted(explained, texts.label(samples))

    width = 2 * settings.judging.concurrency
    explained = await _each(latents, explain, width, "explained")
    others = explaining.other_explanations([latent.explained for latent in explained])

    async def test(latent: Interpreted) -> Interpreted:
        if latent.explained.status == "dead":
            return latent
        samples = latent.explained.samples
        scores, label_scores, ratings = await asyncio.gather(
            explaining.score(latent.explained, others.get(samples.latent), scoring),
            explaining.score_label(samples, latent.label, scoring),
            _rated(samples, settings, judges),
        )
        return replace(latent, scores=scores, label_scores=label_scores, ratings=ratings)

    return await _each(explained, test, width, "scored")


def _labelled(texts: _Texts, latent: int) -> Interpreted:
    """A latent that nobody is asked about."""
    samples = texts.samples(latent)
    is_dead = not any(samples.explain)
    reason = texts.why_silent(latent) if is_dead else ""
    return Interpreted(Explained(samples, "dead" if is_dead else "ok", reason=reason), texts.label(samples))


async def _rated(samples: Samples, settings: Interpret, judges: Sequence[Judge]) -> list[Rated]:
    """Ratings by every judge under every rubric."""
    parts = await asyncio.gather(
        *(
            explaining.rate(
                samples=samples,
                rubric=rubric,
                judge=judge.spec.name,
                ask=judge.ask,
                repeats=settings.repeats,
                answer_format=settings.answer_format,
            )
            for judge in judges
            for rubric in settings.rubrics
        )
    )
    return [rating for part in parts for rating in part]


async def _each(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], width: int, done: str) -> list[Result]:  # fmt: skip
    """`work` of every item, `width` at a time, in order; the first error ends all."""
    queue = list(enumerate(items))[::-1]
    results: dict[int, Result] = {}
    total, said = len(queue), time.monotonic()

    async def worker() -> None:
        nonlocal said
        while queue:
            place, item = queue.pop()
            results[place] = await work(item)
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(f"{count(len(results), total, 'latents')} {done}")

    workers = [asyncio.create_task(worker()) for _ in range(min(width, total))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
    return [results[place] for place in range(total)]
