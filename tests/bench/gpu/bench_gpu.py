"""`make bench-gpu`: what a card does with the papers' largest shapes, on random weights; nothing is downloaded.

Every figure stands beside what bounds it: the bare product, the bare forward pass, the rate of the disk. `--small` runs the same code on
cores in seconds, to see that it is alive; its figures mean nothing. Writes outputs/bench/gpu.json, which names card, driver and torch.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sarm.contracts.tables import activations_table
from sarm.engine.ray.machine import PEAKS, this_machine
from sarm.nn.backends import backend_for
from sarm.nn.bags import Bags
from sarm.nn.device_facts import device_facts
from sarm.nn.topk import TopKSae
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner

ROOT = Path(__file__).parents[3]
OUT = ROOT / "outputs" / "bench" / "gpu.json"
# Goals, of which none has been measured yet: name, comparison, bound.
GOALS = {
    "sae_step_ms_4096": ("<=", 40.0),
    "sae_vs_sparsify": (">=", 1.3),
    "parquet_to_device_gb_s": (">=", 2.0),
    "extraction_vs_bare_forward": (">=", 0.9),
    "extraction_share_of_peak": (">=", 0.5),
    "reward_tokens_s": (">=", 13_800.0),
}


class Shapes(NamedTuple):
    """Sizes of everything that is timed."""

    d_in: int
    d_sae: int
    k: int
    batches: tuple[int, ...]
    blocks: int
    d_ff: int
    heads: int
    key_heads: int
    rows: int
    """Tokens of a sequence."""
    sequences: int
    stored: int
    """Activations in the Parquet file."""
    repeats: int


LARGE = Shapes(4096, 65536, 192, (4096, 32768), 16, 14336, 32, 8, 1024, 16, 200_000, 5)
SMALL = Shapes(64, 512, 8, (64, 256), 2, 128, 4, 2, 32, 4, 2_000, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="small shapes on the cores, to see that the code is alive")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU. --small runs the same on cores.")
        return
    device, shapes = (torch.device("cpu"), SMALL) if arguments.small else (torch.device("cuda"), LARGE)
    facts = device_facts(device)
    figures: dict[str, Any] = {"machine": {"card": facts.name, "memory_gb": facts.memory_gb, "driver": _driver(), "torch": torch.__version__, "cuda": torch.version.cuda, "attention": facts.attention, "sae_backend": facts.sae_backend, "is_small": arguments.small}}  # fmt: skip
    for name in arguments.parts:
        started = time.perf_counter()
        figures |= PARTS[name](device, shapes)
        figures[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
        print(f"{name}: {figures[f'{name}_seconds']} s", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2))
    show(figures)


def milliseconds(device: torch.device, repeats: int, body: Callable[[], object]) -> float:
    """Median of the body's time, by the device's own clock; once before, to compile and to allocate."""
    body()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            body()
            ended.record()
            torch.cuda.synchronize()
            found.append(began.elapsed_time(ended))
        else:
            started = time.perf_counter()
            body()
            found.append((time.perf_counter() - started) * 1e3)
    return statistics.median(found)


def sae(device: torch.device, of: Shapes) -> dict[str, Any]:
    """A step of the papers' largest dictionary, whole and by part, beside the bare product of its encoder and sparsify."""
    found: dict[str, Any] = {}
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
    found |= _parts(device, of, x, weights)
    if importlib.util.find_spec("sparsify") is not None:
        found["sae_sparsify_ms"] = milliseconds(device, of.repeats, _sparsify(device, of, x))
        found["sae_vs_sparsify"] = found["sae_sparsify_ms"] / found[f"sae_step_ms_{batch}"]
    return found


