"""Prompts with the tokens of their responses in an Arrow file, written once and mapped by every process that trains on them.

`tokens.arrow` has a row a prompt; `tokens.json` comes last and says what the rows are of, their file's sha256, and what was left out.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa

from sarm.contracts.manifest import sha256_of, write_atomically
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PairOfGroup, PromptGroup

_ROWS, _ABOUT = "tokens.arrow", "tokens.json"
# Of a batch of rows: a row is found by division.
_BATCH = 256
_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("responses", pa.list_(pa.string())),
        ("ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("truncated", pa.list_(pa.int32())),
        ("pair_id", pa.list_(pa.string())),
        ("chosen", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.int32())),
        ("margin", pa.list_(pa.float64())),
        ("subset", pa.list_(pa.string())),
    ]
)


class StoredTokens(NamedTuple):
    """What a folder holds: the prompts of each kind that was written, in order, and what was said of them."""

    groups: dict[str, "StoredGroups"]
    about: dict[str, Any]


class StoredGroups(Sequence[PromptGroup]):
    """Some of the groups of a mapped file; each is made when it is asked for, and no token is in memory before."""

    def __init__(self, path: Path, places: range):
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._places = places
        sizes = np.concatenate([batch["pair_id"].value_lengths().to_numpy() for batch in self._batches] or [np.empty(0, np.int32)])  # fmt: skip
        self.num_pairs: list[int] = sizes[places.start : places.stop : places.step].tolist()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> PromptGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptGroup]: ...
    def __getitem__(self, index: int | slice) -> PromptGroup | list[PromptGroup]:
        if isinstance(index, slice):
            return [self._group(place) for place in self._places[index]]
        return self._group(self._places[index])

    def _group(self, place: int) -> PromptGroup:
        batch, row = self._batches[place // _BATCH], place % _BATCH

        def column(name: str) -> Any:
            return batch[name][row]

        ends = np.cumsum(column("lengths").values.to_numpy()).tolist()
        ids = column("ids").values.to_numpy()
        tokens = [
            Tokens(ids[start:end].tolist(), num_truncated)
            for start, end, num_truncated in zip([0, *ends[:-1]], ends, column("truncated").as_py(), strict=True)
        ]
        pairs = [
            PairOfGroup(*values) for values in zip(*(column(name).as_py() for name in PairOfGroup._fields), strict=True)
        ]
        return PromptGroup(column("prompt_id").as_py(), column("responses").as_py(), tokens, pairs)


def pair_counts(groups: Sequence[PromptGroup]) -> list[int]:
    """How many pairs each group has."""
    return groups.num_pairs if isinstance(groups, StoredGroups) else [len(group.pairs) for group in groups]


def write_groups(
    folder: Path, identity: Mapping[str, Any], kinds: Mapping[str, Iterable[PromptGroup]], about: Mapping[str, Any]
) -> None:
    """Write the groups of each kind, one kind behind the other; `about` is read when all are written. Replaces what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ABOUT).unlink(missing_ok=True)
    counts: dict[str, int] = {}
    temporary = folder / f".{_ROWS}.{os.getpid()}"
    try:
        with pa.ipc.new_file(str(temporary), _SCHEMA) as file:
            waiting: list[dict[str, Any]] = []
            for row in _rows(kinds, counts):
                waiting.append(row)
                if len(waiting) == _BATCH:
                    file.write_batch(pa.RecordBatch.from_pylist(waiting, _SCHEMA))
                    waiting = []
            if waiting:
                file.write_batch(pa.RecordBatch.from_pylist(waiting, _SCHEMA))
        temporary.replace(folder / _ROWS)
    finally:
        temporary.unlink(missing_ok=True)
    said = {"identity": identity, "sha256": sha256_of(folder / _ROWS), "kinds": counts, "about": about}
    write_atomically(folder / _ABOUT, json.dumps(said))


def read_groups(folder: Path, identity: Mapping[str, Any], *, verify: bool = True) -> StoredTokens | None:
    """The groups that `write_groups` wrote for this identity; None if others are there, or none, or `verify` finds them changed."""
    try:
        said = json.loads((folder / _ABOUT).read_bytes())
        if said["identity"] != json.loads(json.dumps(identity)) or (
            verify and sha256_of(folder / _ROWS) != said["sha256"]
        ):
            return None
        groups, start = {}, 0
        for kind, count in said["kinds"].items():
            groups[kind] = StoredGroups(folder / _ROWS, range(start, start + count))
            start += count
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return StoredTokens(groups, said["about"])


def _rows(kinds: Mapping[str, Iterable[PromptGroup]], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    for kind, groups in kinds.items():
        counts[kind] = 0
        for group in groups:
            counts[kind] += 1
            yield {
                "prompt_id": group.prompt_id,
                "responses": group.responses,
                "ids": [token for tokens in group.tokens for token in tokens.ids],
                "lengths": [len(tokens.ids) for tokens in group.tokens],
                "truncated": [tokens.num_truncated for tokens in group.tokens],
                **{name: [getattr(pair, name) for pair in group.pairs] for name in PairOfGroup._fields},
            }
