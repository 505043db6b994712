"""Run by the interpreter of `make test-official`: random cases in as JSON, the published package's figures out."""

import json
import sys
import warnings

import numpy as np
from datasets import Dataset, disable_progress_bars
from rewardbench import __version__
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset


def credits_of(rows: list[list[float]]) -> list[float]:
    """What the package gives each best-of-n row."""
    flat = Dataset.from_dict(
        {
            "text": ["" for row in rows for _ in row],
            "scores": [score for row in rows for score in row],
            "row": [i for i, row in enumerate(rows) for _ in row],
        }
    )
    found = reroll_and_score_dataset(flat, [len(row) for row in rows])
    return [float(result) for result in found["results"]]


def main() -> None:
    cases = json.load(sys.stdin)
    disable_progress_bars()
    warnings.simplefilter("ignore")
    flat = credits_of([row for case in cases["best_of_n"] for row in case])
    best_of_n = []
    for case in cases["best_of_n"]:
        results, flat = flat[: len(case)], flat[len(case) :]
        best_of_n.append(sum(results) / len(results))
    ties = [float(process_single_model(Dataset.from_list(case))[1]) for case in cases["ties"]]
    sections = []
    for case in cases["reward_bench"]:
        results = {s: [1 if chosen > rejected else 0 for chosen, rejected in pairs] for s, pairs in case.items()}
        accuracy = {s: sum(own) / len(own) for s, own in results.items()}
        sections.append(calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracy))
    ties = [None if np.isnan(value) else value for value in ties]
    json.dump({"version": __version__, "best_of_n": best_of_n, "ties": ties, "reward_bench": sections}, sys.stdout)


if __name__ == "__main__":
    main()
