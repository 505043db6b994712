"""Where a benchmark's rows are: files as training takes them, patterns and folders of them, or a Hugging Face data set."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sarm.contracts.ids import hash_share, prompt_key_of
from sarm.data.sources.files import extension_of, file_rows
from sarm.data.sources.hub import data_set_rows, is_data_set
from sarm.data.sources.places import source_files
from sarm.data.sources.rows import Reject, Row
from sarm.evaluate.benchmarks.benchmark import BadRow, BenchmarkRow
from sarm.evaluate.benchmarks.reading import read_benchmark
from sarm.evaluate.benchmarks.registry import benchmark_named
from sarm.settings.checks import UserError

# Below this share of usable rows a figure would speak of another benchmark than its name says.
_USABLE_SHARE = 0.5


class Source(NamedTuple):
    """A benchmark and where it is read from."""

    name: str
    place: str


class Loaded(NamedTuple):
    """A benchmark as read: the rows to score and those left out."""

    source: Source
    rows: list[BenchmarkRow]
    bad: list[BadRow]
    num_read: int

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that depend on the ids and texts of the rows alone."""
        found = hashlib.sha256()
        for row in self.rows:
            parts = [row.subset, row.row_id, prompt_key_of(row.prompt), str(row.num_correct), *row.completions]
            found.update(json.dumps(parts).encode())
        return found.hexdigest()[:16]


def parse_source(text: str) -> Source:
    """`NAME=SOURCE`, or `NAME` for the benchmark's public data set; a bare `owner/name` is a Hugging Face data set.

    Raises UserError for an unknown benchmark or a source that is not there.
    """
    name, _, place = text.partition("=")
    public = benchmark_named(name).data_set
    place = place or public
    if not place:
        raise UserError(f"{name} has no public data set. Pass --benchmarks {name}=FILE.")
    if not _is_file(place) and re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        place = f"hf:{place}:{public.rpartition(':')[2] or 'test'}"
    if not is_data_set(place):
        source_files(place, ())
    return Source(name, place)


def _is_file(place: str) -> bool:
    """Whether the place is meant as a file, there or not."""
    return bool(extension_of(place)) or glob.has_magic(place) or Path(place).expanduser().exists()


def load_benchmark(source: Source, limit: int | None, allow_partial: bool) -> Loaded:
    """Read a benchmark; with a `limit`, about that many of its rows, chosen by hash of the prompt (Ties partners together).

    Raises UserError if there is no row, or under half of them can be used and `allow_partial` is not set.
    """
    good, bad = read_benchmark(source.name, _rows(source.place))
    num_read = len(good) + len(bad)
    reasons = f"first: {bad[0].where}: {bad[0].reason}" if bad else "the source is empty"
    if not good:
        raise UserError(f"{source.name}: none of the {num_read} rows of {source.place} can be used; {reasons}.")
    if len(good) < _USABLE_SHARE * num_read and not allow_partial:
        raise UserError(
            f"{source.name}: only {len(good)} of the {num_read} rows of {source.place} can be used ({reasons}). Mend the file, or pass --allow-partial."
        )
    if limit is not None and len(good) > limit:
        good = _sample(good, limit)
    return Loaded(source, good, bad, num_read)


def _sample(rows: Sequence[BenchmarkRow], limit: int) -> list[BenchmarkRow]:
    by_cluster: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        by_cluster.setdefault(row.cluster, []).append(row)
    kept: set[int] = set()
    for cluster in sorted(by_cluster, key=hash_share):
        if len(kept) >= limit:
            break
        kept |= {id(row) for row in by_cluster[cluster]}
    return [row for row in rows if id(row) in kept]


def _rows(place: str) -> Iterator[Row | Reject]:
    if is_data_set(place):
        yield from data_set_rows(place)
        return
    for path in source_files(place, ()):
        yield from file_rows(path)
