"""What is in the row groups of a store: which rows are trained on, which are held out, which cannot be used.

Every group is looked at by one of the workers, its checksums with it, and all are told. N rows, D d_in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sarm.contracts.ids import hash_share
from sarm.data.store.activations import ActivationStore, kinds_of, unusable_rows, vectors
from sarm.settings.checks import UserError


@dataclass(frozen=True)
class Workers:
    """Who shares the looking; `everyone(value)` gives the values of all of them, in their order, to each."""

    rank: int = 0
    world: int = 1
    everyone: Callable[[Any], Sequence[Any]] = lambda value: [value]


class Looked(NamedTuple):
    """A row group: where it is stored, which of its rows are trained on, the ids of those that cannot be used, by reason, and how many are held out."""

    file: Path
    number: int
    kept: Bool[Tensor, " rows"]
    rejected: dict[str, list[int]]
    num_heldout: int


class LookedAt(NamedTuple):
    """All groups in stored order, and the first held-out rows with their kinds."""

    groups: list[Looked]
    heldout: Float[Tensor, "rows d_in"]
    heldout_kinds: UInt8[Tensor, " rows"]


def look(
    store: ActivationStore,
    columns: Sequence[str],
    heldout_share: float,
    max_heldout: int,
    workers: Workers,
    keep: Callable[[Tensor, Tensor], None] = lambda rows, kinds: None,
) -> LookedAt:
    """Look at this worker's share of the groups and hear of the others'; a lone worker is given each group's training rows and kinds to `keep`.

    Raises UserError, on all workers, if one of them meets a damaged page.
    """
    mine: list[tuple[Looked, Tensor, Tensor]] = []
    failed = ""
    num_heldout = 0
    try:
        for file, number in store.group_places()[workers.rank :: workers.world]:
            table = store.row_group(file, number, ["row_id", "doc_id", *columns])
            group, rows, kinds, is_heldout = _looked(store, file, number, table, heldout_share)
            # Other workers may have held-out rows before these; nobody has more to give than all that are wanted.
            wanted = max(0, max_heldout - num_heldout)
            num_heldout += group.num_heldout
            mine.append((group, rows[is_heldout][:wanted], kinds[is_heldout][:wanted]))
            if workers.world == 1:
                keep(rows[group.kept], kinds[group.kept])
    except UserError as error:
        failed = str(error)
    told = workers.everyone((failed, [group for group, _, _ in mine]))
    if failures := [error for error, _ in told if error]:
        raise UserError(failures[0])
    groups = _in_order([found for _, found in told])
    # What of each group is among the first that are held out.
    before = np.cumsum([0, *(group.num_heldout for group in groups)])
    taken = [slice(0, int(max(0, max_heldout - start))) for start in before[:-1]][workers.rank :: workers.world]
    sent = [(rows[here], kinds[here]) for (_, rows, kinds), here in zip(mine, taken, strict=True)]
    parts = _in_order(workers.everyone(sent))
    none = torch.empty(0, store.d_in, dtype=store.torch_dtype), torch.empty(0, dtype=torch.uint8)
    rows, kinds = (torch.cat([empty, *found]) for empty, found in zip(none, zip(*parts, strict=True), strict=True))
    return LookedAt(groups, rows.float(), kinds)


def is_heldout(doc_id: str, share: float) -> bool:
    """Whether a document's rows are kept out of the SAE's training."""
    # With a salt: training prompts are those that the unsalted hash left over.
    return hash_share(f"sae:{doc_id}") < share


def _in_order(dealt: Sequence[list[Any]]) -> list[Any]:
    """What was dealt out by turns, one after the other again."""
    return [dealt[i % len(dealt)][i // len(dealt)] for i in range(sum(map(len, dealt)))]


def _looked(
    store: ActivationStore, file: Path, number: int, table: pa.Table, share: float
) -> tuple[Looked, Tensor, Tensor, Tensor]:
    rows = vectors(table, store.metadata["dtype"])
    is_out = _is_heldout(table, share)
    kept = ~is_out
    rejected: dict[str, list[int]] = {}
    for reason, is_bad in unusable_rows(rows).items():
        if bool(is_bad.any()):
            rejected[reason] = table.filter(pa.array(is_bad.numpy())).column("row_id").to_pylist()
            kept, is_out = kept & ~is_bad, is_out & ~is_bad
    return Looked(file, number, kept, rejected, int(is_out.sum())), rows, kinds_of(table), is_out


def _is_heldout(table: pa.Table, share: float) -> Bool[Tensor, " rows"]:
    # Once a document: its rows follow each other.
    documents = table.column("doc_id").combine_chunks().dictionary_encode()
    shares = [is_heldout(document, share) for document in documents.dictionary.to_pylist()]
    return torch.tensor(shares, dtype=torch.bool)[torch.from_numpy(documents.indices.to_numpy().astype(np.int64))]
