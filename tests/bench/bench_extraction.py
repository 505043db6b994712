"""`make bench BENCH=extraction`: how close extraction is to a bare loop over the model, and how far from what is used today.

The real SmolLM2 and OpenWebText passages; every part in processes of its own with the same threads, one after the other. Tokens are
real ones: neither padding nor what is read twice counts. Of several rounds the best counts: other work on the machine only slows. Writes outputs/bench/extraction.json and prints a table.

Where the cores multiply bfloat16 natively, the pass and its bare loop run in it too, in turn with those in float32. `--parts order --sarm
outputs/demo/sarm` says how many held-out pairs of a finished run keep the order of their rewards in bfloat16.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
OUT = ROOT / "outputs" / "bench" / "extraction.json"
ROUNDS = 3
# Of the model in `workers`: shallow enough for a corpus of several dozen blocks.
WORKERS_LAYER = 7
DTYPES = ("float32", "bfloat16")
PEERS = ROOT / ".venv-bench" / "bin" / "python"
BOUNDS = {
    "vs_bare_loop": (">=", 0.85),
    "bfloat16_vs_bare_loop": (">=", 0.85),
    "bfloat16_vs_float32": (">=", 1.7),
    "same_order": (">=", 0.995),
    "vs_reference": (">=", 3.0),
    "vs_sae_lens": (">=", 1.2),
    "two_worker_speedup": (">=", 1.8),
    "rss_ratio_10x": ("<=", 1.10),
    "bytes_vs_sae_lens": ("<=", 0.2),
    "audit_share": ("<=", 0.02),
}

Part = Callable[[Path, list[str], dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Run the parts and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=80)
    parser.add_argument("--parts", nargs="*", default=["speed", "peers", "workers", "memory"])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=native_dtypes(), help="of the part `speed`")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the part `speed`")
    parser.add_argument("--sarm", type=Path, help="of the part `order`: the reward model of a finished run")
    arguments = parser.parse_args()
    if "order" in arguments.parts and arguments.sarm is None:
        parser.error("--parts order needs --sarm FOLDER")
    parts: dict[str, Part] = {
        "speed": partial(speed, dtypes=arguments.dtypes, rounds=arguments.rounds), "peers": peers, "workers": workers, "memory": memory,
        "order": partial(order, sarm=arguments.sarm),
    }  # fmt: skip
    figures: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), write_corpora(Path(name), arguments.texts)
        for part in arguments.parts:
            figures |= parts[part](folder, texts, figures)
    figures["machine"] = {"cpu": _cpu(), "threads": 2, "python": platform.python_version()}
    figures["sizes"] = {
        "model": "SmolLM2-135M-Instruct",
        "layer": 15,
        "dtypes": arguments.dtypes,
        "texts": arguments.texts,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2))
    show(figures)


def write_corpora(folder: Path, num_texts: int) -> list[str]:
    """`corpus` with the first passages, `small` and `large`, ten times that, for memory, and `many` for workers; returns the passages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sarm.contracts.tables import CORPUS_TABLE
    from sarm.data.sources.demo import demo_texts

    texts = [text for text in demo_texts("openwebtext") if isinstance(text, str)]
    sizes = {"corpus": num_texts, "small": 60, "large": 600, "many": 400}
    for name, size in sizes.items():
        # Passages are few: a larger corpus repeats them under other ids.
        chosen = [f"{texts[i % len(texts)]}" for i in range(size)]
        rows = {"row_id": list(range(size)), "text": chosen, "source": ["bench"] * size}
        (folder / name).mkdir()
        pq.write_table(pa.table(rows, schema=CORPUS_TABLE), folder / name / "part-00000.parquet", row_group_size=1000)
    return texts[:num_texts]


def native_dtypes() -> list[str]:
    """Those that these cores multiply natively."""
    import torch

    return list(DTYPES) if torch.cpu._is_avx512_bf16_supported() else ["float32"]


