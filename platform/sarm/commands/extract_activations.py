"""corpus/v1 and pairs/v1 -> activations/v1: the residual stream at sentence ends and at rewarded tokens.

python jobs/extract_activations.py demo
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/extract_activations.py demo
"""

from sarm.commands.command import Command
from sarm.settings.jobs import ExtractActivations
from sarm.settings.presets import PRESETS


def main(config: ExtractActivations) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


COMMAND = Command(settings=ExtractActivations, main=main, about=__doc__, presets=PRESETS, needs=("train",))
