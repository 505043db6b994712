"""Data sets of the Hugging Face hub: `hf:NAME[@REVISION][:CONFIG][:SPLIT]`, streamed."""

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from sarm.data.sources.rows import Row
from sarm.settings.checks import UserError

SYNTAX = "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with @REVISION behind the name if need be"
_SPEC = re.compile(
    r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[^:]+)(?=:))?(?::(?P<split>[^:]+))?"
)
# Seconds before a stream that broke off is opened again where it was; the count begins anew with each row that comes.
_PAUSES = (1.0, 4.0, 15.0)


class DataSet(NamedTuple):
    """A data set of the hub by its parts; None where the hub's default counts."""

    name: str
    revision: str | None
    config: str | None
    split: str


def is_data_set(spec: str) -> bool:
    """Whether the source is a Hugging Face data set."""
    return spec.startswith("hf:")


def parse_data_set(spec: str) -> DataSet:
    """The parts of `hf:NAME[@REVISION][:CONFIG][:SPLIT]`, split `train` unless told. Raises UserError."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"{spec} is not a data set. Write {SYNTAX}.")
    return DataSet(match["name"], match["revision"], match["config"], match["split"] or "train")


def data_set_rows(spec: str) -> Iterator[Row]:
    """The rows of a data set, streamed; a stream that breaks off is opened again and goes on behind its last row.

    Raises UserError with the library's reason if the data set cannot be opened or read.
    """
    wanted = parse_data_set(spec)
    number, pauses = 0, iter(_PAUSES)
    state: Any = None
    while True:
        stream: Any = None
        came = 0
        try:
            stream = _opened(wanted)
            if state is not None:
                stream.load_state_dict(state)
            for fields in stream:
                yield Row(fields, f"{spec} row {number + came}")
                came, pauses = came + 1, iter(_PAUSES)
            return
        # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
        except Exception as error:
            number += came
            if came:
                state = stream.state_dict() if hasattr(stream, "state_dict") else None
            pause = next(pauses, None) if state is not None else None
            if pause is None:
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                raise UserError(
                    f"{spec} cannot be read ({type(error).__name__}: {reason}). Check the name, the configuration, the split and the connection."
                ) from error
            time.sleep(pause)


def _opened(wanted: DataSet) -> Any:
    from datasets import load_dataset

    about = {"name": wanted.config, "revision": wanted.revision}
    named = {key: value for key, value in about.items() if value is not None}
    return load_dataset(wanted.name, split=wanted.split, streaming=True, **named)
