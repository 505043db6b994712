"""The engine against the reader, and under load, loss and failure."""

import random
import threading
import time

import pytest
import torch
from tests.serve.asked import ANSWERS, conversation, readings

from sarm.passes.reader import Reader, sarm_reader
from sarm.serve.engine import Engine, EngineError, OverloadedError, Tokenised


@pytest.fixture(scope="module")
def reader(served) -> Reader:
    return sarm_reader(served, 128)


@pytest.fixture
def engine(reader):
    made = Engine(reader, threads=1, max_wait=1000.0, cached=0)
    yield made
    made.stop()


def tokenised(reader: Reader, conversations) -> list[Tokenised]:
    found = [one.ids for one in reader.chat.encode(conversations)]
    prompts = [reader.chat.encode_responses(c[:-1], [""])[0].ids for c in conversations]
    return [Tokenised(ids, len(prompt) - 1) for ids, prompt in zip(found, prompts, strict=True)]


def test_readings_are_the_readers_own_whatever_is_read_beside_them(reader, engine, served):
    prompts = [[{"role": "user", "content": f"question {n} about {'gardens ' * (n % 3)}"}] for n in range(6)]
    asked = [conversation(f"{answer} {n}", prompt) for n, prompt in enumerate(prompts) for answer in ANSWERS]
    random.Random(1).shuffle(asked)
    expected = readings(served, asked)
    futures = engine.submit(tokenised(reader, asked))
    engine.start()
    for future, alone in zip(futures, expected, strict=True):
        found = future.result(60)
        assert found.reading.reward == pytest.approx(alone.reward, abs=1e-4)
        assert dict(zip(found.reading.latents, found.reading.values, strict=True)) == pytest.approx(
            dict(zip(alone.latents, alone.values, strict=True)), abs=1e-4
        )
    assert engine.cost.tokens < engine.read_tokens, "prompts are shared"
    assert engine.waiting == (0, 0)
    assert engine.fault == ""


def test_answers_to_a_prompt_share_it_across_requests(reader, engine):
    asked = tokenised(reader, [conversation(answer) for answer in ANSWERS])
    futures = [future for one in asked for future in engine.submit([one])]
    engine.start()
    computed = [future.result(60).computed_tokens for future in futures]
    assert sum(computed) == sum(len(one.ids) for one in asked) - 2 * asked[0].prompt_tokens
    assert engine.cost.tokens == sum(computed)


def test_an_answer_that_comes_again_is_not_computed_again(reader):
    engine = Engine(reader, threads=1, cached=2)
    engine.start()
    (one, two, three) = tokenised(reader, [conversation(answer) for answer in ANSWERS])
    first = engine.submit([one])[0].result(60)
    tokens = engine.cost.tokens
    again = engine.submit([one])[0].result(60)
    assert again.reading is first.reading
    assert (engine.cost.tokens, again.computed_tokens) == (tokens, 0)
    for other in (two, three):
        engine.submit([other])[0].result(60)
    engine.submit([one])[0].result(60)
    assert engine.cost.tokens > tokens + len(two.ids), "the oldest was forgotten"
    engine.stop()


def test_a_queue_that_is_too_long_refuses_at_once_and_says_how_long_it_is(reader):
    engine = Engine(reader, threads=1, max_wait=1.0, cached=0)
    asked = tokenised(reader, [conversation(answer) for answer in ANSWERS]) * 10
    engine.submit(asked)
    with pytest.raises(OverloadedError) as refused:
        engine.submit(asked[:1])
    assert refused.value.seconds == engine.estimated_wait > 1.0
    engine.start()
    engine.stop()


def test_a_request_that_cannot_wait_so_long_is_refused(reader):
    engine = Engine(reader, threads=1, max_wait=1000.0, cached=0)
    asked = tokenised(reader, [conversation(answer) for answer in ANSWERS])
    engine.submit(asked)
    with pytest.raises(OverloadedError):
        engine.submit(asked, timeout=1e-6)
    engine.start()
    engine.stop()


def test_what_nobody_waits_for_is_not_computed(reader, engine):
    asked = tokenised(reader, [conversation(answer) for answer in ANSWERS])
    futures = engine.submit(asked)
    assert futures[0].cancel()
    assert futures[2].cancel()
    engine.start()
    futures[1].result(60)
    assert engine.cost.tokens == len(asked[1].ids)
    assert engine.waiting == (0, 0)


