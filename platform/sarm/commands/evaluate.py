"""Score held-out pairs, measure with intervals beside the baselines, attribute rewards to features, write the report.

    python jobs/evaluate.py demo
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/evaluate.py demo

With --model instead of a preset: score benchmarks with any reward model, each figure with its interval.

    python jobs/evaluate.py --model outputs/demo/sarm --benchmarks reward_bench_2=safety.jsonl.gz rm_bench=chat.jsonl --out outputs/benchmarks
    python jobs/evaluate.py --model x --help     every flag of this form
"""

from sarm.commands.command import Command
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.jobs import Evaluate
from sarm.settings.presets import PRESETS


def main(config: Evaluate) -> None:
    from sarm.stages.chain import run_chain

    files, content = run_chain(config)["evaluate"]
    from sarm.report.summary import print_summary

    print_summary(content, files.html)


def benchmark(settings: Benchmarking) -> None:
    from sarm.stages.benchmark import run_benchmarks

    run_benchmarks(settings)


COMMAND = Command(
    settings=Evaluate,
    main=main,
    about=__doc__,
    presets=PRESETS,
    needs=("train",),
    other={("--model", "--benchmarks"): Command(settings=Benchmarking, main=benchmark, about=__doc__)},
)
