"""activations/v1 -> a sparse autoencoder, trained on sentence ends and then on chat ends.

python jobs/train_sae.py demo
python jobs/train_sae.py demo --also.d-sae 4608 18432 --also.k 13 54
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/train_sae.py demo
"""

from sarm.commands.command import Command
from sarm.settings.jobs import TrainSae
from sarm.settings.presets import PRESETS


def main(config: TrainSae) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


COMMAND = Command(settings=TrainSae, main=main, about=__doc__, presets=PRESETS, needs=("train",))
