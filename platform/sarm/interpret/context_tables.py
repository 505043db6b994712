"""Tallies and texts -> the two tables of contexts/v1, a run of latents at a time."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Float64, Int64, UInt64
from numpy.typing import NDArray

from sarm.contracts.tables import LATENT_CONTEXTS_TABLE, LATENT_SUMMARIES_TABLE
from sarm.interpret.tallies import SIDES, Kept, Tally, joined, place_in_run, quantiles, sampled_deciles

_LATENTS_AT_ONCE = 512
_TEXT_COLUMNS = ("text_id", "pair_id", "side", "prompt_hash", "prompt", "text")
Spans = Mapping[tuple[int, int], tuple[int, int]]


class Chosen(NamedTuple):
    """The contexts of one place, flat, by latent, then top before deciles, then rank."""

    latent: Int64[NDArray[np.int64], " entries"]
    decile: Int64[NDArray[np.int64], " entries"]
    """1 to 10, -1 for the top."""
    rank: Int64[NDArray[np.int64], " entries"]
    ref: Int64[NDArray[np.int64], " entries"]
    value: Float32[NDArray[np.float32], " entries"]


def choose(tally: Tally, per_decile: int) -> Chosen:
    """The strongest texts of each latent, and from each tenth of its sampled activations those of the lowest hashes.

    A text that is among the strongest is not shown again as one of a tenth.
    """
    top, sample = tally.top.all(), tally.sample.all()
    is_new = ~np.isin(_pairs(sample), _pairs(top))
    decile, rest = sampled_deciles(sample)[is_new], sample.take(is_new)
    group = rest.latent * 16 + decile
    order = np.lexsort((rest.key, group))
    drawn = order[place_in_run(group[order]) < per_decile]
    # Rank 0 is the strongest of what was drawn.
    drawn = drawn[np.lexsort((rest.key[drawn], -rest.value[drawn], group[drawn]))]
    both = joined([top, rest.take(drawn)])
    deciles = np.concatenate([np.full(len(top.latent), -1), decile[drawn]])
    ranks = np.concatenate([place_in_run(top.latent), place_in_run(group[drawn])])
    order = np.lexsort((ranks, deciles, both.latent))
    return Chosen(
        latent=both.latent[order],
        decile=deciles[order],
        rank=ranks[order],
        ref=both.ref[order],
        value=both.value[order],
    )


def strongest(
    chosen: Chosen, size_S: Float64[NDArray[np.float64], " d_sae"], num: int, num_refs: int
) -> dict[int, list[int]]:
    """Reference -> latents of which it is among the `num` strongest texts; `num_refs` at most, those of the largest latents first."""
    found: dict[int, list[int]] = {}
    wanted = np.flatnonzero((chosen.decile == -1) & (chosen.rank < num))
    order = wanted[np.lexsort((chosen.latent[wanted], -size_S[chosen.latent[wanted]], chosen.rank[wanted]))]
    for ref, latent in zip(chosen.ref[order].tolist(), chosen.latent[order].tolist(), strict=True):
        if ref in found or len(found) < num_refs:
            found.setdefault(ref, []).append(latent)
    return found


def context_tables(
    chosen: Mapping[str, Chosen], texts: Mapping[int, dict[str, Any]], spans: Spans
) -> Iterator[pa.Table]:
    """LATENT_CONTEXTS of some hundred latents after the other, by latent, place, kind, decile and rank.

    `texts` are what `context_texts.shown` made of every reference; `spans` the driving parts of whole answers by (reference, latent).
    """
    numbers = np.array(sorted(texts), np.int64)
    fields = {name: LATENT_CONTEXTS_TABLE.field(name) for name in _TEXT_COLUMNS}
    columns = {
        name: pa.array([texts[number][name] for number in numbers.tolist()], field.type)
        for name, field in fields.items()
    }
    highest = max((int(one.latent[-1]) for one in chosen.values() if len(one.latent)), default=-1)
    for first in range(0, highest + 1, _LATENTS_AT_ONCE):
        blocks = []
        for place, one in sorted(chosen.items(), reverse=True):
            own = slice(*np.searchsorted(one.latent, [first, first + _LATENTS_AT_ONCE]))
            part = Chosen(
                latent=one.latent[own],
                decile=one.decile[own],
                rank=one.rank[own],
                ref=one.ref[own],
                value=one.value[own],
            )
            blocks.append(_block(place=place, part=part, numbers=numbers, columns=columns, texts=texts, spans=spans))
        table = pa.concat_tables(blocks)
        if table.num_rows:
            yield table.take(pa.array(np.argsort(table["latent"].to_numpy(), kind="stable")))


def summaries(tallies: Mapping[str, Tally], weight_S: Float[NDArray[np.floating], " d_sae"] | None) -> pa.Table:
    """LATENT_SUMMARIES of every latent and place that fired there, by latent and place."""
    rows = []
    for place, tally in tallies.items():
        sample, top = tally.sample.all(), tally.top.all()
        sums, counts, total = tally.sums(), tally.count.sum(0), int(tally.total.sum())
        strongest_of = dict(zip(top.latent[::-1].tolist(), top.value[::-1].tolist(), strict=True))
        for latent in np.flatnonzero(counts).tolist():
            count = int(counts[latent])
            row: dict[str, Any] = {
                "latent": latent,
                "place": place,
                "count": count,
                "total": total,
                "density": count / total,
                "max": strongest_of[latent],
                "mean": float(sums[:, latent].sum() / count),
                "quantiles": quantiles(sample, latent),
                "weight": None if weight_S is None else float(weight_S[latent]),
                "histogram": tally.histogram[:, latent].sum(0).tolist(),
            }
            for side in ("chosen", "rejected"):
                number, seen = SIDES.index(side), int(tally.total[SIDES.index(side)])
                row[f"{side}_mean"] = float(sums[number, latent] / seen) if seen else None
                row[f"{side}_histogram"] = tally.histogram[number, latent].tolist() if seen else None
            rows.append(row)
    rows.sort(key=lambda row: (row["latent"], row["place"]))
    return pa.Table.from_pylist(rows, schema=LATENT_SUMMARIES_TABLE)


def _block(
    place: str,
    part: Chosen,
    numbers: Int64[NDArray[np.int64], " texts"],
    columns: Mapping[str, pa.Array],
    texts: Any,
    spans: Spans,
) -> pa.Table:
    size = len(part.latent)
    ends = [
        _span(texts[ref], spans.get((ref, latent)))
        for ref, latent in zip(part.ref.tolist(), part.latent.tolist(), strict=True)
    ]
    taken = pa.array(np.searchsorted(numbers, part.ref))
    values = {
        "latent": part.latent,
        "place": pa.array([place] * size),
        "kind": pa.array(["top" if decile < 0 else "decile" for decile in part.decile.tolist()]),
        "decile": part.decile,
        "rank": part.rank,
        "activation": part.value,
        "span_start": [start for start, _ in ends],
        "span_end": [end for _, end in ends],
        **{name: column.take(taken) for name, column in columns.items()},
    }
    return pa.table(
        [pa.array(values[f.name]).cast(f.type) for f in LATENT_CONTEXTS_TABLE], schema=LATENT_CONTEXTS_TABLE
    )


def _span(text: dict[str, Any], found: tuple[int, int] | None) -> tuple[int, int]:
    """A span of the whole text as one of the text that is shown; unknown if it was cut off."""
    if found is None:
        return text["span_start"], text["span_end"]
    start, end = (place - text["cut"] for place in found)
    return (max(start, 0), end) if found != (-1, -1) and end > 0 else (-1, -1)


def _pairs(entries: Kept) -> UInt64[NDArray[np.uint64], " entries"]:
    """One number for latent and text, as unlikely to be shared as two texts' keys."""
    return entries.key ^ (entries.latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
