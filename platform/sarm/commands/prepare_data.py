"""Sources -> corpus/v1 and pairs/v1: cleaned, de-duplicated, split by the hash of the prompt.

    python jobs/prepare_data.py demo
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py demo

With --inspect instead of a preset: show what a source is taken for, its rows by reason and some of them as a model reads them.

    python jobs/prepare_data.py --inspect tiny:pairs
    python jobs/prepare_data.py --inspect tiny:texts --rows 100 --examples 2
    python jobs/prepare_data.py --inspect x --help     every flag of this form
"""

from sarm.commands.command import Command
from sarm.settings.inspection import Inspecting
from sarm.settings.jobs import PrepareData
from sarm.settings.presets import PRESETS


def main(config: PrepareData) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


def show(settings: Inspecting) -> None:
    from sarm.stages.inspect_source import inspect

    inspect(settings)


COMMAND = Command(
    settings=PrepareData,
    main=main,
    about=__doc__,
    presets=PRESETS,
    needs=("train",),
    other={("--inspect",): Command(settings=Inspecting, main=show, about=__doc__)},
)
