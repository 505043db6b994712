"""What an ablation found: the table of its cells as Markdown, CSV and Parquet, its figures, and all of it on its MLflow run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sarm.contracts.folders import EVALUATION_FOLDER, SAE_FOLDER
from sarm.contracts.manifest import MANIFEST, read_manifest, write_atomically
from sarm.data.store.parts import read_parts
from sarm.engine.mlflow.ui_command import ui_command
from sarm.engine.session import RUN_FILE, Session
from sarm.engine.terminal import say
from sarm.evaluate.pairs import accuracy_difference
from sarm.evaluate.readability import READABLE
from sarm.report.figures import save_figure
from sarm.report.sweep_figures import accuracy_by_axis, accuracy_by_cost
from sarm.report.sweep_table import DIFFERENCE, as_markdown, best_row, settings_of
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell, centre_of
from sarm.stages.sweep.stages import result_of
from sarm.stages.sweep.trials import status_of

_FIGURES = {
    "heldout_accuracy": pa.float64(),
    "ci95_low": pa.float64(),
    "ci95_high": pa.float64(),
    **{name: pa.float64() for name in DIFFERENCE},
    "heldout_margin": pa.float64(),
    "fvu_heldout": pa.float64(),
    "alive_at_reward": pa.float64(),
    "dead_share": pa.float64(),
    "reward_fidelity": pa.float64(),
    **{name: pa.float64() for name in READABLE},
}
_COSTS = {"training_seconds": pa.float64(), "evaluation_seconds": pa.float64()}


class Report(NamedTuple):
    """Where the report lies and what a reader is told first."""

    folder: Path
    rows: list[dict[str, Any]]
    best: Mapping[str, Any] | None
    compare: str

    def summary(self) -> str:
        """The lines that end the job."""
        counts = {status: sum(row["status"] == status for row in self.rows) for status in ("done", "stopped", "failed")}
        lines = [", ".join(f"{number} {status}" for status, number in counts.items() if number)]
        if self.best is not None:
            best = self.best
            lines.append(
                f"best cell    {best['cell']}: held-out accuracy {best['heldout_accuracy']:.3f} ({best['ci95_low']:.3f} to {best['ci95_high']:.3f})"
            )
        return "\n".join([*lines, f"table        {self.folder / 'table.md'}", f"compare      {self.compare}"])


class Spent(NamedTuple):
    """Wall-clock seconds of a run over the cells that were missing, and how many trials the cluster had room for."""

    seconds: float
    trials_at_once: int
    did_all: bool


def _schema(plan: SweepPlan) -> pa.Schema:
    axes = plan.config.sweep.settings_axes
    return pa.schema(
        {
            "cell": pa.string(),
            "component": pa.string(),
            "layer": pa.int32(),
            "width": pa.int32(),
            "d_sae": pa.int32(),
            "k": pa.int32(),
            **{axis.name: pa.float64() if axis.is_numeric else pa.string() for axis in axes},
            "seed": pa.int32(),
            "status": pa.string(),
            "reason": pa.string(),
            **_FIGURES,
            **_COSTS,
        }
    )


def rows_of(plan: SweepPlan) -> list[dict[str, Any]]:
    """A row for each cell that was tried, in the order of the grid."""
    rows = []
    for cell in plan.cells:
        status, reason = status_of(plan, cell)
        if status == "missing":
            continue
        row = {"cell": plan.name(cell), **plan.axes(cell), "status": status, "reason": reason}
        if status == "done":
            row |= result_of(plan, cell, read_manifest(plan.cell_folder(cell) / "evaluation", EVALUATION_FOLDER))
            row |= dict(zip(DIFFERENCE, _minus_centre(plan, cell), strict=True))
        rows.append({name: row.get(name) for name in _schema(plan).names})
    return rows


def _minus_centre(plan: SweepPlan, cell: Cell) -> tuple[float | None, ...]:
    """The cell's accuracy minus that of the SARM at the centre with its seed, and the bounds over prompts; None without such a cell."""
    centre = centre_of(plan.config)
    other = plan.cell_at(centre, "sarm", cell.seed) if centre else None
    if other is None or other == cell or other not in plan.cells or status_of(plan, other)[0] != "done":
        return None, None, None
    found = accuracy_difference(_scores(plan, cell), _scores(plan, other))
    return found.difference, *(found.difference_ci95 or (None, None))


def _scores(plan: SweepPlan, cell: Cell) -> pa.Table:
    (folder,) = (plan.cell_folder(cell) / "evaluation").glob("*_scores")
    return read_parts(folder)


