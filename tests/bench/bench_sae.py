"""`make bench BENCH=sae`: how fast an SAE trains beside other libraries, what memory it takes, and whether it finds what is there.

Every implementation runs in processes of its own, with the same threads and the same allocator settings, turn about over several
rounds; figures are medians over all steps. Writes outputs/bench/sae.json and prints a table.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
OUT = ROOT / "outputs" / "bench" / "sae.json"
D, M, K, BATCH, THREADS = 576, 9216, 27, 4096, 2
NAMES = ("gemm", "sarm", "sparsify", "sae_lens", "dictionary_learning")
# Without them a third of a step is spent on pages of tensors that were given back and are asked for again.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "passive",
}
BOUNDS = {
    "step_vs_gemm": ("<=", 1.65),
    "vs_sparsify": (">=", 1.3),
    "vs_sae_lens": (">=", 4.0),
    "vs_dictionary_learning": (">=", 8.0),
    "read_share": ("<=", 0.05),
    "recovered": (">=", 0.95),
    "mean_max_cosine": (">=", 0.95),
    "dead_share_auxk": ("<=", 0.01),
    "dead_share_plain": (">=", 0.2),
}


def main() -> None:
    """Run the parts and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=["speed", "memory", "reading", "truth"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    if "speed" in arguments.parts:
        figures |= speed(arguments.rounds, arguments.steps)
    if "memory" in arguments.parts:
        figures["memory"] = memory()
    if "reading" in arguments.parts:
        figures |= reading(figures["seconds"]["sarm"])
    if "truth" in arguments.parts:
        figures |= truth()
    figures["machine"] = {"cpu": _cpu(), "threads": THREADS, "python": platform.python_version()}
    figures["sizes"] = {"d_in": D, "d_sae": M, "k": K, "batch": BATCH, "dtype": "float32"}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2))
    show(figures)


