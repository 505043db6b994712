"""contexts/v1: pairs and corpus stream past the reward model once; then the kept texts are looked up and their driving parts found.

The model sees every text once. What comes back (active latents of each place) is tallied in this process, in bounded arrays
that depend on no order, so one actor and many give the same bytes. Pairs and corpus are tallied apart and merged.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.tables import LATENT_CONTEXTS_TABLE
from sarm.data.formats.sarm_folder import read_tensors
from sarm.data.tokens.contents import count_spelled
from sarm.engine.ray.cluster import Cluster
from sarm.engine.ray.passes import mapped
from sarm.engine.terminal import say
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE, PLACES
from sarm.interpret.context_tables import choose, context_tables, strongest, summaries
from sarm.interpret.context_texts import fetch, shown
from sarm.interpret.tallies import Tally, Units
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.actor_progress import Source
from sarm.passes.contexts import DROPS, SLICES, ContextUnits, Reader, SentenceDrops
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings
from sarm.settings.run import RunSettings

Stream = Callable[[Source, Sequence[dict[str, Any]], pa.Schema, type, dict[str, Any]], Iterator[pa.Table]]
"""What runs an actor class over items of a schema: a source for its progress, items, schema, class and arguments in, its tables out."""
# Rows of one slice: enough for batches of like length; a prompt's pairs stay together up to four times as many.
_SLICE_ROWS = 64
_MAX_BLOCKS = 4096
# Places whose latents are tallied at once.
_UNITS_AT_ONCE = 2048


def collect_contexts(
    settings: ContextsSettings,
    reader: Reader,
    pairs: Sequence[Path],
    corpus: Sequence[Path],
    folder: Path,
    stream: Stream,
) -> dict[str, Any]:
    """Write the two files of contexts/v1 into `folder`; returns the stage's counts.

    Raises UserError if there is nothing to read, or no latent ever fires.
    """
    weight_S = read_tensors(reader.folder, "score.weight")[0].squeeze(0).float().numpy()
    tallies = {place: Tally(len(weight_S), settings.top, settings.sampled) for place in PLACES}
    slices = pair_slices(pairs, settings.split) if settings.split != "none" else []
    texts = text_slices(corpus, settings.max_texts) if settings.corpus else []
    num_rows = sum(len(item["rows"]) for item in [*slices, *texts])
    if num_rows == 0:
        raise UserError(f"there are no {settings.split} pairs and no texts to read. Pass another --contexts.split, or --contexts.corpus.")  # fmt: skip
    for name, items in (("contexts of pairs", slices), ("contexts of texts", texts)):
        if items:
            source = Source(name, sum(len(item["rows"]) for item in items))
            batches = stream(source, items, SLICES, ContextUnits, {"reader": reader})
            for place, tally in tally_units(batches, settings, len(weight_S)).items():
                tallies[place].merge(tally)
    seen = {place: tally for place, tally in tallies.items() if tally.total.any()}
    table = summaries(seen, weight_S)
    if table.num_rows == 0:
        raise UserError(f"no latent of {reader.folder} fires in these {num_rows:,} rows, so there are no contexts. Train it first.")  # fmt: skip
    chosen = {place: choose(tally, settings.per_decile) for place, tally in seen.items()}
    say(
        f"contexts: looking up {sum(len(one.ref) for one in chosen.values()):,} contexts of {len(set(table['latent'].to_pylist())):,} latents"
    )
    wanted = {}
    if "rewarded" in chosen:
        size_S = np.abs(weight_S) * seen["rewarded"].sums().sum(0)
        wanted = strongest(chosen["rewarded"], size_S, settings.span_contexts, settings.span_answers)
    found, answers = {}, []
    for ref, row in fetch((int(ref) for one in chosen.values() for ref in one.ref), pairs, corpus):
        found[ref] = shown(ref, row, settings.text_chars)
        if ref in wanted:
            side = "chosen" if found[ref]["side"] == "chosen" else "rejected"
            answers.append({"ref": ref, "prompt": json.dumps(row["prompt"]), "text": row[side], "latents": wanted[ref]})
    spans = driving_parts(answers, settings, reader, stream)
    num_contexts = 0
    with pq.ParquetWriter(
        folder / CONTEXTS_FILE, LATENT_CONTEXTS_TABLE, compression="zstd", write_page_checksum=True
    ) as file:
        for part in context_tables(chosen, found, spans):
            file.write_table(part)
            num_contexts += part.num_rows
    pq.write_table(table, folder / LATENTS_FILE, compression="zstd", write_page_checksum=True)
    counts = {
        "rows": num_rows,
        "latents": len(set(table["latent"].to_pylist())),
        "contexts": num_contexts,
        "texts": len(found),
        "spans": sum(span != (-1, -1) for span in spans.values()),
    }
    spelled = count_spelled(pairs if settings.split != "none" else [], settings.split, reader.chat())
    places = {place: int(tally.total.sum()) for place, tally in seen.items()}
    return {
        **counts,
        **spelled,
        "protocol_version": PROTOCOL_VERSION,
        "d_sae": len(weight_S),
        "places": places,
        "figures": counts,
    }


def tally_units(batches: Iterator[pa.Table], settings: ContextsSettings, num_latents: int) -> dict[str, Tally]:
    """Tallies of streams of `context_actors.UNITS`, by place."""
    tallies = {place: Tally(num_latents, settings.top, settings.sampled) for place in PLACES}
    waiting: list[pa.Table] = []
    for batch in batches:
        waiting.append(batch)
        if sum(table.num_rows for table in waiting) >= _UNITS_AT_ONCE:
            _add(tallies, waiting)
            waiting = []
    _add(tallies, waiting)
    return tallies


def driving_parts(
    answers: Sequence[dict[str, Any]], settings: ContextsSettings, reader: Reader, stream: Stream
) -> dict[tuple[int, int], tuple[int, int]]:
    """Characters of the part that drives a latent in an answer, by (reference, latent); (-1, -1) where no part lowers it."""
    if not answers:
        return {}
    arguments = {"reader": reader, "limit": settings.span_pieces}
    source = Source("driving sentences", len(answers))
    return {
        (row["ref"], row["latent"]): (row["start"], row["end"])
        for batch in stream(source, answers, DROPS, SentenceDrops, arguments)
        for row in batch.to_pylist()
    }


def on_cluster(run: RunSettings, cluster: Cluster) -> Stream:
    """Items through `run.num_actors` Ray Data actors, one item at a time."""

    def stream(
        source: Source, items: Sequence[dict[str, Any]], columns: pa.Schema, actor: type, arguments: dict[str, Any]
    ) -> Iterator[pa.Table]:
        size = -(-len(items) // _MAX_BLOCKS)
        # Blocks of few items, so that an actor that is free finds work.
        blocks = [pa.Table.from_pylist(list(items[i : i + size]), schema=columns) for i in range(0, len(items), size)]
        yield from mapped(blocks, 1, actor, {**arguments, "source": source}, run, cluster)

    return stream


def pair_slices(files: Sequence[Path], split: str) -> list[dict[str, Any]]:
    """Rows of SLICES over the pairs of a split; pairs of one prompt that follow one another stay together."""
    items = []
    for number, (path, group, first, table) in _row_groups(files, ["prompt_id", "split"]):
        waiting: list[int] = []
        prompts, splits = (table[name].to_pylist() for name in ("prompt_id", "split"))
        for row in range(table.num_rows):
            if split not in ("all", splits[row]):
                continue
            is_new = bool(waiting) and prompts[row] != prompts[waiting[-1]]
            if len(waiting) >= 4 * _SLICE_ROWS or (is_new and len(waiting) >= _SLICE_ROWS // 2):
                items.append(_slice("pairs", number, path, group, first, waiting))
                waiting = []
            waiting.append(row)
        if waiting:
            items.append(_slice("pairs", number, path, group, first, waiting))
    return items


def text_slices(files: Sequence[Path], max_texts: int | None) -> list[dict[str, Any]]:
    """Rows of SLICES over the texts of a corpus."""
    items, left = [], max_texts
    for number, (path, group, first, table) in _row_groups(files, ["row_id"]):
        num_rows = table.num_rows if left is None else min(left, table.num_rows)
        left = None if left is None else left - num_rows
        for start in range(0, num_rows, _SLICE_ROWS // 4):
            rows = list(range(start, min(start + _SLICE_ROWS // 4, num_rows)))
            items.append(_slice("texts", number, path, group, first, rows))
    return items


def _row_groups(files: Sequence[Path], columns: list[str]) -> Iterator[tuple[int, tuple[Path, int, int, pa.Table]]]:
    for number, path in enumerate(files):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            first = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield number, (path, group, first, table)
                first += table.num_rows


def _slice(kind: str, file: int, path: Path, group: int, first: int, rows: list[int]) -> dict[str, Any]:
    return {"kind": kind, "file": file, "path": str(path), "row_group": group, "first": first, "rows": rows}


def _add(tallies: Mapping[str, Tally], tables: Sequence[pa.Table]) -> None:
    if not tables:
        return
    table = pa.concat_tables(tables).combine_chunks()
    for place, tally in tallies.items():
        own = table.filter(pc.equal(table["place"], place)).combine_chunks()
        if own.num_rows:
            tally.add(_units(own))


def _units(table: pa.Table) -> Units:
    latents, values = (table[name].combine_chunks() for name in ("latents", "values"))
    sizes = pc.list_value_length(latents).to_numpy()
    return Units(
        ref=table["ref"].to_numpy(),
        key=table["key"].to_numpy(),
        readers=table["readers"].combine_chunks().flatten().to_numpy().reshape(-1, 3),
        offset=np.concatenate([[0], np.cumsum(sizes)]),
        latent=latents.flatten().to_numpy(),
        value=values.flatten().to_numpy(),
    )
