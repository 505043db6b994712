"""`make bench-gpu`: what a card does with the papers' largest shapes, on random weights; nothing is downloaded.

Every figure stands beside what bounds it: the bare product, the bare forward pass, the rate of the disk, other libraries where they are
installed (`make bench-gpu PEERS=1`). `--small` runs the same code on cores in seconds, to see that it is alive; its figures mean nothing.
Writes outputs/bench/gpu.json, which names card, driver and torch.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_shapes import Shapes, llama_config, milliseconds, shapes_of
from torch import Tensor

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import activations_table
from sarm.data.store.activations import ActivationStore, activation_table, write_activation_file
from sarm.data.store.shuffled_rows import Cursor, ShuffledRows, batches
from sarm.engine.ray.machine import PEAKS, this_machine
from sarm.nn.backends import backend_for
from sarm.nn.bags import Bags
from sarm.nn.device_facts import device_facts
from sarm.nn.precision import allow_tf32_
from sarm.nn.topk import TopKSae
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
OUT = ROOT / "outputs" / "bench" / "gpu.json"
PEERS = ROOT / ".venv-bench-gpu" / "bin" / "python"
# Goals, of which none has been measured yet: name, comparison, bound.
GOALS = {
    "sae_step_ms_4096": ("<=", 40.0),
    "sae_vs_sparsify": (">=", 1.3),
    "parquet_to_device_gb_s": (">=", 2.0),
    "extraction_vs_bare_forward": (">=", 0.9),
    "extraction_share_of_peak": (">=", 0.5),
    "reward_tokens_s": (">=", 13_800.0),
    "reward_scaling": (">=", 0.85),
}


class Bench(NamedTuple):
    """What a part is given."""

    device: torch.device
    shapes: Shapes
    is_small: bool
    peers: Path
    """Python of the environment that has other libraries."""
    openai: str
    """A checkout of OpenAI's sparse_autoencoder, which is in no registry; '' without one."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="small shapes on the cores, to see that the code is alive")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--peers", type=Path, default=PEERS, help="Python of the environment that has other libraries")
    parser.add_argument("--openai", default=os.environ.get("OPENAI_SAE", ""), help="a checkout of OpenAI's sparse_autoencoder")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU. --small runs the same on cores.")
        return
    device, shapes = shapes_of(arguments.small)
    bench = Bench(device, shapes, arguments.small, arguments.peers, arguments.openai)
    # As the workers of both trainings do.
    allow_tf32_()
    facts = device_facts(device)
    figures: dict[str, Any] = {"machine": {"card": facts.name, "memory_gb": facts.memory_gb, "driver": _driver(), "torch": torch.__version__, "cuda": torch.version.cuda, "attention": facts.attention, "sae_backend": facts.sae_backend, "is_small": arguments.small}}  # fmt: skip
    for name in arguments.parts:
        started = time.perf_counter()
        figures |= PARTS[name](bench)
        figures[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
        print(f"{name}: {figures[f'{name}_seconds']} s", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2))
    show(figures)


