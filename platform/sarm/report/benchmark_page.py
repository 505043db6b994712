"""From the measures of an evaluation to its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from sarm.evaluate.benchmarks.benchmark import Benchmark
from sarm.evaluate.benchmarks.registry import BENCHMARKS
from sarm.report.numbers import share, span
from sarm.report.pages import Dots, Page, Section

_BAD_ROWS_SHOWN = 50


def build_page(content: Mapping[str, Any]) -> Page:
    """The page of `report.json`."""
    sections: list[Section] = []
    notes = list(content["notes"])
    for name, one in content["benchmarks"].items():
        sections += _benchmark(BENCHMARKS[name], one)
    bad = [row for one in content["benchmarks"].values() for row in (*one["left_out"], *one["unscored"])]
    if bad:
        shown = bad[:_BAD_ROWS_SHOWN]
        text = f"{len(bad)} rows have no part in the figures{', the first of them' if len(bad) > len(shown) else ''}:"
        rows = [(row["where"], row["reason"]) for row in shown]
        sections.append(Section(title="Rows left out", text=text, columns=("row", "reason"), rows=rows))
    return Page(title=content["title"], facts=content["facts"], notes=notes, sections=sections)


def _benchmark(benchmark: Benchmark, one: Mapping[str, Any]) -> list[Section]:
    title = benchmark.title
    if not one["figures"]:
        return [Section(title=title, text=one["note"])]
    main = {name: row for name, row in one["figures"].items() if "/" not in name}
    text = (
        f"{one['num_rows']:,} rows of {one['num_clusters']:,} prompts, {one['num_completions']:,} completions, "
        f"{one['num_truncated']:,} truncated. Dashed: a random score."
    )
    ends = [end for row in main.values() for end in (*row["ci95"], row["random"] or 0.0)]
    dots = Dots(
        rows=[
            {"name": name, "value": row["value"], "ci95": row["ci95"], "label": share(row["value"]), "line": row["random"]}
            for name, row in main.items()
        ],
        low=min(0.0, *ends),
        high=max(1.0, *ends),
    )  # fmt: skip
    columns = ("figure", "score", "95 % interval", "rows", "longest", "shortest", "random")
    rows = [
        (name, share(r["value"]), span(r["ci95"]), r["num_rows"] or "", *(share(r[k]) for k in columns[4:]))
        for name, r in one["figures"].items()
    ]
    sections = [Section(title=title, text=text, dots=dots, columns=columns, rows=rows)]
    sections.append(
        Section(
            title=f"{title}: controls", text=_CONTROLS, columns=("measure", "value"), rows=_controls(benchmark, one)
        )
    )
    if one["probes"]:
        sections.append(
            Section(
                title=f"{title}: robustness",
                text="Share of (correct, wrong) pairs whose order changes when the texts are edited without changing their meaning.",
                columns=("edit", "rows", "flipped", "95 % interval", "accuracy before", "after"),
                rows=[
                    (p, r["num_rows"], share(r["flipped"]), span(r["flipped_ci95"]), share(r["accuracy_before"]), share(r["accuracy_after"]))
                    for p, r in one["probes"].items()
                ],
            )
        )  # fmt: skip
    return sections


_CONTROLS = (
    "Pairwise accuracy over all (correct, wrong) pairs, and what a logistic regression leaves of it for pairs of equal length "
    "and equal markup. Calibration of sigmoid(margin) is measured on one half of the prompts, the temperature is fitted on the other."
)
_LABELS = {
    "accuracy": "pairwise accuracy",
    "length_controlled_accuracy": "accuracy at equal length",
    "length_and_style_controlled_accuracy": "accuracy at equal length and markup",
}


def _controls(benchmark: Benchmark, one: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    controls = one["controls"]
    labels = _LABELS | {own.key: own.label for own in benchmark.controls}
    rows: list[tuple[str, Any]] = [(label, share(controls[key])) for key, label in labels.items() if key in controls]
    if controls["mean_spearman_reward_length"] is not None:
        rows.append(
            ("mean Spearman of reward and length within a prompt", f"{controls['mean_spearman_reward_length']:.3f}")
        )
    if cal := one["calibration"]:
        rows += [
            (
                f"{key.upper() if key != 'brier' else 'Brier score'}",
                f"{cal['raw'][key]:.3f}; at the fitted temperature {cal['scaled'][key]:.3f}",
            )
            for key in ("nll", "brier", "ece")
        ]
        rows.append(("fitted temperature", f"{cal['temperature']:.3g}"))
    return [*rows, *((own.label, share(one[own.key])) for own in benchmark.measures if own.key in one)]  # fmt: skip
