"""The audit on the demo model: features, causal tests, steering, poison and denoise, against their controls and the goals.

Reads a finished demo (`make demo`) and public safety and chat benchmarks in the folder `SARM_BENCH_DATA` (default `../shared/data`): RewardBench 2
Safety, RM-Bench safety-refuse, safety-response and chat. The codes are cached, so that a second run takes a minute.

    make bench BENCH=audit
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from sarm.audit.selection import matched_sets
from sarm.audit.steering import Sweep
from sarm.engine.session import open_session
from sarm.evaluate.benchmarks.sources import Source, load_benchmark
from sarm.settings.audit import AuditFeatures, Relabel, Steer
from sarm.settings.run import RunSettings
from sarm.stages.audit import audit
from sarm.stages.audit_folder import read_audit
from sarm.stages.relabel import relabel
from sarm.stages.steer import steer

DEMO = Path(os.environ.get("SARM_BENCH_DEMO", "outputs/demo")).absolute()
DATA = Path(os.environ.get("SARM_BENCH_DATA", "../shared/data")).absolute()
OUT = Path("outputs/bench/audit").absolute()
ROWS, CHAT_ROWS = 20, 50
STRENGTHS = (-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)


def main() -> None:
    run, settings = RunSettings(out=OUT), asked()
    with open_session(settings) as session:
        audit(session, settings)
        steer(session, Steer(run=run, name="doubled"))
        steer(session, Steer(run=run, name="goal", edit="goal", goal=1.0, tolerance=0.25))
        relabel(session, Relabel(run=run))
    figures = {"sweep": sweep_time(), **against_goals()}
    (OUT.parent / "audit.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def asked() -> AuditFeatures:
    """The audit's settings: the demo's own pairs, and parts of public benchmarks."""
    return AuditFeatures(
        run=RunSettings(out=OUT),
        sarm=DEMO / "sarm",
        select=(str(DEMO / "pairs"),),
        target=(
            str(DEMO / "pairs"),
            f"reward_bench_2={part('reward_bench_2', 'safety', ROWS)}",
            f"rm_bench={part('rm_bench', 'safety-refuse', ROWS)}",
        ),
        off_target=(
            f"rm_bench={part('rm_bench', 'chat', CHAT_ROWS)}",
            f"rm_bench={part('rm_bench', 'safety-response', ROWS)}",
        ),
    )


def part(benchmark: str, name: str, rows: int) -> Path:
    """About `rows` rows of a benchmark's file, chosen by hash of the prompt, in a file of their own."""
    path = OUT.parent / "audit_data" / f"{name}.jsonl"
    loaded = load_benchmark(Source(benchmark, str(DATA / benchmark / f"{name}.jsonl.gz")), rows, False)
    records = [
        {
            "id": row.row_id,
            "prompt": row.prompt[0]["content"],
            "chosen": list(row.completions[: row.num_correct]),
            "rejected": list(row.completions[row.num_correct :]),
            "subset": row.subset,
        }
        for row in loaded.rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sweep_time() -> dict[str, float]:
    """Seconds of 9 strengths x 100 latents over 1,000 pairs, from cached codes that are already read."""
    found = read_audit(OUT)
    codes = found.codes.keep(np.arange(found.codes.num_pairs) < 1000)
    alive = np.flatnonzero((codes.density > 0) & (codes.weight != 0))
    started = time.perf_counter()
    Sweep(codes, "scale", STRENGTHS, alive[:100, None]).summary()
    seconds = time.perf_counter() - started
    matched_sets(found.selection.latent, codes.density, codes.weight, 100, 0)
    return {"pairs": codes.num_pairs, "latents": 100, "strengths": len(STRENGTHS), "seconds": seconds}


def against_goals() -> dict[str, object]:
    """The figures that the audit is to reach, and what it reached."""
    selection = json.loads((OUT / "features" / "selection.json").read_text())
    causal = json.loads((OUT / "causal" / "causal.json").read_text())
    relabelled = json.loads((OUT / "relabel" / "relabel.json").read_text())
    return {
        "completeness": selection["completeness"],
        "closed form against rerun": causal["zeroed"]["rerun_gap"],
        "steering over matched median": [causal["zeroed"]["ratio"], *causal["zeroed"]["ratio_ci95"]],
        "strongest feature alone": [causal["strongest"]["ratio"], *causal["strongest"]["ratio_ci95"]],
        "removed before TopK over matched median": causal["upstream"]["removed"]["ratio"],
        "verdicts": relabelled["verdicts"],
    }


if __name__ == "__main__":
    main()
