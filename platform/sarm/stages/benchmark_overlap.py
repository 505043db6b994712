"""Which prompts of a benchmark are nearly prompts that the scored model was trained on, and the figures without their rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.folders import PAIRS_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, read_manifest, sha256_of
from sarm.data.sources.near_duplicates import SIMILARITY, near_duplicates, text_of
from sarm.evaluate.benchmarks.sources import Loaded
from sarm.evaluate.benchmarks.suite import measure
from sarm.passes.models import ModelSpec
from sarm.settings.checks import UserError

# Where a run, and a cell of an ablation, has its pairs as seen from a model's folder.
_LEVELS = 3


class TrainingPrompts(NamedTuple):
    """The pairs/v1 folder that a model was trained on, and the hash by which its manifest names them."""

    folder: Path
    digest: str


def training_prompts(spec: ModelSpec) -> TrainingPrompts | None:
    """The training pairs of a model that lies in the folder of its run; None if they are not there, or are not those that it was trained on."""
    folder = Path(spec.place)
    if spec.kind != "sarm" or not (folder / MANIFEST).exists():
        return None
    try:
        digest = read_manifest(folder, SARM_FOLDER).inputs.get(PAIRS_FOLDER)
    except UserError:
        return None
    for place in list(folder.parents)[:_LEVELS]:
        pairs = place / "pairs"
        if digest is not None and (pairs / MANIFEST).exists() and sha256_of(pairs / MANIFEST) == digest:
            return TrainingPrompts(pairs, digest)
    return None


def overlap(
    trained_on: TrainingPrompts | None, benchmarks: Sequence[Loaded], items: pa.Table, seed: int
) -> dict[str, dict[str, Any]]:
    """By benchmark: rows and prompts that are near-duplicates of a training prompt, and the headline figures without those rows.

    Where the training prompts are not known, `training_prompts` is None and nothing is counted.
    """
    if trained_on is None:
        return {one.source.name: {"training_prompts": None} for one in benchmarks}
    trained = _texts(trained_on.folder)
    found: dict[str, dict[str, Any]] = {}
    for one in benchmarks:
        prompts = {row.prompt_id: text_of(row.prompt) for row in one.rows}
        near = near_duplicates(prompts, trained.items())
        rows = {(row.subset, row.row_id) for row in one.rows if row.prompt_id in near}
        found[one.source.name] = {
            "training_prompts": len(trained),
            "similarity": SIMILARITY,
            "prompts": len(near),
            "of_prompts": len(prompts),
            "rows": len(rows),
            "of_rows": len(one.rows),
            "without": _without(one.source.name, rows, items, seed) if rows else {},
        }
    return found


def _texts(folder: Path) -> dict[str, str]:
    """The training prompts by id."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path, columns=["prompt_id", "prompt", "split"]).to_pylist():
            if row["split"] == "train" and row["prompt_id"] not in found:
                found[row["prompt_id"]] = text_of(row["prompt"])
    return found


def _without(name: str, rows: set[tuple[str, str]], items: pa.Table, seed: int) -> Mapping[str, dict[str, Any]]:
    is_kept = [
        benchmark == name and not variant and (subset, row_id) not in rows
        for benchmark, variant, subset, row_id in zip(
            *(items[column].to_pylist() for column in ("benchmark", "variant", "subset", "row_id")), strict=True
        )
    ]
    left = items.filter(pa.array(is_kept))
    if not left.num_rows:
        return {}
    figures = measure(left, seed)["benchmarks"][name]["figures"]
    return {figure: {key: row[key] for key in ("value", "ci95", "num_rows")} for figure, row in figures.items() if "/" not in figure}  # fmt: skip
