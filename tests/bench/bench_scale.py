"""`make bench BENCH=scale`: the papers' largest run on 1 to 64 H100 by simulation, with and without lost nodes. No GPU is used.

Writes outputs/bench/scale.json and prints the tables of docs/scale.md.
"""

import json
from pathlib import Path
from typing import Any

from tests.bench.scale_model import Machines, Outcome, Step, block_seconds, pass_over_blocks, reward_steps, training

from sarm.data.formats.model_shapes import KNOWN_MODELS
from sarm.engine.ray.machine import BANDWIDTHS, PEAK_SHARE, PEAKS, REFERENCE_GPU
from sarm.settings.presets import PRESETS
from sarm.stages.dry_run.formulas import reward_flops
from sarm.stages.dry_run.scaling import SPREAD_OF_LENGTHS, reward_gradient_bytes, sae_gradient_bytes, sae_step_seconds

OUT = Path(__file__).parents[2] / "outputs" / "bench" / "scale.json"
GPUS = (1, 2, 4, 8, 16, 32, 64)
TOKENS, ROWS, PAIRS, TOKENS_A_PAIR = 1e9, 50e6, 75_460, 1000
# A block is a megabyte of text, at 4.4 characters a token.
BLOCK_TOKENS, BLOCK_SPREAD = 1024 * 1024 / 4.4, 0.1
# Of the time that a stage takes without them.
LOSSES = (0.35, 0.7)
PRESET = PRESETS["sarm-4b"][1]
SHAPE = KNOWN_MODELS[PRESET.model.name].shape
RATE = PEAKS[REFERENCE_GPU][0] * PEAK_SHARE


def main() -> None:
    found = {stage: {gpus: _both(stage, gpus) for gpus in GPUS} for stage in STAGES}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"is_simulation": True, "gpu": REFERENCE_GPU, "stages": found}, indent=2))
    for stage, rows in found.items():
        print(
            f"\n{stage}\n| GPUs | hours | speed-up | idle | network a node | with two losses | redone |\n|---|---|---|---|---|---|---|"
        )
        alone = rows[1]["undisturbed"]["seconds"]
        for gpus, row in rows.items():
            whole, lost = row["undisturbed"], row["two losses"]
            print(
                f"| {gpus} | {whole['seconds'] / 3600:.2f} | {alone / whole['seconds']:.1f} | {whole['idle_share']:.0%} | {_bytes(whole['network_gb'])} "
                f"| +{(lost['seconds'] - whole['seconds']) / 60:.0f} min | {lost['redone_share']:.1%} |"
            )


def extraction(gpus: int, losses: tuple[float, ...]) -> Outcome:
    """A billion tokens through 16 blocks of the 8B model."""
    seconds_a_token = 2.0 * SHAPE.weights_a_block * PRESET.model.layer / RATE
    return pass_over_blocks(block_seconds(TOKENS, BLOCK_TOKENS, seconds_a_token, BLOCK_SPREAD), Machines(gpus), losses)


def sae(gpus: int, losses: tuple[float, ...]) -> Outcome:
    """50 million rows through the dictionary of 65,536 latents, rows dealt over the GPUs."""
    settings, d = PRESET.sae, SHAPE.d_in
    peak, bandwidth = PEAKS[REFERENCE_GPU][0], BANDWIDTHS[REFERENCE_GPU]
    each = sae_step_seconds(d, settings, settings.batch_size / gpus, peak, PEAK_SHARE, bandwidth)
    step = Step(each, each * gpus, sae_gradient_bytes(d, settings.d_sae))
    return training([step] * round(ROWS / settings.batch_size), Machines(gpus), losses)


def sarm(batch_pairs: int, gpus: int, losses: tuple[float, ...]) -> Outcome:
    """Three epochs of reward training of the SARM alone, at so many pairs a step."""
    seconds_a_pair = reward_flops(SHAPE, PRESET.model.layer, PRESET.reward, TOKENS_A_PAIR) / PRESET.reward.epochs / RATE
    reduced = reward_gradient_bytes(SHAPE.weights_a_block * PRESET.model.layer, PRESET.reward.precision)
    steps = round(PAIRS * PRESET.reward.epochs / batch_pairs)
    return training(list(reward_steps(steps, batch_pairs, gpus, seconds_a_pair, SPREAD_OF_LENGTHS, reduced)), Machines(gpus), losses)  # fmt: skip


STAGES = {
    "extraction": extraction,
    "SAE": sae,
    "SARM, 8 pairs a step": lambda gpus, losses: sarm(8, gpus, losses),
    "SARM, 64 pairs a step": lambda gpus, losses: sarm(64, gpus, losses),
}


def _both(stage: str, gpus: int) -> dict[str, Any]:
    whole = STAGES[stage](gpus, ())
    lost = STAGES[stage](gpus, tuple(share * whole.seconds for share in LOSSES))
    return {"undisturbed": whole._asdict(), "two losses": lost._asdict()}


def _bytes(gigabytes: float) -> str:
    return "-" if not gigabytes else f"{gigabytes / 1e3:.1f} TB" if gigabytes >= 1e3 else f"{gigabytes:.0f} GB"


if __name__ == "__main__":
    main()