def report(session: Session, plan: SweepPlan, spent: Spent | None) -> Report:
    """Write the report, and log it where it is new; `spent` is what this run took to do its cells, None if it had none to do."""
    folder = plan.config.run.out / "report"
    rows, parent = rows_of(plan), session.tracker.parent
    before = _read(folder / "table.md")
    compare = _compare_link(session, plan)
    best = best_row(rows)
    axes = [axis.name for axis in plan.config.sweep.settings_axes]
    text = as_markdown(rows, plan.config.run.out.name, axes)
    found = Report(folder, rows, best, compare)
    if text == before:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, _schema(plan))
    pq.write_table(table, folder / "table.parquet", write_page_checksum=True)
    pyarrow.csv.write_csv(table, folder / "table.csv")
    save_figure(accuracy_by_axis(rows, _centre(plan), axes), folder / "accuracy_by_axis.png")
    save_figure(accuracy_by_cost(settings_of(rows, axes)), folder / "accuracy_by_cost.png")
    write_atomically(folder / "table.md", text)
    parent.log_artifact(folder, "report")
    parent.log_table(rows, "cells.json")
    shown = f"[compare the cells]({compare})" if compare.startswith("http") else f"compare the cells: `{compare}`"
    parent.set_tags({"mlflow.note.content": f"{shown}\n\n{text}"})
    costs = costs_of(plan, spent)
    (folder / "costs.json").write_text(json.dumps(costs, indent=2))
    parent.log_metrics({**costs, "num_cells": len(rows)})
    if best is not None:
        parent.log_metrics(
            {f"best_{name}": best[name] for name in ("heldout_accuracy", "layer", "width", "k", "d_sae")}
        )
        parent.set_tags({"best_cell": best["cell"]} | {f"best_{name}": str(best[name]) for name in axes})
        if plan.config.sweep.register_best and plan.config.run.mlflow_models != "none":
            _register(session, plan, best)
    return found


def _centre(plan: SweepPlan) -> dict[str, Any]:
    """The centre as rows have it; nothing without one."""
    centre, axes = centre_of(plan.config), plan.config.sweep.settings_axes
    if centre is None:
        return {}
    own = {axis.name: axis.shown(value) for axis, value in zip(axes, centre[3:], strict=True)}
    return dict(zip(("layer", "width", "k"), centre[:3], strict=True)) | own


def _register(session: Session, plan: SweepPlan, best: Mapping[str, Any]) -> None:
    """A version of the model named after the sweep, on the sweep's run: a new best is a new version."""
    cell, name = next(cell for cell in plan.cells if plan.name(cell) == best["cell"]), plan.config.run.out.name
    folder = plan.cell_folder(cell) / ("sarm_token_sae" if cell.component == "token_sae" else "sarm")
    session.tracker.parent.register_model(folder, name, plan.config.run.mlflow_models, f"best/{best['cell']}")
    session.tracker.parent.set_tags({"registered_model": name})
    say(f"registered {best['cell']} as the newest version of {name}")


def costs_of(plan: SweepPlan, spent: Spent | None) -> dict[str, float]:
    """What the distinct stages took, each as its manifest says, and what the run took; `overhead` is one over the other.

    In seconds of a trial's share of the cluster: a stage that cells share has all shares, a cell's own has one.
    """
    root = plan.config.run.out
    shared = [root / name for name in ("corpus", "pairs")] + sorted((root / "activations").glob("*/*"))
    done = [path for path in shared if (path / MANIFEST).exists()]
    # The folders of one pass carry the same time; of the SAEs of one read, the first that was claimed carries that of all.
    passes = {json.loads((path / MANIFEST).read_text())["counts"]["seconds"] for path in done}
    reads: dict[tuple[str, ...], float] = {}
    for key in plan.saes:
        if _is_done(plan, key):
            counts = read_manifest(plan.sae_folder(key), SAE_FOLDER).counts
            together = tuple(counts["one_read"])
            reads[together] = max(reads.get(together, 0.0), counts["seconds"])
    cells = [row for row in rows_of(plan) if row["status"] == "done"]
    own = sum(row["training_seconds"] + row["evaluation_seconds"] for row in cells)
    found = {"shared_seconds": sum(passes) + sum(reads.values()), "cells_seconds": own}
    if spent is None:
        return found
    found |= {"sweep_seconds": spent.seconds, "trials_at_once": spent.trials_at_once}
    if spent.did_all:
        stages = found["shared_seconds"] * spent.trials_at_once + own
        found["overhead"] = spent.seconds * spent.trials_at_once / stages
    return found


def _is_done(plan: SweepPlan, key: Any) -> bool:
    return (plan.sae_folder(key) / MANIFEST).exists()


def _compare_link(session: Session, plan: SweepPlan) -> str:
    """MLflow's comparison of the cells' runs (parallel coordinates, scatter and box plots, a table); without a server, what starts one."""
    uri, experiment_id = session.tracker.uri, session.tracker.experiment_id
    if not uri.startswith("http"):
        return ui_command(uri, experiment_id)
    runs = [run for cell in plan.cells if (run := _run_id(plan, cell))]
    experiment = json.dumps([experiment_id])
    return f"{uri.rstrip('/')}/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(experiment)}"


def _run_id(plan: SweepPlan, cell: Cell) -> str:
    text = _read(plan.cell_folder(cell) / RUN_FILE)
    return json.loads(text)["mlflow_run_id"] if text else ""


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