def _parts(device: torch.device, of: Shapes, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """The sparse products of a step; latents are drawn at random, and one fires in every row, as in trained dictionaries."""
    batch = len(x)
    latents = torch.randint(1, of.d_sae, (batch, of.k), device=device).sort(1).values
    latents[:, 0] = 0
    rows = torch.arange(batch, device=device).repeat_interleave(of.k)
    bags = Bags(latents.flatten(), rows, rows, torch.arange(0, batch * of.k, of.k, device=device))
    values, backend = torch.rand(batch * of.k, device=device), backend_for(device)
    grad = torch.randn_like(x)

    def all_gradients() -> object:
        return backend.weight_gradients(x, grad, values, values, bags, of.d_sae)

    return {
        "sae_decode_ms": milliseconds(device, of.repeats, lambda: backend.decode(weights, values, bags)),
        "sae_value_gradients_ms": milliseconds(
            device, of.repeats, lambda: backend.value_gradients(grad, weights, bags)
        ),
        "sae_weight_gradients_ms": milliseconds(device, of.repeats, all_gradients),
    }


def _sparsify(device: torch.device, of: Shapes, x: Tensor) -> Callable[[], object]:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(of.d_in, SparseCoderConfig(num_latents=of.d_sae, k=of.k), dtype=torch.float32, device=device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4, fused=device.type == "cuda")

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x=x, y=x, dead_mask=None).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parquet(device: torch.device, of: Shapes) -> dict[str, Any]:
    """Stored activations from a Parquet file, as extraction writes them, to the device, in 16 bits: gigabytes a second of one process."""
    width = 2 * of.d_in
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        raw = np.random.default_rng(0).integers(0, 2**15, of.stored * of.d_in, dtype=np.int16)
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), of.stored, [None, pa.py_buffer(raw)])
        field = activations_table(of.d_in, {"dtype": "float16", "layer": 1}).field("activation")
        pq.write_table(pa.table([column.cast(field.type)], names=["activation"]), path, write_page_checksum=True, compression="none", use_dictionary=False)  # fmt: skip

        def read() -> object:
            moved = 0
            for batch in pq.ParquetFile(path, page_checksum_verification=True).iter_batches(batch_size=8192):
                buffer = batch.column(0).buffers()[1]
                rows = torch.frombuffer(buffer, dtype=torch.int16)
                rows = rows.pin_memory() if device.type == "cuda" else rows
                moved += rows.to(device, non_blocking=True).numel()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return moved

        read()
        started = time.perf_counter()
        moved = read()
        seconds = time.perf_counter() - started
    return {"parquet_to_device_gb_s": 2 * moved / seconds / 1e9}  # type: ignore[operator]


def extraction(device: torch.device, of: Shapes) -> dict[str, Any]:
    """Frozen forward passes of an 8B-shaped model through half its blocks: ours, which keeps sentence ends, beside the bare loop."""
    from sarm.nn.backbone import residuals_at

    model = _backbone(device, of, torch.bfloat16).eval()
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


def reward(device: torch.device, of: Shapes) -> dict[str, Any]:
    """Forward and backward passes of the same model in training, blocks recomputed, products in bfloat16: tokens a second."""
    blocks = min(of.blocks, 8)
    model = _backbone(device, of, torch.float32, blocks).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1000, (max(1, of.sequences // 2), of.rows), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    rate = ids.numel() / milliseconds(device, of.repeats, step) * 1e3
    del model
    _free(device)
    # Of half the blocks, so that any card of 40 GB holds them: the time goes with the number of blocks.
    return {"reward_tokens_s": rate * blocks / of.blocks, "reward_blocks_timed": blocks}


def _backbone(device: torch.device, of: Shapes, dtype: torch.dtype, blocks: int | None = None) -> Any:
    from transformers import LlamaConfig, LlamaModel

    from sarm.nn.backbone import without_final_norm

    config = LlamaConfig(hidden_size=of.d_in, intermediate_size=of.d_ff, num_attention_heads=of.heads, num_key_value_heads=of.key_heads, num_hidden_layers=blocks or of.blocks, vocab_size=32000, attn_implementation="sdpa")  # fmt: skip
    with torch.device(device):
        return without_final_norm(LlamaModel(config).to(dtype))


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


PARTS: dict[str, Callable[[torch.device, Shapes], dict[str, Any]]] = {
    "sae": sae,
    "parquet": parquet,
    "extraction": extraction,
    "reward": reward,
}

if __name__ == "__main__":
    sys.exit(main())
