"""What the parts of `make bench-gpu` share: sizes, made-up pairs, and how a body of code is timed."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

VOCABULARY = 32000


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
    """Activations in the Parquet files."""
    step_pairs: int
    """Pairs of a step of reward training."""
    steps: int
    repeats: int

    @property
    def trained_blocks(self) -> int:
        """Half of them, so that any card of 40 GB holds their training: the time goes with the number of blocks."""
        return max(1, self.blocks // 2)


LARGE = Shapes(4096, 65536, 192, (4096, 32768), 16, 14336, 32, 8, 1024, 16, 200_000, 64, 4, 5)
SMALL = Shapes(64, 512, 8, (64, 256), 2, 128, 4, 2, 32, 4, 2_000, 8, 3, 2)


def shapes_of(is_small: bool) -> tuple[torch.device, Shapes]:
    """The device and the sizes: small ones are for the cores, to see that the code is alive."""
    return (torch.device("cpu"), SMALL) if is_small else (torch.device("cuda"), LARGE)


def drawn_pairs(of: Shapes, num_pairs: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of chosen and rejected answers, each behind their prompt; at the large sizes some 1,000 tokens a pair in the median.

    Lengths are drawn from lognormals, and fitted to no data set.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num_pairs):
        prompt, *answers = (
            rng.integers(3, VOCABULARY, int(np.clip(rng.lognormal(np.log(middle), 0.6), 2, of.rows // 2))).tolist()
            for middle in (of.rows / 5, of.rows / 3.5, of.rows / 3.5)
        )
        chosen, rejected = ([*prompt, *answer] for answer in answers)
        found.append((chosen, rejected))
    return found


def llama_config(of: Shapes, blocks: int) -> Any:
    """Of a Llama of these widths."""
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=of.d_in, intermediate_size=of.d_ff, num_attention_heads=of.heads, num_key_value_heads=of.key_heads, num_hidden_layers=blocks, vocab_size=VOCABULARY, pad_token_id=0, attn_implementation="sdpa")  # fmt: skip


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


class StepClock:
    """Seconds between the ends of steps, of which the first compiles and allocates and is left out."""

    def __init__(self, device: torch.device):
        self._device, self._ends = device, [time.perf_counter()]

    def step(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return np.diff(self._ends)[1:].tolist()