def speed(
    folder: Path, texts: list[str], figures: dict[str, Any], dtypes: Sequence[str], rounds: int
) -> dict[str, Any]:
    """The pass beside the bare loop over its batches, turn about, in each dtype."""
    own: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in dtypes}
    bare: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for number in range(rounds):
        for dtype in dtypes:
            run = {"corpus": "corpus", "target": f"out-{dtype}-{number}", "num_actors": 1, "cpus": 2, "dtype": dtype}
            own[dtype] += run_part("pass", folder, {"runs": [run]})
            bare[dtype].append(_rate(run_part("loop", folder, {"corpus": "corpus", "dtype": dtype})))
    rates = {dtype: [one["tokens_per_second"] for one in found] for dtype, found in own.items()}
    result: dict[str, Any] = {"rounds": {"pass": rates, "loop": bare}}
    for dtype in dtypes:
        prefix = "" if dtype == "float32" else f"{dtype}_"
        result |= {
            f"{prefix}tokens_per_second": max(rates[dtype]),
            f"{prefix}bare_tokens_per_second": max(bare[dtype]),
            f"{prefix}vs_bare_loop": max(rates[dtype]) / max(bare[dtype]),
        }
    if set(dtypes) == set(DTYPES):
        result["bfloat16_vs_float32"] = result["bfloat16_tokens_per_second"] / result["tokens_per_second"]
        result["bfloat16_vs_float32_bare"] = (
            result["bfloat16_bare_tokens_per_second"] / result["bare_tokens_per_second"]
        )
    last = own[dtypes[0]][-1]
    return result | {
        "tokens": last["tokens"],
        "whole_pass_seconds": last["seconds"],
        "padding_share": last["padding_share"],
        "audit_share": (last["audit_seconds"] + last["hashing"]) / last["seconds"],
        "sentence_ends": last["rows"],
        "bytes": last["bytes"],
    }


def order(folder: Path, texts: list[str], figures: dict[str, Any], sarm: Path) -> dict[str, Any]:
    """Of the held-out pairs of a finished run, the share whose rewards have the same order in bfloat16, with an exact 95 % interval."""
    from scipy.stats import binomtest

    found = run_part("order", folder, {"sarm": str(sarm.absolute())})
    interval = binomtest(found["same"], found["pairs"]).proportion_ci(0.95)
    return {"same_order": found["same"] / found["pairs"], "same_order_interval": [interval.low, interval.high], "order_pairs": found["pairs"]}  # fmt: skip


def peers(folder: Path, texts: list[str], figures: dict[str, Any]) -> dict[str, Any]:
    """The papers' way and SAELens' store on the same passages."""
    from sarm.data.formats.models import model_folder
    from sarm.settings.model import ModelSettings

    found = run_part("reference", folder, {"texts": texts[:16]})
    own = figures["tokens_per_second"]
    rate = _rate(found)
    result = {"reference_tokens_per_second": rate, "vs_reference": own / rate}
    source = model_folder(ModelSettings(name="demo:smollm2", layer=1))
    options = {"texts": texts, "model_folder": source, "num_tokens": figures["tokens"]}
    rounds = [run_part("sae_lens", folder, options, python=PEERS) for _ in range(ROUNDS)]
    found, rate = rounds[-1], max(map(_rate, rounds))
    result |= {"sae_lens_tokens_per_second": rate, "vs_sae_lens": own / rate}
    # Both hold the sentence ends of the passages; SAELens has no way to keep less than all tokens.
    return result | {"bytes_vs_sae_lens": figures["bytes"] / figures["tokens"] / found["bytes_a_token"]}


