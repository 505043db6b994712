"""The pairs of an audit, in their roles: those that features are chosen on, the target, and the off-target.

A source is a pairs/v1 folder (one split of it) or a benchmark, each of whose rows gives all pairs of a correct with a wrong completion.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sarm.contracts.folders import PAIRS_FOLDER
from sarm.contracts.ids import hash_share, stable_id
from sarm.contracts.manifest import read_manifest
from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.store.pairs import load_pairs
from sarm.evaluate.benchmarks.benchmark import BenchmarkRow
from sarm.evaluate.benchmarks.sources import load_benchmark, parse_source
from sarm.settings.checks import UserError

ROLES = ("select", "target", "off_target")
AUDIT_PAIRS = PAIRS_TABLE.append(pa.field("role", pa.string(), nullable=False))
_SPLITS = ("train", "heldout", "all")


def audit_pairs(sources: Mapping[str, Sequence[str]], limits: Mapping[str, int | None]) -> pa.Table:
    """The pairs of every role as AUDIT_PAIRS, those of one prompt side by side; equal pairs of one role once. `limits` are of rows of a benchmark.

    Raises UserError for a source that cannot be read or is empty, and for a prompt in two roles: what features are chosen on
    must not be what they are tested on, and a target that is its own off-target says nothing.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for role in ROLES:
        for source in sources[role]:
            for row in _pairs_of(source, limits.get(role), role):
                rows.setdefault((role, row["pair_id"]), {**row, "role": role})
        if not any(key[0] == role for key in rows):
            raise UserError(f"there is no pair in {', '.join(sources[role])}. Pass --{role.replace('_', '-')} another source.")  # fmt: skip
    of_prompt: dict[str, set[str]] = {}
    for row in rows.values():
        of_prompt.setdefault(row["prompt_id"], set()).add(row["role"])
    shared = [roles for roles in of_prompt.values() if len(roles) > 1]
    if shared:
        first = sorted(shared[0])
        raise UserError(f"{len(shared)} prompts are both {first[0]} and {first[1]}. Pass sources without common prompts.")  # fmt: skip
    ordered = sorted(rows.values(), key=lambda row: (row["prompt_id"], row["pair_id"]))
    return pa.Table.from_pylist(ordered, schema=AUDIT_PAIRS)


def listed_pairs(sources: Sequence[str], num_prompts: int) -> list[dict[str, Any]]:
    """The pairs of about so many prompts of the sources, by hash, each once and those of a prompt side by side; held-out ones unless a source names a split.

    Raises UserError for a source that cannot be read, or if there is no pair.
    """
    rows = {row["pair_id"]: row for source in sources for row in _pairs_of(source, None, "target")}
    prompts = sorted({row["prompt_id"] for row in rows.values()}, key=lambda one: hash_share(f"listed/{one}"))
    kept = set(prompts[:num_prompts])
    if not kept:
        raise UserError(f"there is no pair in {', '.join(sources)}. Pass --pairs another source.")
    ordered = sorted(rows.values(), key=lambda row: (row["prompt_id"], row["pair_id"]))
    return [row for row in ordered if row["prompt_id"] in kept]


def check_benchmarks(sources: Iterable[str]) -> None:
    """Raise UserError unless every `NAME=SOURCE` among the sources can be read and holds a pair; folders may be still to be made."""
    for source in sources:
        if "=" in source and next(_pairs_of(source, None, "target"), None) is None:
            raise UserError(f"there is no pair in {source}. Pass another source.")


def chooses(prompt_id: str) -> bool:
    """Whether an off-target prompt belongs to the half that features are chosen on."""
    return hash_share(f"audit/{prompt_id}") < 0.5


def _pairs_of(source: str, limit: int | None, role: str) -> Iterator[dict[str, Any]]:
    if "=" in source:
        loaded = load_benchmark(parse_source(source), limit, allow_partial=False)
        for row in loaded.rows:
            yield from _of_row(row, loaded.source.name)
        return
    place, _, split = source.rpartition(":")
    if split not in _SPLITS:
        place, split = source, "train" if role == "select" else "heldout"
    folder = Path(place).expanduser().absolute()
    read_manifest(folder, PAIRS_FOLDER)
    for pair in load_pairs(folder, split).to_pylist():
        yield {**pair, "subset": pair["subset"] or pair["source"]}


def _of_row(row: BenchmarkRow, benchmark: str) -> Iterator[dict[str, Any]]:
    correct, wrong = row.completions[: row.num_correct], row.completions[row.num_correct :]
    for chosen in correct:
        for rejected in wrong:
            if chosen != rejected:
                yield {
                    "pair_id": stable_id(row.prompt_id, chosen, rejected),
                    "prompt_id": row.prompt_id,
                    "prompt": list(row.prompt),
                    "chosen": chosen,
                    "rejected": rejected,
                    "source": benchmark,
                    "split": "heldout",
                    "subset": row.subset or benchmark,
                    "margin": None,
                }
