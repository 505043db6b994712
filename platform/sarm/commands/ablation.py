"""Ablation: SAE and reward model of every (layer, width, k, component, seed, further settings), trained and evaluated through Ray Tune.

python tune/ablation.py tiny
python tune/ablation.py smollm2 --dry-run
python tune/ablation.py tiny --sweep.axes sae.architecture=topk,jumprelu reward.lr=1e-6,5e-6 --dry-run
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python tune/ablation.py smollm2
"""

from sarm.commands.command import Command
from sarm.settings.sweep import Ablation
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.sweep.cost import describe_sweep


def main(config: Ablation) -> None:
    from sarm.stages.sweep.run import run_sweep

    print(run_sweep(config).summary())


COMMAND = Command(
    settings=Ablation, main=main, about=__doc__, presets=ABLATIONS, explain=describe_sweep, needs=("train",)
)
