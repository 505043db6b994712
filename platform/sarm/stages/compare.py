"""`jobs/compare.py`: two evaluation folders -> paired statistics -> report with pictures, logged to MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sarm.contracts.figures import plain_values
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, sha256_of, verify_files, write_atomically
from sarm.engine.mlflow.tracking import StageRun, tracking_uri
from sarm.engine.session import tracked_folder
from sarm.engine.terminal import say
from sarm.evaluate.benchmarks.items import scored_rows
from sarm.evaluate.benchmarks.paired import compare
from sarm.evaluate.benchmarks.registry import BENCHMARKS
from sarm.evaluate.benchmarks.suite import metric_name
from sarm.report.figures import as_svg, difference_bars, save_figure
from sarm.report.numbers import share, span
from sarm.report.pages import Dots, Page, Section, write_page
from sarm.settings.benchmarks import Comparison
from sarm.settings.checks import UserError
from sarm.stages.benchmark import BENCHMARK

COMPARISON = "comparison/v1"
# What makes scores of two runs mean different things even for one model.
_PROTOCOL = ("protocol", "protocol_version", "max_length")
_ALPHA = 0.05


def run_comparison(settings: Comparison) -> Path:
    """Compare, report and log; returns the folder. A finished folder of the same two evaluations is left alone.

    Raises UserError if an evaluation is unfinished, has changed or is of an older schema, or the two share no benchmark or differ in a row's prompt.
    """
    tracking_uri(settings.run)
    folders = {"a": settings.run_a, "b": settings.run_b}
    for path in folders.values():
        verify_files(path, read_manifest(path, BENCHMARK))
    reports = {key: json.loads((path / "report.json").read_text()) for key, path in folders.items()}
    common = [name for name in BENCHMARKS if all(name in report["benchmarks"] for report in reports.values())]
    if not common:
        raise UserError(
            f"{folders['a']} and {folders['b']} share no benchmark. Evaluate both on the same --benchmarks."
        )
    inputs = {key: sha256_of(path / MANIFEST) for key, path in folders.items()}
    identity = {"permutations": settings.permutations, "seed": settings.run.seed, **inputs}
    folder = StageFolder(settings.run.out, COMPARISON, identity)
    if folder.finished():
        say(f"already done, {folder.folder}")
        return folder.folder
    items = {key: pq.read_table(path / "items.parquet") for key, path in folders.items()}
    found = {
        name: plain_values(
            compare(
                benchmark=BENCHMARKS[name],
                rows_a=scored_rows(items["a"], name),
                rows_b=scored_rows(items["b"], name),
                permutations=settings.permutations,
                seed=settings.run.seed,
            )
        )
        for name in common
    }
    with tracked_folder(folder, settings.run) as own_run:
        content = {"title": "Comparison of two reward models", **_facts(reports, folders), "benchmarks": found}
        write_atomically(folder.folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False))
        pictures = _pictures(found, folder.folder)
        write_page(_page(content, pictures), folder.folder)
        _log(own_run, content, folder.folder)
        folder.finish({name: one["num_rows"] for name, one in found.items()})
    for name, one in found.items():
        if overall := one["figures"].get("overall"):
            say(f"{name}: A - B = {share(overall['difference'])}, 95 % {span(overall['difference_ci95'])}")
    say(f"report: {folder.folder / 'report.html'}")
    return folder.folder


def _facts(reports: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Any]:
    a, b = reports["a"], reports["b"]
    notes = [
        f"The two runs differ in {field.replace('_', ' ')} ({a['model'][field]} and {b['model'][field]}), so a difference is not the model's alone."
        for field in _PROTOCOL
        if a["model"][field] != b["model"][field]
    ]
    for name in a["benchmarks"].keys() & b["benchmarks"].keys():
        if a["benchmarks"][name]["digest"] != b["benchmarks"][name]["digest"]:
            notes.append(f"{name} was not the same data in both runs; rows are joined by subset and id.")
    return {
        "facts": {"A": a["model"]["name"], "B": b["model"]["name"]},
        "folders": {key: str(path) for key, path in folders.items()},
        "notes": notes,
    }


def _page(content: Mapping[str, Any], pictures: Mapping[str, str]) -> Page:
    sections: list[Section] = []
    for name, one in content["benchmarks"].items():
        title = BENCHMARKS[name].title
        if not one["figures"]:
            sections.append(Section(title=title, text=one["note"]))
            continue
        main = {key: row for key, row in one["figures"].items() if "/" not in key}
        reach = max(0.05, *(abs(end) for row in main.values() for end in row["difference_ci95"]))
        dots = [
            {"name": key, "value": r["difference"], "ci95": r["difference_ci95"], "label": share(r["difference"])}
            for key, r in main.items()
        ]
        sections.append(
            Section(
                title=title,
                text=f"{one['num_rows']:,} rows scored by both, {one['num_unmatched']:,} by one only. A minus B; dashed: no difference.",
                dots=Dots(rows=dots, low=-reach, high=reach, zero=0.0),
                columns=("figure", "A", "B", "A - B", "95 % interval", "p"),
                rows=[
                    (key, share(r["a"]), share(r["b"]), share(r["difference"]), span(r["difference_ci95"]), _p(r["p_swap"]))
                    for key, r in one["figures"].items()
                ],
            )
        )  # fmt: skip
        sections.append(
            Section(
                title=f"{title}: rows won, by subset",
                text=f"Rows that one model alone gets right. p: how often the split is as uneven when the models change places, the rows of a prompt together; and Holm's adjustment over the {len(one['subsets'])} subsets. {_verdict(one)}",
                columns=("subset", "rows", "prompts", "only A", "only B", "p", "p (Holm)"),
                rows=[
                    (
                        key or "all",
                        r["num_rows"],
                        r["num_prompts"],
                        r["only_a"],
                        r["only_b"],
                        _p(r["p_swap"]),
                        _p(r["p_holm"]),
                    )
                    for key, r in one["subsets"].items()
                ],
            )
        )
    return Page(title=content["title"], facts=content["facts"], notes=content["notes"], sections=sections, pictures=pictures)  # fmt: skip


def _verdict(one: Mapping[str, Any]) -> str:
    real = [key or "all" for key, row in one["subsets"].items() if row["p_holm"] < _ALPHA]
    return f"Different at 5 %: {', '.join(real)}." if real else "No subset differs at 5 %."


def _pictures(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    pictures = {}
    for name, one in found.items():
        rows = [
            {"name": key, "difference": row["difference"], "ci95": row["difference_ci95"]}
            for key, row in one["figures"].items()
            if "/" not in key
        ]
        if rows:
            figure = difference_bars(rows)
            save_figure(figure, folder / f"{name}.png")
            pictures[f"{BENCHMARKS[name].title}: A minus B with 95 % intervals"] = as_svg(figure)
    return pictures


def _log(run: StageRun, content: Mapping[str, Any], folder: Path) -> None:
    numbers: dict[str, float] = {}
    for name, one in content["benchmarks"].items():
        prefix = f"{BENCHMARKS[name].prefix}_diff"
        for key, row in one["figures"].items():
            flat = metric_name(prefix, key)
            low, high = row["difference_ci95"]
            numbers |= {flat: row["difference"], f"{flat}_ci_lo": low, f"{flat}_ci_hi": high}
        numbers |= {f"{metric_name(prefix, subset)}_p_holm": row["p_holm"] for subset, row in one["subsets"].items()}
    run.log_metrics(numbers)
    run.log_params({"run_a": content["folders"]["a"], "run_b": content["folders"]["b"]})
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md", ".html", ".png") and path.name != "stage.json":
            run.log_artifact(path)


def _p(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
