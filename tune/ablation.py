"""Ablation: SAE and reward model of every (layer, width, k, component, seed), trained and evaluated through Ray Tune.

python tune/ablation.py tiny
python tune/ablation.py smollm2 --dry-run
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python tune/ablation.py smollm2
"""

from sarm.runtime.job import run_job
from sarm.runtime.sweeps.sweep_cost import describe_sweep
from sarm.tune_config import Ablation
from sarm.tune_presets import ABLATIONS


def main(config: Ablation) -> None:
    from sarm.runtime.sweeps.sweep import run_sweep

    print(run_sweep(config).summary())


if __name__ == "__main__":
    run_job(Ablation, main, __doc__ or "", presets=ABLATIONS, explain=describe_sweep)
