"""Files of rows: which a source names, and how each is read. One entry for each kind of content; the packings are combined with them."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from sarm.data.sources.containers.archive_rows import tar_rows, zip_rows
from sarm.data.sources.containers.column_rows import arrow_rows, parquet_rows
from sarm.data.sources.containers.damage import DAMAGE
from sarm.data.sources.containers.packing import PACKINGS, chunks_of
from sarm.data.sources.containers.text_rows import csv_rows, json_rows, txt_rows
from sarm.data.sources.rows import FileFormat, Reject, Row
from sarm.settings.checks import UserError

Streamed = Callable[[str, Iterator[bytes]], Iterator[Row | Reject]]
# What stands beside data and holds none, in folders and in archives.
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog|citation|manifest|dataset_infos?|dataset_dict|state|near_duplicates|metadata|meta)\b", re.I)  # fmt: skip
STREAMED: dict[str, tuple[str, Streamed]] = {
    ".jsonl": ("JSON", json_rows),
    ".ndjson": ("JSON", json_rows),
    ".json": ("JSON", json_rows),
    ".csv": ("CSV", csv_rows),
    ".tsv": ("CSV", partial(csv_rows, delimiter="\t")),
    ".txt": ("text", txt_rows),
}


def file_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | Reject]:
    """The rows of one file in order; `columns` limits what is read from files with columns.

    Of a file that breaks off or is damaged the rows before are kept, then one reject `corrupt_file` closes the stream.
    """
    try:
        yield from format_of(path).rows(path, columns)
    except DAMAGE:
        yield Reject("corrupt_file", str(path))


def format_of(path: Path) -> FileFormat:
    """The format of a file whose extension is known."""
    return FORMATS[extension_of(path.name)]


def extension_of(name: str) -> str:
    """The longest known extension that the name ends with; empty if there is none."""
    return max((extension for extension in FORMATS if name.lower().endswith(extension)), key=len, default="")


def is_data(name: str) -> bool:
    """Whether a file that lies among others is one of rows, by its name."""
    return bool(extension_of(name)) and not name.startswith(".") and not _ABOUT.match(name)


def has_columns(path: Path) -> bool:
    """Whether the file says its columns before its rows."""
    return path.name.lower().endswith((".parquet", ".arrow"))


def _stream_rows(extension: str, path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    with path.open("rb") as file:
        yield from STREAMED[extension][1](str(path), chunks_of(path.name, file))


class _Members:
    """Reads the members of one archive: those of the kind that its first member of any kind has."""

    def __init__(self) -> None:
        self._kind = ""
        self._unread: list[str] = []

    def check(self, path: Path) -> None:
        """Raise UserError for an archive that holds files, and none of them of rows that are read out of archives."""
        if self._unread and not self._kind:
            shown = ", ".join(self._unread[:3]) + (" ..." if len(self._unread) > 3 else "")
            raise UserError(f"{path} holds {shown}, and of archives {', '.join(STREAMED)} are read, plain or packed. Unpack it and pass the folder.")  # fmt: skip

    def __call__(self, where: str, name: str, file: IO[bytes]) -> Iterator[Row | Reject] | None:
        base = Path(name).name
        extension = next((one for one in STREAMED if base.lower().endswith(tuple(f"{one}{p}" for p in PACKINGS))), None)
        if extension is None or not is_data(base):
            self._unread.append(name)
            return None
        kind, rows = STREAMED[extension]
        self._kind = self._kind or kind
        return rows(where, chunks_of(name, file)) if kind == self._kind else None


def _tar(path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    yield from tar_rows(path, columns, members := _Members())
    members.check(path)


def _zip(path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    yield from zip_rows(path, columns, members := _Members())
    members.check(path)


FORMATS: dict[str, FileFormat] = {
    **{
        f"{extension}{packing}": FileFormat(partial(_stream_rows, extension), 3.0 if packing else 1.0, kind)
        for extension, (kind, _) in STREAMED.items()
        for packing in PACKINGS
    },
    # Packed, and of what is not said: JSON it is nearly always.
    **{packing: FileFormat(partial(_stream_rows, ".json"), 3.0, "JSON") for packing in PACKINGS if packing},
    ".parquet": FileFormat(parquet_rows, 1.8, "Parquet"),
    ".arrow": FileFormat(arrow_rows, 1.0, "Arrow"),
    # Of packed files of rows, or packed as a whole.
    **{f".tar{packing}": FileFormat(_tar, 3.0, "archive") for packing in PACKINGS},
    **dict.fromkeys((".tgz", ".tbz2", ".txz"), FileFormat(_tar, 3.0, "archive")),
    ".zip": FileFormat(_zip, 3.0, "archive"),
}