class Failing:
    """A reader that fails for some answers."""

    def __init__(self, reader: Reader, fails, error: Exception):
        self._reader, self._fails, self._error = reader, fails, error
        self.batch_tokens, self.row_tokens = reader.batch_tokens, reader.row_tokens

    def read(self, rows, cost):
        rows = list(rows)
        if any(self._fails(row) for row in rows):
            raise self._error
        return self._reader.read(rows, cost)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (ValueError("secret text"), False),
    ],
)
def test_an_answer_fails_alone_and_the_engine_goes_on(reader, error, is_memory):
    asked = tokenised(reader, [conversation(answer) for answer in ANSWERS])
    longest = max(len(one.ids) for one in asked)
    # Whatever has more tokens than the shorter two together with their prompt.
    engine = Engine(Failing(reader, lambda row: len(row.ids) >= longest, error), threads=1, cached=0)
    futures = engine.submit(asked)
    engine.start()
    for one, future in zip(asked, futures, strict=True):
        if len(one.ids) == longest:
            with pytest.raises(EngineError) as failed:
                future.result(60)
            assert failed.value.is_memory == is_memory
            assert "secret" not in str(failed.value)
        else:
            assert future.result(60).reading.reward
    assert engine.fault == ""
    engine.stop()


def test_an_engine_that_fails_again_and_again_says_so_until_it_reads_something(reader):
    broken = [True]
    engine = Engine(Failing(reader, lambda _: broken[0], ValueError("x")), threads=1, cached=0)
    (one,) = tokenised(reader, [conversation(ANSWERS[0])])
    engine.start()
    for _ in range(3):
        with pytest.raises(EngineError):
            engine.submit([one])[0].result(60)
    assert "3 batches failed" in engine.fault
    broken[0] = False
    engine.submit([one])[0].result(60)
    assert engine.fault == ""
    engine.stop()


def test_a_reward_that_is_no_number_is_an_error(reader, monkeypatch):
    engine = Engine(reader, threads=1, cached=4)
    (one,) = tokenised(reader, [conversation(ANSWERS[0])])
    before = Reader.read

    def nan(self, rows, cost=None):
        return {key: one._replace(reward=float("nan")) for key, one in before(self, rows, cost).items()}

    monkeypatch.setattr(Reader, "read", nan)
    engine.start()
    with pytest.raises(EngineError, match="nan"):
        engine.submit([one])[0].result(60)
    monkeypatch.undo()
    assert engine.submit([one])[0].result(60).reading.reward
    engine.stop()


def test_an_engine_whose_thread_ends_lets_nobody_wait(reader):
    class Ends(BaseException):
        pass

    engine = Engine(Failing(reader, lambda _: True, Ends()), threads=1, cached=0)
    (one,) = tokenised(reader, [conversation(ANSWERS[0])])
    waiting, later = engine.submit([one]), engine.submit([Tokenised([1] * 5000, 0)])
    engine.start()
    for future in (*waiting, *later):
        with pytest.raises(EngineError, match="ended"):
            future.result(60)
    assert "ended" in engine.fault
    with pytest.raises(EngineError, match="ended"):
        engine.submit([one])


def test_a_stopped_engine_finishes_its_batch_and_refuses_the_rest(reader):
    engine = Engine(reader, threads=1, cached=0)
    engine.start()
    engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        engine.submit(tokenised(reader, [conversation(ANSWERS[0])]))


def test_shuffled_answers_from_many_threads_keep_their_places(reader):
    engine = Engine(reader, threads=1, max_wait=86400.0, cached=8)
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(5)]
    asked = tokenised(reader, [conversation(answer, prompt) for prompt in prompts for answer in ANSWERS])
    alone = Engine(reader, threads=1, cached=0)
    alone.start()
    expected = [alone.submit([one])[0].result(60).reading.reward for one in asked]
    alone.stop()
    engine.start()
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            places = [rng.randrange(len(asked)) for _ in range(rng.randrange(1, 9))]
            found = engine.submit([asked[place] for place in places])
            time.sleep(0.001 * rng.random())
            for place, future in zip(places, found, strict=True):
                if abs(future.result(120).reading.reward - expected[place]) > 1e-4:
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    engine.stop()
