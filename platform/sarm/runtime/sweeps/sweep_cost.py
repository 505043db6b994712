"""What an ablation costs, before it is paid for: cells, stages, GPU-hours, disk, and hours on the cluster at hand.

Loads nothing heavy unless a cluster is named. FLOPs of matrix products alone: forward 2 a weight and token, training 6; an SAE's step at
most 6 d_in d_sae a row.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from sarm.config import Data, as_json
from sarm.runtime.extraction.extraction_cost import (
    CHARACTERS_A_TOKEN,
    KNOWN_SHAPES,
    PAPER_SENTENCES,
    PEAK_FLOPS,
    PEAK_SHARE,
    TOKENS_A_SENTENCE,
)
from sarm.runtime.job import KNOWN_WIDTHS
from sarm.runtime.sweeps.sweep_cells import Cell, check_sweep, layers_of, saes_of
from sarm.tune_config import Ablation

# Measured on SmolLM2 at 15 blocks: what a core reaches in reward training.
CORE_FLOPS = 45e9
# Pairs of a source, and tokens of a pair with its prompt counted once: measured for the demo, assumed for the papers' data.
_KNOWN_PAIRS = {"demo:harm": (1715, 51), "hf:Skywork/Skywork-Reward-Preference-80K-v0.2": (77_000, 1000)}
_OTHER_PAIRS = (10_000, 500)
_TOKENS_A_TEXT = 200
# Starting the workers of a trial, loading its model, and reading it back to score.
_SECONDS_A_CELL = 30


class Sizes(NamedTuple):
    """What the stages work on."""

    text_tokens: float
    pairs: float
    pair_tokens: float

    @property
    def chat_ends(self) -> float:
        return 2 * self.pairs


def describe_sweep(config: Ablation) -> str:
    """The resolved config, then cells, GPU-hours, disk and time, one line each; raises UserError as the sweep would for what it can tell."""
    cells, run = check_sweep(config), config.run
    saes = saes_of(cells, config.extraction.units)
    layers = layers_of(cells, config.model.layer)
    sweep = config.sweep
    lines = [
        as_json(config),
        "",
        f"writes to    {run.out}",
        f"model        {config.model.name}, layers {', '.join(map(str, layers))}, one forward pass for all",
        f"cells        {len(cells)} of {', '.join(sweep.components)}; {len(saes)} SAEs; search {sweep.search}",
    ]
    shape, d_in = KNOWN_SHAPES.get(config.model.name), KNOWN_WIDTHS.get(config.model.name)
    if shape is None or d_in is None:
        return "\n".join([*lines, f"cost         {config.model.name} is not known here, so hours and disk are not"])
    sizes = _sizes(config)
    block = shape.weights_a_block
    rows = {"token": min(sizes.text_tokens, sweep.token_rows)}
    sae, reward = config.sae, config.reward
    flops = {
        "extraction": 2 * block * max(layers) * (sizes.text_tokens + sizes.pair_tokens),
        "SAEs": sum(
            6 * d_in * key.width * d_in
            * (sae.text_epochs * rows.get(key.unit, sizes.text_tokens / TOKENS_A_SENTENCE) + sae.chat_epochs * sizes.chat_ends)
            for key in saes
        ),
        "reward": sum(
            (8 if reward.gradient_checkpointing else 6) * block * _depth(cell, layers) * sizes.pair_tokens * reward.epochs
            for cell in cells
        ),
    }  # fmt: skip
    total = sum(flops.values())
    of_tokens = len({key.layer for key in saes if key.unit == "token"})
    stored = (sizes.text_tokens / TOKENS_A_SENTENCE + sizes.chat_ends) * len(layers) + rows["token"] * of_tokens
    activations = stored * 2 * d_in
    dictionaries = sum(8 * d_in * key.width * d_in for key in saes)
    models = sum(4 * (block * _depth(cell, layers) + d_in * cell.width * d_in * 2) for cell in cells)
    gpu_hours = total / (PEAK_FLOPS * PEAK_SHARE) / 3600
    parts = ", ".join(f"{name} {part / total:.0%}" for name, part in flops.items())
    lines += [
        f"data         {sizes.text_tokens:,.0f} tokens of text, {sizes.pairs:,.0f} training pairs of {sizes.pair_tokens / max(1, sizes.pairs):,.0f} tokens",
        f"compute      {total:.2e} FLOPs: {parts}",
        f"GPU-hours    {gpu_hours:,.2f} of an H100 at {PEAK_SHARE:.0%} of its peak (assumed)",
        f"disk         {(activations + dictionaries + models) / 1e9:,.2f} GB: activations {activations / 1e9:,.2f}, SAEs {dictionaries / 1e9:,.2f}, reward models {models / 1e9:,.2f}",
        *_time(config, cells, total, gpu_hours),
    ]
    return "\n".join(lines)


def _depth(cell: Cell, layers: Sequence[int]) -> int:
    # A whole backbone is at least as deep as the deepest layer asked for.
    return cell.layer or max(layers)


def _sizes(config: Ablation) -> Sizes:
    data = config.data
    try:
        tokens = _counts(config, "corpus")["characters"] / CHARACTERS_A_TOKEN
    except (OSError, ValueError, KeyError):
        tokens = float(PAPER_SENTENCES * TOKENS_A_SENTENCE)
        if data.max_texts is not None:
            tokens = min(tokens, float(data.max_texts * len(data.texts) * _TOKENS_A_TEXT))
    if config.extraction.limit_tokens is not None:
        tokens = min(tokens, config.extraction.limit_tokens)
    pairs, pair_tokens = _pairs(data)
    try:
        # How many of a prompt's pairs are over the cap is known once they have been read.
        counted = _counts(config, "pairs")["splits"]["train"]
    except (OSError, ValueError, KeyError):
        counted = pairs
    return Sizes(tokens, counted, pair_tokens * counted / max(1, pairs))


def _counts(config: Ablation, stage: str) -> dict[str, Any]:
    return dict(json.loads((config.run.out / stage / "manifest.json").read_text())["counts"])


def _pairs(data: Data) -> tuple[float, float]:
    known = [_KNOWN_PAIRS.get(source, _OTHER_PAIRS) for source in data.pairs]
    kept = [(min(count, data.max_pairs or count) * (1 - data.heldout_share), tokens) for count, tokens in known]
    return sum(count for count, _ in kept), sum(count * tokens for count, tokens in kept)


def _time(config: Ablation, cells: Sequence[Cell], flops: float, gpu_hours: float) -> list[str]:
    """Hours on the named cluster, or on this machine."""
    run = config.run
    cores, gpus, where = os.cpu_count() or 1, 0, "this machine"
    if address := run.ray_address or os.environ.get("RAY_ADDRESS"):
        from sarm.runtime.cluster import connect

        with connect(run) as cluster:
            cores, gpus, where = cluster.num_cpus, cluster.num_gpus, f"the cluster at {address}"
    each = max(run.num_workers, run.num_actors)
    overhead = _SECONDS_A_CELL * len(cells) / 3600
    if gpus:
        at_once = max(1, gpus // each)
        return [
            f"time         {gpu_hours / gpus + overhead / at_once:,.2f} hours on {where}: {gpus} GPUs, {at_once} trials at a time"
        ]
    at_once = max(1, cores // (each * (config.sweep.cpus_per_trial or run.cpus_per_worker or cores)))
    hours = flops / (cores * CORE_FLOPS) / 3600 + overhead / at_once
    return [
        f"time         {hours:,.2f} hours on {where}: {cores} cores at {CORE_FLOPS / 1e9:.0f} GFLOP/s (measured in reward training), {at_once} trials at a time"
    ]