def workers(folder: Path, texts: list[str], figures: dict[str, Any]) -> dict[str, Any]:
    """Two actors of one core each beside one, and two bare loops beside one, which is all that this machine gives."""
    common = {"corpus": "many", "cpus": 1, "layer": WORKERS_LAYER, "kilobytes": 8}
    options = {"corpus": "many", "layer": WORKERS_LAYER, "threads": 1}
    rates: dict[str, list[float]] = {"one_worker": [], "two_workers": [], "one_process": [], "two_processes": []}
    for number in range(ROUNDS):
        runs = [{**common, "target": f"out-{n}-{number}", "num_actors": n} for n in (1, 2)]
        one, two = run_part("pass", folder, {"runs": runs, "threads": 1})
        rates["one_worker"].append(one["tokens_per_second"])
        rates["two_workers"].append(two["tokens_per_second"])
        rates["one_process"].append(_rate(run_part("loop", folder, options)))
        beside = options | {"beside": 2, "number": number}
        rates["two_processes"].append(sum(map(_rate, run_parts("loop", folder, [beside] * 2))))
    best = {name: max(found) for name, found in rates.items()}
    return {
        "two_worker_speedup": best["two_workers"] / best["one_worker"],
        "two_process_ceiling": best["two_processes"] / best["one_process"],
        "workers_rounds": rates,
    }


def memory(folder: Path, texts: list[str], figures: dict[str, Any]) -> dict[str, Any]:
    """Ten times the corpus beside once, each with a Ray of its own; one block deep, since depth holds nothing more."""
    peaks, actors = [], []
    for corpus in ("small", "large"):
        run = {"corpus": corpus, "target": f"out-{corpus}", "num_actors": 1, "cpus": 2, "layer": 1}
        (found,) = run_part("pass", folder, {"runs": [run]})
        peaks.append(found["peak"])
        actors.append(found["actor_rss_gb"])
    return {"rss_ratio_10x": peaks[1] / peaks[0], "actor_rss_ratio_10x": actors[1] / actors[0], "peak_gb": [p / 1e9 for p in peaks]}  # fmt: skip


def run_part(part: str, folder: Path, options: dict[str, Any], python: Path | str = sys.executable) -> Any:
    """What one process of `extraction_parts.py` found."""
    return run_parts(part, folder, [options], python)[0]


def run_parts(
    part: str, folder: Path, options: Sequence[dict[str, Any]], python: Path | str = sys.executable
) -> list[Any]:
    """What processes of `extraction_parts.py` found that ran at once, one for each of `options`."""
    processes = [_start(part, folder, one, python) for one in options]
    ended = [(process, *process.communicate()) for process in processes]
    for process, said, errors in ended:
        if process.returncode:
            raise SystemExit(f"{part} failed:\n{errors[-3000:]}")
        print(f"{part}: {said.splitlines()[-1][:300]}", flush=True)
    return [json.loads(said.splitlines()[-1]) for _, said, _ in ended]


def _start(part: str, folder: Path, options: dict[str, Any], python: Path | str) -> "subprocess.Popen[str]":
    threads = str(options.get("threads", 2))
    # Only ours must be importable there: the peers' environment has its own versions of the rest.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    command = [str(python), str(HERE / "extraction_parts.py"), part, str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _rate(found: dict[str, float]) -> float:
    return found["tokens"] / found["seconds"]


def show(figures: dict[str, Any]) -> None:
    """Print the figures and the bounds as tables."""
    for name in (
        "tokens_per_second",
        "bare_tokens_per_second",
        "bfloat16_tokens_per_second",
        "bfloat16_bare_tokens_per_second",
        "bfloat16_vs_float32_bare",
        "reference_tokens_per_second",
        "sae_lens_tokens_per_second",
    ):
        if name in figures:
            print(f"  {name:<32}{figures[name]:9,.{2 if '_vs_' in name else 0}f}")
    for name, (relation, bound) in BOUNDS.items():
        if name in figures:
            met = figures[name] <= bound if relation == "<=" else figures[name] >= bound
            print(f"  {name:<32}{figures[name]:9.3f}  {relation} {bound:<6}{'' if met else '  MISSED'}")
    if "same_order" in figures:
        low, high = figures["same_order_interval"]
        print(
            f"  same order in bfloat16: {low:.3f} to {high:.3f} with 95 % confidence, of {figures['order_pairs']:,} pairs"
        )
    if "bfloat16_vs_float32" not in figures:
        print(
            "  bfloat16 is left out: these cores do not multiply it natively (avx512_bf16). --dtypes float32 bfloat16 runs it anyway."
        )
    print(f"written to {OUT}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
