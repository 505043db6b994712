"""Strongest contexts of each latent, collected in one pass and mergeable. n contexts kept per latent.

Contexts of a latent are ordered by (-value, doc_id, side, text); a text counts once, with its first place in this order.
Keeping the first n distinct texts of each part is enough: what is not among them has n better texts in the whole, too.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sarm.schema import CONTEXTS

# (-value, doc_id, side, text): sorts as contexts are ranked.
Entry = tuple[float, str, str, str]


class ContextRecord(NamedTuple):
    """One text and the latents that fire at its last token."""

    doc_id: str
    side: str
    text: str
    latents: Sequence[int]
    values: Sequence[float]


def collect_contexts(records: Iterable[ContextRecord], latents: Collection[int] | None, n: int) -> pa.Table:
    """CONTEXTS with the `n` strongest distinct texts of each wanted latent (None: of every latent that fires).

    `rank` counts from 1. The result does not depend on the order of the records.
    """
    wanted = None if latents is None else frozenset(int(i) for i in latents)
    best: dict[int, dict[str, Entry]] = {}
    for record in records:
        # The table stores float32: values must be compared as they will be read back.
        values = np.asarray(record.values, dtype=np.float32).tolist()
        for latent, value in zip(np.asarray(record.latents).tolist(), values, strict=True):
            if value > 0 and (wanted is None or latent in wanted):
                _keep(best.setdefault(latent, {}), (-value, record.doc_id, record.side, record.text), n)
    return _table(best, n)


def merge_contexts(a: pa.Table, b: pa.Table, n: int) -> pa.Table:
    """The same table as collecting the records of `a` and of `b` at once, if both kept at least `n` contexts."""
    best: dict[int, dict[str, Entry]] = {}
    for row in (*a.to_pylist(), *b.to_pylist()):
        _keep(best.setdefault(row["latent"], {}), (-row["value"], row["doc_id"], row["side"], row["text"]), n)
    return _table(best, n)


def _keep(best_by_text: dict[str, Entry], entry: Entry, n: int) -> None:
    text = entry[3]
    if text not in best_by_text or entry < best_by_text[text]:
        best_by_text[text] = entry
    # Some slack, so that the sort is paid once every few texts and not for each.
    if len(best_by_text) > 4 * n + 16:
        kept = sorted(best_by_text.values())[:n]
        best_by_text.clear()
        best_by_text.update((e[3], e) for e in kept)


def _table(best: dict[int, dict[str, Entry]], n: int) -> pa.Table:
    rows = [
        {"latent": latent, "rank": rank, "value": -entry[0], "doc_id": entry[1], "side": entry[2], "text": entry[3]}
        for latent in sorted(best)
        for rank, entry in enumerate(sorted(best[latent].values())[:n], start=1)
    ]
    return pa.Table.from_pylist(rows, schema=CONTEXTS)
