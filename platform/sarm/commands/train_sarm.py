"""pairs/v1 and the SAE -> a SARM, and a scalar head on the same backbone to compare it with.

python jobs/train_sarm.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/train_sarm.py demo
"""

from sarm.commands.command import Command
from sarm.settings.jobs import TrainSarm
from sarm.settings.presets import PRESETS


def main(config: TrainSarm) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


COMMAND = Command(settings=TrainSarm, main=main, about=__doc__, presets=PRESETS, needs=("train",))
