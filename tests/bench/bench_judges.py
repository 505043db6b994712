"""What faults of a server cost the judge client: `make bench BENCH=judges` writes outputs/bench/judges.json.

    dealt         30 % 429, 10 % 5xx, 5 % time-outs, 10 % malformed of the questions, on their first request
    independent   the same shares of all requests, repeated ones included; no client can stay below 1 / 0.45 = 2.22
    limited       a server that turns away what comes faster than 100 requests a second, and says when to come again

Each over real HTTP on this machine, 100 questions (a latent's explanation each), 16 at once.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.engine.judge_server import FAULTS, Fault, JudgeServer, dealt, independent  # noqa: E402

from sarm.contracts.judging import Odd, Question  # noqa: E402
from sarm.engine.llm.judge import open_judges  # noqa: E402
from sarm.settings.judging import Judging  # noqa: E402

OUT = ROOT / "outputs" / "bench" / "judges.json"
QUESTIONS, CONCURRENCY, TIMEOUT = 100, 16, 1.0


class Bucket:
    """100 requests a second, bursts of 10."""

    def __init__(self) -> None:
        self.left, self.at, self.lock = 10.0, time.monotonic(), threading.Lock()

    def __call__(self, key: str, attempt: int) -> Fault:
        with self.lock:
            now = time.monotonic()
            self.left, self.at = min(10.0, self.left + 100 * (now - self.at)), now
            if self.left >= 1:
                self.left -= 1
                return None
            return {"status": 429, "headers": {"retry-after-ms": str(int(10 * (1 - self.left)) + 50)}}


def measure(fault: Any) -> dict[str, Any]:
    """Requests, ends and time of one server."""

    async def run(server: JudgeServer) -> dict[str, Any]:
        (judge,) = open_judges(Judging(judges=(f"m@{server.url}",), concurrency=CONCURRENCY, timeout=TIMEOUT), 0.05)
        await judge.prepare()
        started = time.perf_counter()
        replies = await asyncio.gather(*(judge.ask(Question("x", f"question {i}", Odd, 50, "s")) for i in range(QUESTIONS)))  # fmt: skip
        seconds = time.perf_counter() - started
        await judge.close()
        ends = {status: sum(reply.status == status for reply in replies) for status in {reply.status for reply in replies}}  # fmt: skip
        found = {"requests_per_question": server.asked / QUESTIONS, "ends": ends, "seconds": round(seconds, 2)}
        return {**found, "throttled": judge.pace.num_throttled, "faults": dict(server.kinds)}

    with JudgeServer(lambda _: '{"intruder": 1}', fault).serving() as server:
        return asyncio.run(run(server))


def main() -> None:
    shares = {name: num / 20 for name, num in FAULTS.items()}
    figures = {}
    for name, fault in {"dealt": dealt(FAULTS), "independent": independent(shares), "limited": Bucket(), "none": None}.items():  # fmt: skip
        with tempfile.TemporaryDirectory() as cache:
            os.environ["SARM_CACHE"] = cache
            figures[name] = measure(fault)
        print(f"{name:<12} {json.dumps(figures[name])}", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