def sae(bench: Bench) -> dict[str, Any]:
    """A step of the papers' largest dictionary, whole and by part, beside the bare product of its encoder and other libraries."""
    found: dict[str, Any] = {}
    device, of = bench.device, bench.shapes
    d, s, k = of.d_in, of.d_sae, of.k
    for batch in of.batches:
        x = torch.randn(batch, d, device=device)
        model = TopKSae(d, s, k)
        model.initialise_(torch.randn(max(1024, k), d), torch.Generator().manual_seed(0))
        learner = Learner(model, SaeSettings(d_sae=s, k=k, batch_size=batch), device)
        found[f"sae_step_ms_{batch}"] = milliseconds(
            device, of.repeats, lambda learner=learner, x=x: learner.step(x, 3e-4)
        )  # type: ignore[misc]
        del learner, model
        _free(device)
    batch = of.batches[0]
    x, weights = torch.randn(batch, d, device=device), torch.randn(s, d, device=device)
    found["sae_bare_product_ms"] = milliseconds(device, of.repeats, lambda: x @ weights.T)
    halves = x.bfloat16(), weights.bfloat16()
    found["sae_bare_product_bf16_ms"] = milliseconds(device, of.repeats, lambda: halves[0] @ halves[1].T)
    found |= _parts(bench, x, weights)
    del x, weights, halves
    _free(device)
    for peer in ("sparsify", "sae_lens"):
        flags = ["--d", d, "--m", s, "--k", k, "--batch", batch, "--device", device.type]
        if told := _peer(bench, peer, "sae_steps.py", [peer, *map(str, flags)], HERE.parent):
            found[f"sae_{peer}_ms"] = 1e3 * sorted(told["seconds"])[len(told["seconds"]) // 2]
            found[f"sae_vs_{peer}"] = found[f"sae_{peer}_ms"] / found[f"sae_step_ms_{batch}"]
    return found


def _parts(bench: Bench, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """The sparse products of a step; latents are drawn at random, and one fires in every row, as in trained dictionaries."""
    device, of, batch = bench.device, bench.shapes, len(x)
    latents = torch.randint(1, of.d_sae, (batch, of.k), device=device).sort(1).values
    latents[:, 0] = 0
    rows = torch.arange(batch, device=device).repeat_interleave(of.k)
    bags = Bags(latents.flatten(), rows, rows, torch.arange(0, batch * of.k, of.k, device=device))
    values, backend = torch.rand(batch * of.k, device=device), backend_for(device)
    grad = torch.randn_like(x)

    def all_gradients() -> object:
        return backend.weight_gradients(x, grad, values, values, bags, of.d_sae)

    bodies: dict[str, Callable[[], object]] = {
        "sae_decode_ms": lambda: backend.decode(weights, values, bags),
        "sae_value_gradients_ms": lambda: backend.value_gradients(grad, weights, bags),
        "sae_weight_gradients_ms": all_gradients,
    }
    if bench.openai:
        theirs, of_rows = _openai_kernels(bench.openai), values.view(batch, of.k)

        def both_gradients() -> object:
            products = theirs.triton_sparse_transpose_dense_matmul
            return [products(latents, of_rows, dense, N=of.d_sae) for dense in (x, grad)]

        bodies |= {
            "sae_openai_decode_ms": lambda: theirs.triton_sparse_dense_matmul(latents, of_rows, weights),
            "sae_openai_value_gradients_ms": lambda: theirs.triton_dense_dense_sparseout_matmul(grad, weights.T, latents),
            "sae_openai_weight_gradients_ms": both_gradients,
        }  # fmt: skip
    else:
        print(
            "skipped: OpenAI's kernels are in no registry. Pass OPENAI_SAE=FOLDER of a checkout of openai/sparse_autoencoder."
        )
    return {name: milliseconds(device, of.repeats, body) for name, body in bodies.items()}


def _openai_kernels(folder: str) -> Any:
    """Their file of kernels alone: the package around it imports what downloads."""
    spec = importlib.util.spec_from_file_location("openai_kernels", Path(folder) / "sparse_autoencoder" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parquet(bench: Bench) -> dict[str, Any]:
    """Stored activations to the device, as one worker of a training reads them: gigabytes a second.

    Once window by window, a batch ahead and without what is looked at first, and once as a store that is verified and then held on the device.
    """
    device, of = bench.device, bench.shapes
    about = {"dtype": "float16", "layer": 1}
    table_schema = activations_table(of.d_in, about)
    with tempfile.TemporaryDirectory() as name:
        stage = StageFolder(Path(name) / "store", ACTIVATIONS_FOLDER, {})
        stage.claim()
        half = of.stored // 2
        for number in range(2):
            blanks = {"int64": 0, "string": "", "int32": 0, "bool": False}
            columns = {field.name: [blanks.get(str(field.type), 0)] * half for field in table_schema}
            columns |= {"row_id": list(range(number * half, (number + 1) * half)), "doc_id": [str(i // 40) for i in range(half)]}  # fmt: skip
            table = activation_table(columns, torch.randn(half, of.d_in), "float16", table_schema)
            write_activation_file(table, stage.folder / f"part-{number:06}.parquet")
        stage.finish({"rows": 2 * half, "activations": json.loads(table_schema.metadata[b"sarm"])})
        store, size = ActivationStore(stage.folder), 2 * of.d_in * 2 * half / 1e9
        windows = ShuffledRows(store, 0.0, window_rows=max(1, of.stored // 4), memory_bytes=0)
        seconds = _read_seconds(windows, of, device)
        started = time.perf_counter()
        held = ShuffledRows(store, 0.0, memory_bytes=1 << 40, device=device)
        held_seconds = _synchronised(device) - started
    return {
        "parquet_to_device_gb_s": size / seconds,
        "parquet_verified_and_held_gb_s": size / held_seconds,
        "held_to_steps_gb_s": size / _read_seconds(held, of, device),
    }


def _read_seconds(rows: ShuffledRows, of: Shapes, device: torch.device) -> float:
    started = time.perf_counter()
    for _ in batches(rows=rows, start=Cursor(0), epochs=1, batch_size=of.batches[0], device=device):
        pass
    return _synchronised(device) - started


def _synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def extraction(bench: Bench) -> dict[str, Any]:
    """Frozen forward passes of an 8B-shaped model through half its blocks: ours, which keeps sentence ends, beside the bare loop."""
    from transformers import LlamaModel

    from sarm.nn.backbone import residuals_at, without_final_norm

    device, of = bench.device, bench.shapes
    with torch.device(device):
        model = without_final_norm(LlamaModel(llama_config(of, of.blocks)).bfloat16()).eval()
    ids = torch.randint(0, 1000, (of.sequences, of.rows), device=device)
    rows = torch.arange(of.sequences, device=device).repeat_interleave(of.rows // 16)
    columns = torch.arange(15, of.rows, 16, device=device).repeat(of.sequences)
    tokens = ids.numel()
    with torch.inference_mode():
        ours = milliseconds(device, of.repeats, lambda: residuals_at(model, [of.blocks], input_ids=ids, rows=rows, columns=columns))  # fmt: skip
        bare = milliseconds(device, of.repeats, lambda: model(ids, use_cache=False))
    rate = tokens / ours * 1e3
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    found = {"extraction_tokens_s": rate, "extraction_bare_tokens_s": tokens / bare * 1e3, "extraction_vs_bare_forward": bare / ours}  # fmt: skip
    if peak := PEAKS.get(this_machine().gpu):
        found["extraction_share_of_peak"] = 2 * weights * rate / peak[0]
    del model
    _free(device)
    return found


def reward(bench: Bench) -> dict[str, Any]:
    """Steps of reward training of the same model at half its blocks, on one card and on all of them, beside other libraries' on one."""
    of, small = bench.shapes, ["--small"] if bench.is_small else []
    cards = 2 if bench.is_small else torch.cuda.device_count()
    runs = {n: _told([sys.executable, str(HERE / "reward_gpu.py"), "--cards", str(n), *small]) for n in {1, cards}}
    one, share = runs[1], of.trained_blocks / of.blocks
    found = {
        "reward_tokens_s": one["tokens_s"] * share,
        "reward_blocks_timed": of.trained_blocks,
        "reward_pairs_s": one["pairs_s"],
        "reward_ways": {n: {key: run[key] for key in ("zero_stage", "recomputes", "batch_tokens")} for n, run in runs.items()},
    }  # fmt: skip
    if cards > 1:
        found |= {"reward_cards": cards, "reward_pairs_s_all": runs[cards]["pairs_s"]}
        found["reward_scaling"] = runs[cards]["pairs_s"] / one["pairs_s"] / cards
    else:
        print("skipped: how reward training scales needs a second card.")
    for peer, needs in (("trl", "trl"), ("openrlhf", "flash_attn")):
        if told := _peer(bench, peer, "reward_peers.py", [peer, *small], HERE, needs):
            found |= {f"reward_{peer}_pairs_s": told["pairs_s"], f"reward_{peer}_attention": told["attention"]}
            found[f"reward_vs_{peer}"] = one["pairs_s"] / told["pairs_s"]
    return found


def _peer(
    bench: Bench, peer: str, script: str, arguments: Sequence[str], folder: Path, needs: str = ""
) -> dict[str, Any]:
    """What a script timed in the environment that has other libraries; nothing, and a line that says why, where one is missing."""
    if not bench.peers.exists():
        print(
            f"skipped: {peer}, since {bench.peers.parent.parent.name} is not there. `make bench-gpu PEERS=1` sets it up."
        )
        return {}
    for module in filter(None, (peer, needs)):
        looked = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if subprocess.run([str(bench.peers), "-c", looked], check=False).returncode:
            print(f"skipped: {peer}, since {bench.peers.parent.parent.name} has no {module}.")
            return {}
    try:
        return _told([str(bench.peers), str(folder / script), *arguments])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no word"])[-1][:200]
        print(f"skipped: {peer} failed: {last}")
        return {}


def _told(command: Sequence[str]) -> dict[str, Any]:
    """The JSON of the last line that a process of its own prints: memory that it took is free when it ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def show(figures: dict[str, Any]) -> None:
    """A line for each figure, with its goal where it has one."""
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_seconds"):
            goal = ""
            if name in GOALS and not figures["machine"]["is_small"]:
                sign, bound = GOALS[name]
                reached = value <= bound if sign == "<=" else value >= bound
                goal = f"   goal {sign} {bound:,g}: {'reached' if reached else 'missed'}"
            print(f"{name:<32}{value:>14,.2f}{goal}")


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "sae": sae,
    "parquet": parquet,
    "extraction": extraction,
    "reward": reward,
}

if __name__ == "__main__":
    sys.exit(main())
