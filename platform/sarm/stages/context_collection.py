"""contexts/v1: pairs and corpus stream past the reward model once; then the kept texts are looked up and their driving parts found.

The model sees every text once. What comes back (active latents of each place) is tallied in this process, in bounded arrays
that depend on no order, so one actor and many give the same bytes. Pairs and corpus are tallied apart and merged.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.ids import stable_int
from sarm.contracts.tables import LATENT_CONTEXTS_TABLE
from sarm.data.formats.sarm_folder import read_tensors
from sarm.data.store.blocks import FILE, ROW, Block, table_blocks
from sarm.data.store.parts import part_files
from sarm.data.tokens.contents import count_spelled
from sarm.engine.ray.block_actor import Output
from sarm.engine.ray.passes import Pass, RunPass
from sarm.engine.terminal import say
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE, PLACES
from sarm.interpret.context_tables import choose, context_tables, strongest, summaries
from sarm.interpret.context_texts import fetch, parts, shown
from sarm.interpret.tallies import Tally, Units
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.contexts import ANSWERS, SPANS, UNITS, DrivingParts, PairUnits, TextUnits, pair_slices, text_slices
from sarm.passes.reader import Reader
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings

_MAX_BLOCKS = 4096
_ANSWERS_OF_BLOCK = 4
# Places whose latents are tallied at once.
_UNITS_AT_ONCE = 2048


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
    weight_S = read_tensors(reader.folder, "score.weight")[0].squeeze(0).float().numpy()
    tallies = {place: Tally(len(weight_S), settings.top, settings.sampled) for place in PLACES}
    works, num_rows = [], 0
    if settings.split != "none":
        blocks, num_rows = pair_blocks(pairs, settings.split)
        works += (
            [_pairs_pass(reader=reader, files=pairs, split=settings.split, blocks=blocks, folder=folder)]
            if blocks
            else []
        )
    if settings.corpus:
        blocks, num_texts = text_blocks(corpus, settings.max_texts)
        works += [_texts_pass(reader, corpus, blocks, folder)] if blocks else []
        num_rows += num_texts
    if num_rows == 0:
        raise UserError(f"there are no {settings.split} pairs and no texts to read. Pass another --contexts.split, or --contexts.corpus.")  # fmt: skip
    for work in works:
        run_pass(work)
        for place, tally in tally_units(_units_of(work), settings, len(weight_S)).items():
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
    spans = driving_parts(answers=answers, settings=settings, reader=reader, folder=folder / "parts", run_pass=run_pass)
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
    spelled = count_spelled(pairs if settings.split != "none" else [], settings.split, reader.chat)
    places = {place: int(tally.total.sum()) for place, tally in seen.items()}
    shutil.rmtree(folder / "parts")
    return {
        **counts,
        **spelled,
        "protocol_version": PROTOCOL_VERSION,
        "d_sae": len(weight_S),
        "places": places,
        "figures": counts,
    }


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
        input_ids=_refs,
        output_id="ref",
        keys=("latent",),
    )
    run_pass(work)
    rows = (row for path in part_files(output.folder) for row in pq.read_table(path).to_pylist())
    return {(row["ref"], row["latent"]): (row["start"], row["end"]) for row in rows}


def pair_blocks(files: Sequence[Path], split: str) -> tuple[list[Block], int]:
    """Blocks of whole slices over the pairs of a split, and how many pairs they hold; rows of other splits may stand between them."""
    slices: list[tuple[Path, int, int, int]] = []
    num_rows = 0
    for path, group, first, table in _row_groups(files, ["prompt_id", "split"]):
        prompts, splits = (table[name].to_pylist() for name in ("prompt_id", "split"))
        rows = [row for row in range(table.num_rows) if split in ("all", splits[row])]
        num_rows += len(rows)
        for start, stop in pair_slices([prompts[row] for row in rows]):
            slices.append((path, group, first + rows[start], first + rows[stop - 1] + 1))
    return _blocks(slices), num_rows


def text_blocks(files: Sequence[Path], max_texts: int | None) -> tuple[list[Block], int]:
    """Blocks of whole slices over the texts of a corpus, and how many texts they hold."""
    slices: list[tuple[Path, int, int, int]] = []
    num_rows = 0
    for path, group, first, table in _row_groups(files, ["row_id"]):
        here = table.num_rows if max_texts is None else min(max_texts - num_rows, table.num_rows)
        num_rows += here
        slices += [(path, group, first + start, first + stop) for start, stop in text_slices(here)]
    return _blocks(slices), num_rows


def _blocks(slices: Sequence[tuple[Path, int, int, int]]) -> list[Block]:
    """Slices (file, row group, start, stop) as blocks of a row group's neighbours: few enough for their part files to be handled."""
    size = -(-len(slices) // _MAX_BLOCKS)
    blocks: list[Block] = []
    for (path, _), own in itertools.groupby(slices, lambda one: one[:2]):
        members = list(own)
        for i in range(0, len(members), size):
            last = members[min(i + size, len(members)) - 1]
            blocks.append(Block(len(blocks), str(path), members[i][2], last[3]))
    return blocks


def _pairs_pass(reader: Reader, files: Sequence[Path], split: str, blocks: list[Block], folder: Path) -> Pass:
    return Pass(
        name="contexts of pairs",
        blocks=blocks,
        columns=("pair_id", "prompt_id", "split", "prompt", "chosen", "rejected", "margin", "subset", FILE, ROW),
        keep=None if split == "all" else functools.partial(_of_split, split=split),
        actor=PairUnits,
        arguments={"reader": reader, "files": {str(path): number for number, path in enumerate(files)}},
        outputs={"units": Output(folder / "parts" / "pairs", UNITS)},
        id_columns=("pair_id", "split"),
        input_ids=_pair_ids,
        output_id="row_ids",
        keys=("ref",),
    )


def _texts_pass(reader: Reader, files: Sequence[Path], blocks: list[Block], folder: Path) -> Pass:
    return Pass(
        name="contexts of texts",
        blocks=blocks,
        columns=("row_id", "text", FILE, ROW),
        keep=None,
        actor=TextUnits,
        arguments={"reader": reader, "files": {str(path): number for number, path in enumerate(files)}},
        outputs={"units": Output(folder / "parts" / "texts", UNITS)},
        id_columns=("row_id",),
        input_ids=_row_ids,
        output_id="row_ids",
        keys=("ref",),
    )


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def _pair_ids(table: pa.Table) -> list[int]:
    return [stable_int(pair_id) for pair_id in table["pair_id"].to_pylist()]


def _row_ids(table: pa.Table) -> list[int]:
    row_ids: list[int] = table["row_id"].to_pylist()
    return row_ids


def _refs(table: pa.Table) -> list[int]:
    refs: list[int] = table["ref"].to_pylist()
    return refs


def _units_of(work: Pass) -> Iterator[pa.Table]:
    """The parts of a pass, one at a time."""
    return (pq.read_table(path) for path in part_files(work.outputs["units"].folder))


def _row_groups(files: Sequence[Path], columns: list[str]) -> Iterator[tuple[Path, int, int, pa.Table]]:
    for path in files:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            first = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield path, group, first, table
                first += table.num_rows


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
