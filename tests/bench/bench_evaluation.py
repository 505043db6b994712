"""What benchmark scoring costs: `make bench BENCH=evaluation` writes outputs/bench/evaluation.json.

    throughput   tokens/s of the scoring pass over the bare forward of the same token batches at the same layer
    rerun        seconds of the whole job when every score is in the cache
    intervals    seconds of all figures' intervals, and of a comparison with 10,000 swaps, of a whole RewardBench 2

The benchmarks are the public data sets unless --benchmarks, or SARM_BENCHMARKS with spaces between, names files:

python tests/bench/bench_evaluation.py --model outputs/demo/sarm --benchmarks reward_bench_2=safety.jsonl.gz --limit 60
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.tokens.packing import answer_rows, token_batches
from sarm.evaluate.benchmarks.paired import compare
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.benchmarks.sources import load_benchmark, parse_source
from sarm.evaluate.influence import figure_intervals
from sarm.nn.backbone import residual_stream
from sarm.passes.models import find_model, sarm_tokenizer
from sarm.settings.benchmarks import Benchmarking
from sarm.stages.benchmark_scoring import make_items

ROOT = Path(__file__).parent.parent.parent
BATCH_TOKENS = 2048


def bare_forward(model: Path, benchmarks: list[str], limit: int) -> dict[str, float]:
    """Tokens/s of the backbone alone over batches made beforehand."""
    spec = find_model(Benchmarking(model=str(model), benchmarks=tuple(benchmarks)))
    chat, sarm = sarm_tokenizer(spec), load_sarm(model)
    _, texts = make_items([load_benchmark(parse_source(text), limit, False) for text in benchmarks], (), 1)
    prompts: dict[str, list[str]] = {}
    for prompt, completion in texts.values():
        prompts.setdefault(prompt, []).append(completion)
    rows = []
    for number, (prompt, completions) in enumerate(prompts.items()):
        messages = [{"role": role, "content": content} for role, content in json.loads(prompt)]
        tokens = chat.encode_responses(messages, completions)
        rows += answer_rows(
            [((number, i), t.ids) for i, t in enumerate(tokens)], max(spec.max_length, BATCH_TOKENS // 2)
        )
    batches = token_batches(rows, BATCH_TOKENS, chat.pad_id)

    def run(batch) -> None:
        with torch.inference_mode():
            residual_stream(sarm.model, batch.input_ids, batch.position_ids, batch.segment_ids)

    run(batches[0])
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    seconds = time.perf_counter() - started
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def job(model: Path, benchmarks: list[str], limit: int, out: Path, cache: Path) -> tuple[float, dict]:
    """Seconds of the job as a process, and its report."""
    command = [sys.executable, "jobs/evaluate.py", "--model", model, "--benchmarks", *benchmarks, "--limit", limit]
    command += ["--drift-items", 0, "--batch-tokens", BATCH_TOKENS, "--out", out]
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env={**os.environ, "SARM_CACHE": str(cache)})
    return time.perf_counter() - started, json.loads((out / "report.json").read_text())


def whole_reward_bench_2(seed: int = 0) -> list[ScoredRow]:
    """Random scores of the published size."""
    rng, rows = np.random.default_rng(seed), []
    for subset, size in (REWARD_BENCH_2.subsets or {}).items():
        for i in range(size):
            kind, number = ("ref", "tied")[i % 2], i // 2
            correct = 5 if subset == "Ties" and kind == "tied" else 1
            scores = rng.normal(size=correct + 7 if subset == "Ties" else 4)
            scores[:correct] += 1
            row_id = f"{kind}:{number}" if subset == "Ties" else str(i)
            rows.append(ScoredRow(subset, row_id, f"{subset}{i}", correct, scores, scores * 0 + 1, scores * 0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "outputs" / "demo" / "sarm")
    known = os.environ.get("SARM_BENCHMARKS", "reward_bench_2 rm_bench").split()
    parser.add_argument("--benchmarks", nargs="+", default=known)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench" / "evaluation.json")
    options = parser.parse_args()
    model = options.model.absolute()
    rows = whole_reward_bench_2()
    started = time.perf_counter()
    figure_intervals(REWARD_BENCH_2, rows)
    intervals = time.perf_counter() - started
    started = time.perf_counter()
    compare(REWARD_BENCH_2, rows, whole_reward_bench_2(1), 10_000, 0)
    comparison = time.perf_counter() - started
    bare = bare_forward(model, options.benchmarks, options.limit)
    with tempfile.TemporaryDirectory() as scratch:
        first, report = job(model, options.benchmarks, options.limit, Path(scratch) / "first", Path(scratch) / "cache")
        again, _ = job(model, options.benchmarks, options.limit, Path(scratch) / "again", Path(scratch) / "cache")
    rate = report["scoring"]["tokens_per_second"]
    found = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "model": str(options.model),
        "benchmarks": options.benchmarks,
        "limit": options.limit,
        "bare_forward": bare,
        "scoring": report["scoring"],
        "share_of_bare_forward": rate / bare["tokens_per_second"],
        "job_seconds": first,
        "rerun_from_cache_seconds": again,
        "intervals_of_reward_bench_2_seconds": intervals,
        "comparison_of_reward_bench_2_seconds": comparison,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
