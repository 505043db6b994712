"""RewardBench, version 1 (arXiv 2403.13787): share of pairs won, by subset, and the weighted means of four sections.

A section is sum_s n_s acc_s / sum_s n_s over its subsets, with the published counts n_s; `math-prm` (447 pairs) weighs as
much as the six code subsets together. An equal reward is a loss. Overall is the plain mean of the sections.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sarm.evaluate.benchmarks.benchmark import Benchmark, Parsed
from sarm.evaluate.benchmarks.fields import prompt_in, subset_in, texts_in
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow, collect

_CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984, **dict.fromkeys(_CODE, 164)},
}  # fmt: skip
# The published number of rows; the weights in sections are these but for one subset.
SUBSETS = {subset: num for sizes in SECTIONS.values() for subset, num in sizes.items()} | {"math-prm": 447}


def parse(fields: Mapping[str, Any]) -> Parsed:
    """id, prompt, chosen, rejected, subset."""
    prompt = prompt_in(fields)
    chosen, rejected = texts_in(fields, "chosen", 1), texts_in(fields, "rejected", 1)
    return Parsed(prompt, chosen, rejected, subset_in(fields, "subset"))


def observe(rows: Sequence[ScoredRow]) -> Observations:
    """1 for each row whose chosen completion scores strictly higher than the rejected one."""
    return collect((row.subset, row, float(row.scores[0] > row.scores[1])) for row in rows)


def combine(means: Mapping[str, Any]) -> dict[str, Any]:
    """Sections (those with a subset that is there), `overall`, then the subsets."""
    figures: dict[str, Any] = {}
    for section, sizes in SECTIONS.items():
        present = [subset for subset in sizes if subset in means]
        if present:
            figures[section] = sum(means[s] * sizes[s] for s in present) / sum(sizes[s] for s in present)
    overall = {"overall": sum(figures.values()) / len(figures)} if figures else {}
    return {**figures, **overall, **means}


REWARD_BENCH = Benchmark(
    name="reward_bench",
    title="RewardBench",
    prefix="rb1",
    parse=parse,
    observe=observe,
    combine=combine,
    data_set="hf:allenai/reward-bench:filtered",
    scores_empty=True,
    subsets=SUBSETS,
)
