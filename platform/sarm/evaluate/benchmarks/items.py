"""Scored rows out of the per-completion table that every figure is recomputed from."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sarm.evaluate.benchmarks.rows import ScoredRow


def scored_rows(items: pa.Table, benchmark: str, variant: str = "") -> list[ScoredRow]:
    """The rows of one benchmark (and of one edit of its texts) whose completions all have a finite score, in file order."""
    wanted = pc.and_(pc.equal(items["benchmark"], benchmark), pc.equal(items["variant"], variant))
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in items.filter(wanted).to_pylist():
        rows.setdefault((item["subset"], item["row_id"]), []).append(item)
    usable = []
    for (subset, row_id), members in rows.items():
        members.sort(key=lambda item: item["completion"])
        if all(item["score"] is not None and np.isfinite(item["score"]) for item in members):
            usable.append(
                ScoredRow(
                    subset,
                    row_id,
                    members[0]["cluster"],
                    sum(item["correct"] for item in members),
                    *(np.array([item[k] for item in members], float) for k in ("score", "num_tokens", "markup")),
                )
            )
    return usable
