"""Many requests in no order from many clients at once: none wrong, none swapped, and the server's memory stays what it was.

A thousand requests in the ordinary tests; `make test-load` sends 10,000 and looks at memory over 100,000.
"""

import asyncio
import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.serve.asked import PROMPT, conversation, readings
from tests.serve.conftest import MEAN, STD

from sarm.client import RewardClient

ROOT = Path(__file__).parents[2]
CLIENTS = 32
LONG = int(os.environ.get("SARM_LOAD", "0"))
NUM_ANSWERS = 200


@pytest.fixture(scope="module")
def rewards(served) -> dict[str, float]:
    rng = random.Random(0)
    words = ["garden", "water", "light", "seeds", "bread", "yeast", "stones", "slowly", "never"]
    answers = [f"{number} " + " ".join(rng.choices(words, k=rng.randrange(1, 30))) for number in range(NUM_ANSWERS)]
    found = readings(served, [conversation(answer) for answer in answers])
    return {answer: (one.reward - MEAN) / STD for answer, one in zip(answers, found, strict=True)}


@pytest.fixture
def server(served):
    """A process, so that its memory is its own. What it keeps of answers is full soon."""
    command = [sys.executable, "jobs/serve.py", "--model", str(served), "--port", "0", "--threads", "1", "--cached", "64"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().split()[-1]
    process.terminate()
    process.wait(60)


async def send(url: str, rewards: dict[str, float], num: int, seed: int) -> int:
    """Send `num` requests of one to four answers; how many answers were wrong."""
    rng = random.Random(seed)
    asked = [rng.choices(list(rewards), k=rng.randrange(1, 5)) for _ in range(num)]
    places = iter(range(num))

    async def one_client() -> int:
        client, wrong = RewardClient(url, timeout=300), 0
        for place in places:
            answers = asked[place]
            if place % 2:
                items = [{"prompt": PROMPT, "completions": answers}]
                values = [answer.reward for answer in (await client.arewards(items))[0]]
            else:
                values = await client.ascore([conversation(answer) for answer in answers])
            wrong += sum(abs(value - rewards[answer]) > 1e-4 for answer, value in zip(answers, values, strict=True))
        await client.aclose()
        return wrong

    return sum(await asyncio.gather(*(one_client() for _ in range(CLIENTS))))


def test_shuffled_requests_of_many_clients_are_answered_each_with_its_own(server, rewards):
    assert len({round(value, 3) for value in rewards.values()}) > 0.9 * NUM_ANSWERS, "a swap would show"
    assert asyncio.run(send(server[1], rewards, min(LONG, 10_000) or 1000, 1)) == 0


@pytest.mark.skipif(not LONG, reason="takes minutes: make test-load")
@pytest.mark.timeout(3600)
def test_memory_is_flat(server, rewards):
    process, url = server
    memory = []
    for part in range(10):
        assert asyncio.run(send(url, rewards, LONG // 10, part)) == 0
        gc.collect()
        memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        print(f"{(part + 1) * LONG // 10:,} requests: {memory[-1]:.1f} MiB", flush=True)
    assert memory[-1] - memory[1] < 0.03 * memory[1]
