"""The benchmarks that can be asked for, in the order in which reports have them."""

from sarm.evaluate.benchmarks.benchmark import Benchmark
from sarm.evaluate.benchmarks.best_of_n import BEST_OF_N
from sarm.evaluate.benchmarks.pairs import PAIRS
from sarm.evaluate.benchmarks.reward_bench import REWARD_BENCH
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.benchmarks.rm_bench import RM_BENCH
from sarm.settings.checks import UserError

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (REWARD_BENCH_2, RM_BENCH, REWARD_BENCH, PAIRS, BEST_OF_N)
}


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of this name. Raises UserError for an unknown one."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name}. Known are {', '.join(BENCHMARKS)}. Pass --benchmarks NAME=SOURCE.")
    return BENCHMARKS[name]
