"""Named ablations. Any flag overrides any value: `python tune/ablation.py tiny --sweep.ks 4 8 16`."""

from dataclasses import replace
from pathlib import Path

from sarm.settings.jobs import Pipeline
from sarm.settings.presets import demo_papers, sarm_1b, sarm_4b
from sarm.settings.presets import tiny as tiny_pipeline
from sarm.settings.sweep import Ablation, SweepSettings


def _ablation(base: Pipeline, name: str, sweep: SweepSettings, **changed: object) -> Ablation:
    # Baselines are cells of their own here.
    parts = {**vars(base), "reward": replace(base.reward, baselines=()), **changed}
    parts["run"] = replace(base.run, out=Path("outputs") / name)
    return Ablation(**parts, sweep=sweep)


tiny = _ablation(
    tiny_pipeline,
    "ablation-tiny",
    SweepSettings(
        layers=(1, 2), widths=(2, 4), ks=(8,), components=("sarm", "scalar"), centre=(1, 4, 8), report_steps=5
    ),
)

# Sized by the demo, whose reward training took 262 s on two cores: fourteen such trainings, at half to three quarters of the depth.
smollm2 = _ablation(
    demo_papers,
    "ablation-smollm2",
    SweepSettings(
        layers=(8, 15, 22),
        widths=(8, 16),
        ks=(14, 27),
        components=("sarm", "random_encoder", "random_directions", "scalar"),
        centre=(15, 16, 27),
        centre_seeds=(1, 2),
        cpus_per_trial=1,
    ),
    # Half of the pairs are held out: cells differ by a few percent, and scoring a pair costs a third of learning from it. All 1,715
    # pairs took 103 minutes; what tells cells apart is the 101 prompts, and those all stay.
    data=replace(demo_papers.data, heldout_share=0.5, max_pairs_per_prompt=30),
    # Of the demo's 20 s for one SAE: six learn from one read here.
    sae=replace(demo_papers.sae, text_epochs=5, chat_epochs=20),
)

# A sweep to look at first: what one more block, a wider dictionary and a plain head each change, on a third of the pairs.
demo_sweep = replace(
    smollm2,
    run=replace(smollm2.run, out=Path("outputs/ablation-demo")),
    data=replace(smollm2.data, max_pairs_per_prompt=12),
    sweep=SweepSettings(
        layers=(15,), widths=(8, 16), ks=(27,), components=("sarm", "scalar"), centre=(15, 16, 27), cpus_per_trial=1
    ),
)

# SARM table 3, with the components of table 2 at the centre.
paper_3b = _ablation(
    sarm_1b,
    "ablation-3b",
    SweepSettings(
        layers=(7, 10, 14, 21, 28),
        widths=(8, 12, 16, 24, 32),
        ks=(48, 96, 144, 196, 240),
        components=("sarm", "random_encoder", "random_linear", "token_sae", "scalar"),
        seeds=(0, 1, 2),
        design="axes",
        centre=(14, 16, 144),
    ),
)

# SARM table 2, at the size it was measured, with the neighbours of its centre on each axis.
paper_8b = _ablation(
    sarm_4b,
    "ablation-8b",
    SweepSettings(
        layers=(8, 16, 24),
        widths=(8, 16, 32),
        ks=(64, 192, 320),
        components=("sarm", "random_encoder", "random_linear", "token_sae", "scalar", "scalar_full"),
        seeds=(0, 1, 2),
        design="axes",
        centre=(16, 16, 192),
    ),
)

ABLATIONS: dict[str, tuple[str, Ablation]] = {
    "tiny": ("2 layers x 2 widths of a random Llama on made-up data: minutes, offline, for tests", tiny),
    "demo": (
        "SmolLM2-135M-Instruct at one layer: two widths and a scalar head, about 15 minutes on 2 cores",
        demo_sweep,
    ),
    "smollm2": (
        "SmolLM2-135M-Instruct, 3 layers x 2 widths x 2 k and two baselines: about 90 minutes on 2 cores",
        smollm2,
    ),
    "paper-3b": ("SARM tables 2 and 3 on Llama-3.2-3B-Instruct: one axis at a time, 3 seeds", paper_3b),
    "paper-8b": ("SARM table 2 on Llama-3.1-8B-Instruct, and its neighbours on each axis, 3 seeds", paper_8b),
}
