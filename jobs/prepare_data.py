"""Sources -> corpus/v1 and pairs/v1: cleaned, de-duplicated, split by the hash of the prompt.

    python jobs/prepare_data.py demo
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py demo

With --inspect instead of a preset: show what a source is taken for, its rows by reason and some of them as a model reads them.

    python jobs/prepare_data.py --inspect tiny:pairs
    python jobs/prepare_data.py --inspect tiny:texts --rows 100 --examples 2
    python jobs/prepare_data.py --inspect x --help     every flag of this form
"""

import sys

from sarm.settings.inspection import Inspecting
from sarm.settings.jobs import PrepareData
from sarm.stages.job import run_command, run_job


def main(config: PrepareData) -> None:
    from sarm.stages.chain import run_chain

    run_chain(config)


def show(settings: Inspecting) -> None:
    from sarm.stages.inspect_source import inspect

    inspect(settings)


if __name__ == "__main__":
    if any(argument.partition("=")[0] == "--inspect" for argument in sys.argv[1:]):
        run_command(Inspecting, show, __doc__ or "")
    else:
        run_job(PrepareData, main, __doc__ or "")
