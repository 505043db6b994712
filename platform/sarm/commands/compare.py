"""Compare two evaluations row by row: differences with intervals, tests that swap whole prompts, Holm over the subsets; a report and its run in MLflow.

python jobs/compare.py outputs/benchmarks-a outputs/benchmarks-b --out outputs/a-against-b
"""

from sarm.commands.command import Command
from sarm.settings.benchmarks import Comparison


def main(settings: Comparison) -> None:
    from sarm.stages.compare import run_comparison

    run_comparison(settings)


COMMAND = Command(settings=Comparison, main=main, about=__doc__)
