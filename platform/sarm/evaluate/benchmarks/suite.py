"""All figures of an evaluation, from its per-completion table alone: what is reported, logged and compared."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sarm.contracts.figures import plain_values
from sarm.evaluate.benchmarks.benchmark import Benchmark, Measure
from sarm.evaluate.benchmarks.controls import calibrated, drift, length_and_style, rulers
from sarm.evaluate.benchmarks.items import scored_rows
from sarm.evaluate.benchmarks.probes import flips
from sarm.evaluate.benchmarks.registry import BENCHMARKS
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.influence import figure_intervals

Measures = dict[str, Any]
_MAX_NAME = 150


def measure(items: pa.Table, seed: int) -> Measures:
    """Per benchmark: figures with intervals, rulers, controls, calibration, probes and coverage; and the drift over all."""
    names = [name for name in BENCHMARKS if name in set(items["benchmark"].unique().to_pylist())]
    probes = [variant for variant in items["variant"].unique().to_pylist() if variant]
    return {
        "benchmarks": {name: _measure(name, items, probes, seed) for name in names},
        "drift": plain_values(drift(items.filter(pc.equal(items["variant"], "")))),
    }


def _measure(name: str, items: pa.Table, probes: Sequence[str], seed: int) -> Measures:
    benchmark = BENCHMARKS[name]
    rows = benchmark.with_partners(scored_rows(items, name))
    plain = items.filter(pc.and_(pc.equal(items["benchmark"], name), pc.equal(items["variant"], "")))
    unscored = _unscored(plain)
    found: Measures = {
        "num_rows": len(rows),
        "num_clusters": len({row.cluster for row in rows}),
        "num_completions": plain.num_rows,
        "num_truncated": int(pc.sum(plain["truncated"]).as_py() or 0),
        "unscored": unscored,
        "coverage": _coverage(benchmark, rows),
    }
    if not rows:
        return {**found, "figures": {}, "note": "no row has finite scores"}
    values, ends = benchmark.figures(rows), figure_intervals(benchmark, rows)
    by_ruler = rulers(benchmark, rows, seed)
    sizes = _sizes(benchmark, rows)
    found["figures"] = {
        figure: {
            "value": value,
            "ci95": list(ends[figure]),
            **{ruler: by_ruler[ruler].get(figure) for ruler in by_ruler},
            "num_rows": sizes.get(figure),
        }
        for figure, value in values.items()
    }
    found |= _own(benchmark.measures, rows, values)
    found["controls"] = plain_values(length_and_style(rows)) | _own(benchmark.controls, rows, values)
    found["calibration"] = plain_values(calibrated(rows))
    found["probes"] = {
        probe: plain_values(flipped) for probe in probes if (flipped := flips(rows, scored_rows(items, name, probe)))
    }
    return found


def metrics(measures: Mapping[str, Any]) -> dict[str, float]:
    """Stable metric names for run trackers: `rb2/overall`, `rb2/Safety`, `rb2/overall_ci_lo`, `cal/rb2_ece` ..."""
    found: dict[str, float | None] = {}
    for name, one in measures["benchmarks"].items():
        prefix = BENCHMARKS[name].prefix
        for figure, row in one["figures"].items():
            key = metric_name(prefix, figure)
            found |= {key: row["value"], f"{key}_ci_lo": row["ci95"][0], f"{key}_ci_hi": row["ci95"][1]}
        found |= {f"{prefix}/num_rows": one["num_rows"], f"{prefix}/num_truncated": one["num_truncated"]}
        if near := one.get("near_duplicates"):
            found[f"{prefix}/near_duplicate_rows"] = near.get("rows")
        for key, value in (one.get("controls") or {}).items():
            found[f"control/{prefix}_{key}"] = value
        if cal := one.get("calibration"):
            found |= {f"cal/{prefix}_{key}": value for key, value in cal["raw"].items()}
            found |= {f"cal/{prefix}_{key}_scaled": value for key, value in cal["scaled"].items()}
            found[f"cal/{prefix}_temperature"] = cal["temperature"]
        for probe, flipped in (one.get("probes") or {}).items():
            found[f"probe/{prefix}_{probe}_flipped"] = flipped["flipped"]
    if measures["drift"]:
        found["drift/max"] = measures["drift"]["max"]
    return {key: float(value) for key, value in found.items() if value is not None and np.isfinite(value)}


def metric_name(prefix: str, figure: str) -> str:
    """`prefix/figure` in the characters that run trackers take: subsets of own data are called anything."""
    name = re.sub(r"[^\w.\- ]", "_", figure).strip(". ")
    return f"{prefix}/{name[:_MAX_NAME] or 'all'}"


def _own(measures: Sequence[Measure], rows: Sequence[ScoredRow], figures: Mapping[str, float]) -> dict[str, float]:
    """Those of a benchmark's own measures that are defined."""
    return {one.key: value for one in measures if (value := one.of(rows, figures)) is not None}


def _unscored(plain: pa.Table) -> list[dict[str, str]]:
    """Rows with a score that is not finite, by name."""
    faulty = plain.filter(pc.invert(pc.is_finite(pc.fill_null(plain["score"], float("nan")))))
    seen = dict.fromkeys(zip(faulty["subset"].to_pylist(), faulty["row_id"].to_pylist(), strict=True))
    return [{"where": f"{subset}/{row_id}", "reason": "score is not a finite number"} for subset, row_id in seen]


def _coverage(benchmark: Benchmark, rows: Sequence[ScoredRow]) -> dict[str, str]:
    """Rows scored of the published number, by subset, where a benchmark has one."""
    have = Counter(row.subset for row in rows)
    return {subset: f"{have[subset]} of {published}" for subset, published in (benchmark.subsets or {}).items()}


def _sizes(benchmark: Benchmark, rows: Sequence[ScoredRow]) -> dict[str, int]:
    """Rows behind each figure."""
    sizes = Counter(row.subset for row in rows)
    return {**sizes, "overall": len(rows), **benchmark.pooled_sizes(sizes)}