def speed(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of everybody, and ours in relation."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in NAMES:
            seconds[name] += run_step(name, "--steps", str(steps))["seconds"]
            print(f"round {number + 1}: {name} {statistics.median(seconds[name]) * 1e3:.0f} ms", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "step_vs_gemm": medians["sarm"] / medians["gemm"],
        **{f"vs_{name}": medians[name] / medians["sarm"] for name in NAMES[2:]},
    }


def memory() -> list[dict[str, float]]:
    """Megabytes of a process beyond weights, gradients and both moments, for several widths."""
    found = []
    for m in (M // 2, M, 2 * M, 4 * M):
        run = run_step("sarm", "--m", str(m), "--steps", "1")
        owned = 4 * (2 * D * m + m + D) * 4 / 2**20
        found.append({"d_sae": m, "owned_mb": owned, "extra_mb": run["mb_peak"] - run["mb_before"] - owned})
        print(
            f"d_sae {m}: {owned:.0f} MB of weights, gradients and moments, {found[-1]['extra_mb']:.0f} MB beside",
            flush=True,
        )
    return found


def reading(step_seconds: float) -> dict[str, float]:
    """Share of a step that reading its batch takes, from files that do not stay in memory."""
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import bench_sae; print(json.dumps(bench_sae.read_seconds()))"
    seconds = json.loads(_python("-c", code, str(HERE)).splitlines()[-1])
    return {"read_seconds": seconds, "read_share": seconds / step_seconds}


def read_seconds() -> float:
    """Mean seconds to the next shuffled batch, in float32, of a store that is read from disk window by window."""
    import torch

    from sarm.contracts.manifest import StageFolder
    from sarm.contracts.tables import activations_table
    from sarm.data.store.activations import (
        ACTIVATIONS,
        ActivationStore,
        activation_table,
        file_moments,
        statistics_of,
        write_activation_file,
    )
    from sarm.data.store.shuffled_rows import Cursor, ShuffledRows, batches

    torch.set_num_threads(THREADS)
    kind = {"dtype": "float16", "layer": 1, "model": "random", "d_in": D}
    per_file, num_files = 16384, 8
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        stage = StageFolder(Path(folder), ACTIVATIONS, {})
        stage.claim()
        moments = []
        for number in range(num_files):
            ids = list(range(number * per_file, (number + 1) * per_file))
            columns = dict.fromkeys(("row_id", "position", "token_id", "num_tokens"), ids)
            columns |= {"doc_id": [f"doc{i // 20}" for i in ids], "side": ["text"] * per_file}
            table = activation_table(columns, torch.randn(per_file, D), "float16", activations_table(D, kind))
            write_activation_file(table, Path(folder) / f"part-{number:06}.parquet")
            moments.append(file_moments(table, "float16"))
        stage.finish({"rows": per_file * num_files, "activations": kind, "statistics": statistics_of(moments)})
        rows = ShuffledRows(ActivationStore(Path(folder)), 0.01, window_rows=4 * per_file, memory_bytes=0)
        times.append(time.perf_counter())
        for x_BD, _, _ in batches(rows, Cursor(0), 2, BATCH):
            x_BD.float()
            times.append(time.perf_counter())
    # A window is read while the one before it is used: what counts is the mean, not the median.
    return (times[-1] - times[0]) / (len(times) - 1)


def truth() -> dict[str, Any]:
    """Whether a dictionary finds known features, and whether AuxK keeps its latents alive."""
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import bench_sae; print(json.dumps(bench_sae.truth_figures()))"
    return json.loads(_python("-c", code, str(HERE)).splitlines()[-1])


def truth_figures() -> dict[str, Any]:
    """Features in 64 dimensions, 4 in a row: 128 for 256 latents; then 256 for as many, on rows that share a shift, for AuxK."""
    import torch
    from synthetic import random_features, train_on

    from sarm.settings.sae import SaeSettings

    torch.set_num_threads(THREADS)
    settings: dict[str, Any] = {"d_sae": 256, "k": 4, "batch_size": 512, "lr": 3e-3, "decay_share": 0.3}
    centred = random_features(64, 128, 4, 0.0, torch.Generator().manual_seed(0))
    found = train_on(centred, SaeSettings(**settings), 1500)
    # Chosen on seeds 0 to 2 (docs/benchmarks.md): these are others.
    dead: dict[int, list[float]] = {0: [], 64: []}
    for seed in (3, 4, 5):
        shifted = random_features(64, 256, 4, 2.5, torch.Generator().manual_seed(seed))
        for aux_k, shares in dead.items():
            config = SaeSettings(dead_after_rows=2_000, aux_k=aux_k, aux_coefficient=0.5, **settings)
            shares.append(train_on(shifted, config, 8000, centred=False).dead_share)
    return {
        "recovered": found.recovered,
        "mean_max_cosine": found.mean_max_cosine,
        "dead_share_plain": statistics.mean(dead[0]),
        "dead_share_auxk": statistics.mean(dead[64]),
        "dead_shares": {"plain": dead[0], "auxk": dead[64]},
    }


def run_step(name: str, *flags: str) -> dict[str, Any]:
    """One process of `sae_steps.py`."""
    return json.loads(_python(str(HERE / "sae_steps.py"), name, *flags).splitlines()[-1])


def show(figures: dict[str, Any]) -> None:
    """Print the steps and the bounds as tables."""
    print(f"\none training step, d_in {D}, d_sae {M}, k {K}, {BATCH} rows, float32, {THREADS} threads ({_cpu()})")
    for name, seconds in figures.get("seconds", {}).items():
        print(f"  {name:<22}{seconds * 1e3:8.0f} ms {BATCH / seconds:9.0f} rows/s")
    for name, (relation, bound) in BOUNDS.items():
        if name in figures:
            met = figures[name] <= bound if relation == "<=" else figures[name] >= bound
            print(f"  {name:<26}{figures[name]:8.3f}  {relation} {bound:<6}{'' if met else '  MISSED'}")
    print(f"written to {OUT}")


def _python(*arguments: str) -> str:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:2])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
