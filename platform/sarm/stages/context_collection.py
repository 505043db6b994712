"""contexts/v1: pairs and corpus stream past the reward model once; then the kept texts are looked up and their driving parts found.

The model sees every text once. What comes back (active latents of each place) is tallied in this process, in bounded arrays
that depend on no order, so one actor and many give the same bytes. Pairs and corpus are tallied apart and merged.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.tables import LATENT_CONTEXTS_TABLE
from sarm.data.formats.sarm_folder import read_latents
from sarm.data.store.blocks import FILE, ROW, Block, table_blocks
from sarm.data.store.pairs import PAIR_COLUMNS, of_split, pair_numbers
from sarm.data.store.parts import part_files
from sarm.data.tokens.contents import count_spelled
from sarm.engine.passes import Pass, RunPass
from sarm.engine.ray.block_actor import Output
from sarm.engine.terminal import say
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE, PLACES
from sarm.interpret.context_tables import Chosen, choose, context_tables, strongest, summaries
from sarm.interpret.context_texts import fetch, parts, shown
from sarm.interpret.tallies import Tally, Units
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.contexts import ANSWERS, SPANS, UNITS, DrivingParts, PairUnits, TextUnits
from sarm.passes.reader import Reader
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings
from sarm.stages.context_blocks import pair_blocks, text_blocks

_ANSWERS_OF_BLOCK = 4
# Places whose latents are tallied at once.
_UNITS_AT_ONCE = 2048


@dataclass(frozen=True)
class _Collection:
    """What contexts are collected from, with what, and where they go."""

    settings: ContextsSettings
    reader: Reader
    pairs: Sequence[Path]
    corpus: Sequence[Path]
    folder: Path
    run_pass: RunPass


def collect_contexts(
    settings: ContextsSettings,
    reader: Reader,
    pairs: Sequence[Path],
    corpus: Sequence[Path],
    folder: Path,
    run_pass: RunPass,
) -> dict[str, Any]:
    """Write the two files of contexts/v1 into `folder`; returns the stage's counts. What a killed run has left there is gone on with.

    Raises UserError if there is nothing to read, or no latent ever fires.
    """
    collection = _Collection(settings, reader, pairs, corpus, folder, run_pass)
    (weight_S,) = read_latents(reader.folder, "score.weight")
    tallies, num_rows = _tallied(collection, len(weight_S))
    latents = summaries(tallies, weight_S)
    if latents.num_rows == 0:
        raise UserError(f"no latent of {reader.folder} fires in these {num_rows:,} rows, so there are no contexts. Train it first.")  # fmt: skip
    chosen = {place: choose(tally, settings.per_decile) for place, tally in tallies.items()}
    num_latents = len(set(latents["latent"].to_pylist()))
    say(f"contexts: looking up {sum(len(own.ref) for own in chosen.values()):,} contexts of {num_latents:,} latents")
    wanted = {}
    if "rewarded" in chosen:
        size_S = np.abs(weight_S) * tallies["rewarded"].sums().sum(0)
        wanted = strongest(chosen["rewarded"], size_S, settings.span_contexts, settings.span_answers)
    texts, answers = _looked_up(collection, chosen, wanted)
    spans = driving_parts(answers=answers, settings=settings, reader=reader, folder=folder / "parts", run_pass=run_pass)
    num_contexts = _write(folder, context_tables(chosen, texts, spans), latents)
    counts = {
        "rows": num_rows,
        "latents": num_latents,
        "contexts": num_contexts,
        "texts": len(texts),
        "spans": sum(span != (-1, -1) for span in spans.values()),
    }
    spelled = count_spelled(pairs if settings.split != "none" else [], settings.split, reader.chat)
    shutil.rmtree(folder / "parts")
    return {
        **counts,
        **spelled,
        "protocol_version": PROTOCOL_VERSION,
        "d_sae": len(weight_S),
        "places": {place: int(tally.total.sum()) for place, tally in tallies.items()},
        "figures": counts,
    }


def _tallied(collection: _Collection, num_latents: int) -> tuple[dict[str, Tally], int]:
    """Tallies of the places that were seen, and how many rows were read. Raises UserError if there are none."""
    settings, works, num_rows = collection.settings, [], 0
    if settings.split != "none":
        blocks, num_rows = pair_blocks(collection.pairs, settings.split)
        works += [_pairs_pass(collection, blocks)] if blocks else []
    if settings.corpus:
        blocks, num_texts = text_blocks(collection.corpus, settings.max_texts)
        works += [_texts_pass(collection, blocks)] if blocks else []
        num_rows += num_texts
    if num_rows == 0:
        raise UserError(f"there are no {settings.split} pairs and no texts to read. Pass another --contexts.split, or --contexts.corpus.")  # fmt: skip
    tallies = {place: Tally(num_latents, settings.top, settings.sampled) for place in PLACES}
    for work in works:
        collection.run_pass(work)
        for place, tally in tally_units(_units_of(work), settings, num_latents).items():
            tallies[place].merge(tally)
    return {place: tally for place, tally in tallies.items() if tally.total.any()}, num_rows


def _looked_up(
    collection: _Collection, chosen: Mapping[str, Chosen], wanted: Mapping[int, list[int]]
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """What a reader is shown of every chosen reference, and the answers whose parts are `wanted`: rows of ANSWERS."""
    texts, answers = {}, []
    refs = (int(ref) for own in chosen.values() for ref in own.ref)
    for ref, row in fetch(refs, collection.pairs, collection.corpus):
        texts[ref] = shown(ref, row, collection.settings.text_chars)
        if ref in wanted:
            side = "chosen" if texts[ref]["side"] == "chosen" else "rejected"
            answers.append({"ref": ref, "prompt": json.dumps(row["prompt"]), "text": row[side], "latents": wanted[ref]})
    return texts, answers


def _write(folder: Path, contexts: Iterator[pa.Table], latents: pa.Table) -> int:
    """Write both files; returns how many contexts there are."""
    num_contexts = 0
    with pq.ParquetWriter(
        folder / CONTEXTS_FILE, LATENT_CONTEXTS_TABLE, compression="zstd", write_page_checksum=True
    ) as file:
        for part in contexts:
            file.write_table(part)
            num_contexts += part.num_rows
    pq.write_table(latents, folder / LATENTS_FILE, compression="zstd", write_page_checksum=True)
    return num_contexts


def tally_units(batches: Iterator[pa.Table], settings: ContextsSettings, num_latents: int) -> dict[str, Tally]:
    """Tallies of tables of UNITS, by place."""
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
    answers: Sequence[dict[str, Any]], settings: ContextsSettings, reader: Reader, folder: Path, run_pass: RunPass
) -> dict[tuple[int, int], tuple[int, int]]:
    """Characters of the part that drives a latent in an answer, by (reference, latent); (-1, -1) where no part lowers it."""
    with_parts = [answer for answer in answers if parts(answer["text"], settings.span_pieces)]
    if not with_parts:
        return {}
    table = pa.Table.from_pylist(with_parts, schema=ANSWERS)
    output = Output(folder / "spans", SPANS)
    work = Pass(
        name="driving sentences",
        blocks=table_blocks(table, folder / "answers.parquet", _ANSWERS_OF_BLOCK),
        columns=ANSWERS.names,
        keep=None,
        actor=DrivingParts,
        arguments={"reader": reader, "limit": settings.span_pieces},
        outputs={"spans": output},
        id_columns=("ref",),
        output_id="ref",
        keys=("latent",),
    )
    run_pass(work)
    rows = (row for path in part_files(output.folder) for row in pq.read_table(path).to_pylist())
    return {(row["ref"], row["latent"]): (row["start"], row["end"]) for row in rows}


def _pairs_pass(collection: _Collection, blocks: list[Block]) -> Pass:
    split = collection.settings.split
    return Pass(
        name="contexts of pairs",
        blocks=blocks,
        columns=(*PAIR_COLUMNS, FILE, ROW),
        keep=None if split == "all" else functools.partial(of_split, split=split),
        actor=PairUnits,
        arguments=_arguments(collection.reader, collection.pairs),
        outputs={"units": Output(collection.folder / "parts" / "pairs", UNITS)},
        id_columns=("pair_id", "split"),
        input_ids=pair_numbers,
        output_id="row_ids",
        keys=("ref",),
    )


def _texts_pass(collection: _Collection, blocks: list[Block]) -> Pass:
    return Pass(
        name="contexts of texts",
        blocks=blocks,
        columns=("row_id", "text", FILE, ROW),
        keep=None,
        actor=TextUnits,
        arguments=_arguments(collection.reader, collection.corpus),
        outputs={"units": Output(collection.folder / "parts" / "texts", UNITS)},
        id_columns=("row_id",),
        output_id="row_ids",
        keys=("ref",),
    )


def _arguments(reader: Reader, files: Sequence[Path]) -> dict[str, Any]:
    return {"reader": reader, "files": {str(path): number for number, path in enumerate(files)}}


def _units_of(work: Pass) -> Iterator[pa.Table]:
    """The parts of a pass, one at a time."""
    return (pq.read_table(path) for path in part_files(work.outputs["units"].folder))


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
        latent=latents.flatten().to_numpy().astype(np.int64),
        value=values.flatten().to_numpy(),
    )
