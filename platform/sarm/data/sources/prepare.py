"""Sources to corpus/v1 and pairs/v1: cleaned, de-duplicated, split by prompt."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sarm.contracts.ids import hash_share, prompt_id_of, stable_id, stable_int
from sarm.contracts.tables import CONVERSATIONS_TABLE, CORPUS_TABLE, PAIRS_TABLE
from sarm.data.sources import pairs as pair_sources
from sarm.data.sources import texts as text_sources
from sarm.data.sources.built_in import BUILT_IN_PAIRS, BUILT_IN_TEXTS
from sarm.data.sources.layouts.layout import RawPair
from sarm.data.sources.near_duplicates import SIMILARITY, Near, near_duplicates, text_of
from sarm.data.sources.pair_notes import notes_on
from sarm.data.sources.rows import LeftOut, Reject
from sarm.data.tokens.templated_text import control_spelled_in, template_spelled_in
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings

NEAR_DUPLICATES = "near_duplicates.json"
ROWS_PER_GROUP = 1_000
# A few texts of megabytes fill a group: it is held in memory whole, here and by whoever reads it.
CHARACTERS_PER_GROUP = 16_000_000
ROWS_PER_FILE = 100_000

Record = TypeVar("Record")


def prepare_corpus(data: DataSettings, folder: Path) -> dict[str, Any]:
    """Write the texts of `data.texts` to `folder` as corpus/v1, in the order they are read, each text once.

    If the first of them is a conversation, the corpus has the messages too. Streams: memory grows by one integer a text. Returns
    counts: `rows`, `conversations` among them, `duplicates`, `rejected` by reason, `corrupt_files`, and rows by source. Raises UserError if a source is unusable or no text is left.
    """
    if not data.texts:
        raise UserError(
            f"there is no text source. Pass --data.texts with files, a glob, hf:NAME or one of {', '.join(BUILT_IN_TEXTS)}."
        )
    for spec in data.texts:
        text_sources.check_source(spec, data.text_field)
    tally = Tally()
    seen: set[int] = set()
    num_conversations = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal num_conversations
        for spec in data.texts:
            for record in tally.usable(text_sources.open_texts(spec, data.text_field, data.max_texts), spec):
                # Of two conversations with the same words, the roles may differ.
                row_id = stable_int(record.text if record.messages is None else json.dumps(record.messages))
                if row_id in seen:
                    tally.duplicates += 1
                    continue
                seen.add(row_id)
                tally.sources[spec] += 1
                tally.characters += len(record.text)
                num_conversations += record.messages is not None
                tally.note(message["content"] for message in record.messages or ())
                yield {"row_id": row_id, "text": record.text, "source": spec, "messages": record.messages}

    staged = rows()
    first = next(staged, None)
    columns = CORPUS_TABLE if first is None or first["messages"] is None else CONVERSATIONS_TABLE
    num_rows = write_rows(() if first is None else chain([first], staged), columns, folder)
    if num_rows == 0:
        raise UserError(
            f"no usable text in {', '.join(data.texts)} ({tally.describe()}). Check --data.texts and --data.text-field."
        )
    kept = {"rows": num_rows, "conversations": num_conversations, "characters": tally.characters}
    return {**kept, **tally.counts()}


def prepare_pairs(data: DataSettings, folder: Path) -> dict[str, Any]:
    """Write the pairs of `data.pairs` to `folder` as pairs/v1, sorted so that the pairs of one prompt are neighbours.

    A prompt falls into `train` or `heldout` by the hash of its normalised text (`schema.normalised`), with all its pairs. Pairs that
    stand in both directions are dropped both. Held-out prompts that are nearly a training prompt stay, and `near_duplicates.json` names them. Returns counts
    as `prepare_corpus` does, with `contradictory`, `over_prompt_cap`, `prompts`, rows by split, and held-out prompts and pairs that are near-duplicates.
    `notes` are sentences that whoever trains on the pairs should read. Raises UserError, before anything is written, if a source is unusable or a split would be empty.
    """
    if not data.pairs:
        raise UserError(
            f"there is no preference source. Pass --data.pairs with files, a glob, hf:NAME or one of {', '.join(BUILT_IN_PAIRS)}."
        )
    for spec in data.pairs:
        pair_sources.check_source(spec, data.column_names)
    tally = Tally()
    pairs: dict[str, dict[str, Any]] = {}
    for spec in data.pairs:
        for pair in tally.usable(pair_sources.open_pairs(spec, data.max_pairs, data.column_names), spec):
            row = _pair_row(pair, data.heldout_share)
            if row["pair_id"] in pairs:
                tally.duplicates += 1
            else:
                pairs[row["pair_id"]] = row
    contradictory = {pair_id for pair_id, row in pairs.items() if _reverse_id(row) in pairs}
    ordered = sorted(
        (row for pair_id, row in pairs.items() if pair_id not in contradictory),
        key=lambda row: (row["prompt_id"], row["pair_id"]),
    )
    kept: list[dict[str, Any]] = []
    num_prompts = 0
    for _, of_prompt in groupby(ordered, key=lambda row: row["prompt_id"]):
        kept += list(of_prompt)[: data.max_pairs_per_prompt]
        num_prompts += 1
    splits = Counter({"train": 0, "heldout": 0})
    splits.update(row["split"] for row in kept)
    if not kept:
        raise UserError(f"no usable pair in {', '.join(data.pairs)} ({tally.describe()}). Check --data.pairs.")
    for split, rows in splits.items():
        if rows == 0:
            raise UserError(
                f"the {split} split is empty: {num_prompts} prompts, heldout_share={data.heldout_share}. "
                "Pass more prompts, or another --data.heldout-share."
            )
    tally.sources.update(row["source"] for row in kept)
    for row in kept:
        tally.note([*(message["content"] for message in row["prompt"]), row["chosen"], row["rejected"]])
    write_rows(kept, PAIRS_TABLE, folder)
    near = _near_duplicates(kept, folder)
    return {
        "rows": len(kept),
        "prompts": num_prompts,
        "splits": dict(splits),
        "near_duplicate_prompts": len(near),
        "near_duplicate_pairs": sum(row["prompt_id"] in near for row in kept),
        "contradictory": len(contradictory),
        "over_prompt_cap": len(ordered) - len(kept),
        **tally.counts(),
        "notes": notes_on(kept).sentences(),
    }


class Tally:
    """What became of the rows that were read."""

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.corrupt_files: list[str] = []
        self._first: dict[str, str] = {}
        self.duplicates = self.characters = 0
        self.spelled: dict[bytes, tuple[bool, bool]] = {}

    def note(self, contents: Iterable[str]) -> None:
        """Remember contents that spell control tokens or turns of some template in use: which tokenizer reads them is not known here."""
        for text in contents:
            found = control_spelled_in(text), template_spelled_in(text) is not None
            if any(found):
                self.spelled[hashlib.blake2b(text.encode(), digest_size=16).digest()] = found

    def usable(self, records: Iterable[Record | Reject | LeftOut], spec: str) -> Iterator[Record]:
        """The records without the rejects, which are counted, under a progress bar where that takes longer than a moment."""
        self.sources[spec] += 0
        # A terminal can be redrawn twice a second, and keeps no bar; a log should not get a line each time.
        is_terminal = sys.stderr.isatty()
        interval = 0.5 if is_terminal else 30.0
        for record in tqdm(records, desc=spec, unit=" rows", mininterval=interval, delay=interval, leave=not is_terminal, file=sys.stderr):  # fmt: skip
            if isinstance(record, LeftOut):
                self.left_out[record.reason] += 1
                continue
            if not isinstance(record, Reject):
                yield record
                continue
            self.rejected[record.reason] += 1
            self._first.setdefault(record.reason, record.where)
            if record.reason == "corrupt_file":
                self.corrupt_files.append(record.where)

    def counts(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "duplicates": self.duplicates,
            "rejected": dict(self.rejected),
            **({"left_out_answers": dict(self.left_out)} if self.left_out else {}),
            "contents_with_control_tokens": sum(control for control, _ in self.spelled.values()),
            "contents_already_templated": sum(templated for _, templated in self.spelled.values()),
            "corrupt_files": self.corrupt_files,
            "sources": dict(self.sources),
        }

    def describe(self) -> str:
        """What was rejected, for an error message."""
        reasons = (f"{n} {reason}, first {self._first[reason]}" for reason, n in self.rejected.most_common())
        return "rejected: " + ("; ".join(reasons) or "nothing")


def _pair_row(pair: RawPair, heldout_share: float) -> dict[str, Any]:
    prompt_id = prompt_id_of(pair.prompt)
    return {
        "pair_id": stable_id(prompt_id, pair.chosen, pair.rejected),
        "prompt_id": prompt_id,
        "split": "heldout" if hash_share(prompt_id) < heldout_share else "train",
        **pair._asdict(),
    }


def _near_duplicates(rows: list[dict[str, Any]], folder: Path) -> dict[str, Near]:
    """The held-out prompts that are nearly a training prompt, also as a file that evaluation reads."""
    texts: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
    for row in rows:
        texts[row["split"]].setdefault(row["prompt_id"], text_of(row["prompt"]))
    found = near_duplicates(texts["heldout"], texts["train"].items())
    content = {"similarity": SIMILARITY, "prompts": {key: near._asdict() for key, near in sorted(found.items())}}
    (folder / NEAR_DUPLICATES).write_text(json.dumps(content, indent=1))
    return found


def _reverse_id(row: dict[str, Any]) -> str:
    return stable_id(row["prompt_id"], row["rejected"], row["chosen"])


def write_rows(rows: Iterable[dict[str, Any]], columns: pa.Schema, folder: Path) -> int:
    """Write rows as part-00000.parquet ...; returns their number. No file is made for no rows."""
    folder.mkdir(parents=True, exist_ok=True)
    num_rows = num_files = 0
    writer: pq.ParquetWriter | None = None
    try:
        for group in _groups(rows):
            if writer is None or num_rows // ROWS_PER_FILE >= num_files:
                if writer is not None:
                    writer.close()
                path, num_files = folder / f"part-{num_files:05d}.parquet", num_files + 1
                writer = pq.ParquetWriter(path, columns, compression="zstd", write_page_checksum=True)
            writer.write_table(pa.Table.from_pylist(group, schema=columns))
            num_rows += len(group)
    finally:
        if writer is not None:
            writer.close()
    return num_rows


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += len(row.get("text", ""))
        if len(group) == ROWS_PER_GROUP or characters > CHARACTERS_PER_GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group
