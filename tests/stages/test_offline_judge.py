"""A judge without any API: `transformers serve` with the demo's model of 135 M parameters, for real, on a small sample."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.interpret.planted import write_planted

from sarm.contracts.judging import FAILURES
from sarm.data.sources.cache import is_cached
from sarm.data.sources.demo import demo_model
from sarm.settings.judging import Interpret, Judging
from sarm.settings.run import RunSettings
from sarm.stages.interpret import run_interpretation


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """`MODEL@BASE_URL` of a server on a free port; ends with the tests."""
    if not is_cached("demo/smollm2-135m-instruct"):
        pytest.skip("the demo's model is not in the cache; run the demo once")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [str(Path(sys.executable).parent / "transformers"), "serve", str(demo_model())]
    command = [*serve, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield f"{demo_model()}@http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_a_small_local_model_answers_or_fails_by_name_and_nothing_is_made_up(endpoint, tmp_path, monkeypatch):
    contexts = write_planted(tmp_path / "contexts")
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    config = Interpret(
        contexts=contexts,
        run=RunSettings(out=tmp_path / "out"),
        judging=Judging(judges=(endpoint,), concurrency=1, timeout=600, max_answer_tokens=40),
        latents=(0,),
        num_explain=3,
        num_test=2,
        num_negatives=1,
        texts_per_question=6,
        candidates=1,
        intruder_trials=0,
        rubrics=("safety",),
        answer_format="two-line",
    )
    run_interpretation(config)
    rows = pq.read_table(tmp_path / "out" / "explanations.parquet").to_pylist()
    (own,) = [row for row in rows if row["explainer"] != "extractive"]
    texts = pq.read_table(tmp_path / "out" / "examples.parquet").to_pylist()
    ratings = pq.read_table(tmp_path / "out" / "ratings.parquet").to_pylist()
    for status, value in [*((row["status"], row["said"]) for row in texts), *((row["status"], row["rating"]) for row in ratings)]:  # fmt: skip
        assert status in ("ok", *FAILURES)
        assert (value is None) == (status != "ok")
    assert (own["explanation"] == "") == (own["status"] != "ok")
    log = [json.loads(line) for path in (tmp_path / "cache" / "judges").glob("*.jsonl") for line in path.read_text().splitlines()]  # fmt: skip
    # The server takes `response_format` and ignores it: found out, so that nothing relies on it.
    assert [row["mode"] for row in log if "mode" in row] == ["plain"]
    answers = [row for row in log if "status" in row]
    assert len(answers) >= 3
    assert all(row["text"] and row["prompt_tokens"] > 0 and not row["estimated"] for row in answers)
