"""SARM and pairs (and corpus) -> contexts/v1: for each latent the texts that make it fire, how often it does, and which part drives it.

python jobs/collect_contexts.py demo
python jobs/collect_contexts.py demo --redo-from collect_contexts --contexts.split heldout --contexts.corpus
ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/collect_contexts.py demo
"""

from sarm.commands.command import Command
from sarm.settings.jobs import CollectContexts
from sarm.settings.presets import PRESETS


def main(config: CollectContexts) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


COMMAND = Command(settings=CollectContexts, main=main, about=__doc__, presets=PRESETS, needs=("train",))
