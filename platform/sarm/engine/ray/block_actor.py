"""The actor that turns blocks into part files, and its journal of what it has begun.

A block that kills its process is tried twice as a whole, then text by text with the text's number in the journal; a text that was
being computed when the process died twice is rejected. So no input can keep a pass from ending.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch

from sarm.contracts.manifest import write_atomically
from sarm.contracts.passes import Beat, Cost, Tables
from sarm.data.store.blocks import Block, read_block
from sarm.data.store.parts import finished_table, write_part
from sarm.engine.ray.device import gpu_refusal
from sarm.engine.ray.loading import loading
from sarm.passes.usage import Usage
from sarm.settings.checks import UserError

BEGUN = "begun"
_WHOLE_ATTEMPTS, _DEATHS_OF_A_ROW = 2, 2
_BEAT_SECONDS = 5.0


class Computes(Protocol):
    """What the actors of `sarm.passes` have in common.

    `prepare` tokenises, and may run beside another block's forward passes; `compute` runs them, one block at a time; `rejected` gives rows
    that say why an input gave nothing.
    """

    def prepare(self, table: pa.Table) -> Any: ...
    def compute(self, prepared: Any, beat: Beat) -> tuple[Tables, Cost]: ...
    def rejected(self, table: pa.Table, reason: str) -> Tables: ...


class Inputs(NamedTuple):
    """How the rows of an output are traced to those of the input: `ids` gives, of a table of `columns`, what `output_id` of the output has."""

    columns: Sequence[str]
    ids: Callable[[pa.Table], Sequence[Any]] | None
    output_id: str


class Output(NamedTuple):
    """Where the tables of one target go; `inputs` where its rows stand for something else than those of the pass's other outputs."""

    folder: Path
    table_schema: pa.Schema
    inputs: Inputs | None = None


class Journal:
    """What is known of the attempts at one block, on disk so that it survives them."""

    def __init__(self, folder: Path, number: int):
        self._path = folder / BEGUN / f"{number:06}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._state = json.loads(self._path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._state = {"attempts": 0, "row": None, "deaths": {}}
        if self._state["row"] is not None:
            row = str(self._state["row"])
            self._state["deaths"][row] = self._state["deaths"].get(row, 0) + 1
        self._state |= {"attempts": self._state["attempts"] + 1, "row": None, "beat": 0}
        self._state |= {"host": socket.gethostname(), "pid": os.getpid()}
        self._written = 0.0
        self._write()

    @property
    def is_careful(self) -> bool:
        """Whether the block goes row by row: as a whole it never came to its end."""
        attempts: int = self._state["attempts"]
        return attempts > _WHOLE_ATTEMPTS

    def killed(self, row: int) -> bool:
        """Whether this row was in work as often as a row may be when its process died."""
        deaths: int = self._state["deaths"].get(str(row), 0)
        return deaths >= _DEATHS_OF_A_ROW

    def doubt(self, row: int | None) -> None:
        """Note the row that is in work, before it is."""
        self._state["row"] = row
        self._write()

    def beat(self) -> None:
        """A sign of life for the driver, every few seconds."""
        if time.monotonic() - self._written > _BEAT_SECONDS:
            self._state["beat"] += 1
            self._write()

    def done(self) -> None:
        """Forget the block."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        write_atomically(self._path, json.dumps(self._state), sync=False)


class BlockActor:
    """Computes blocks by their number and writes their parts; hands back what a block took."""

    def __init__(
        self,
        blocks: Mapping[int, Block],
        columns: Sequence[str],
        keep: Callable[[pa.Table], pa.Table] | None,
        outputs: Mapping[Any, Output],
        actor: Callable[..., Computes],
        arguments: Mapping[str, Any],
        threads: int,
    ):
        # Raised at the first block: of what a constructor raises, Ray keeps no more than the text.
        self._refusal = gpu_refusal()
        if self._refusal:
            return
        self._blocks, self._columns, self._keep, self._outputs = blocks, columns, keep, outputs
        self._journal_folder = next(iter(outputs.values())).folder
        # One block in the forward pass at a time; beside it another is read and tokenised, or written. Always the same thread: each
        # that computes has workers of its own, and OpenMP lets those sleep between two products once they outnumber the cores.
        self._forward = ThreadPoolExecutor(1, "forward", torch.set_num_threads, (threads,))
        with loading(self._journal_folder / BEGUN):
            self._actor = self._forward.submit(actor, **arguments, threads=threads).result()
        self._usage = Usage()

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._refusal:
            raise UserError(self._refusal)
        done = [self._do(self._blocks[number]) for number in batch.column("number").to_pylist()]
        return pa.Table.from_pylist(done)

    def _do(self, block: Block) -> dict[str, Any]:
        began = time.time()
        journal = Journal(self._journal_folder, block.number)
        table = read_block(block, self._columns)
        table = table if self._keep is None else self._keep(table)
        tables, cost = self._row_by_row(table, journal) if journal.is_careful else self._whole(table, journal)
        counts: dict[str, int] = {}
        for target, output in self._outputs.items():
            part = finished_table(tables[target], output.table_schema, cost=asdict(cost))
            write_part(part, output.folder, block.number)
            counts[str(target)] = part.num_rows
        journal.done()
        return {
            "number": block.number, "began": began, "ended": time.time(), "rows": block.num_rows, "outputs": sum(counts.values()), **asdict(cost),
            **self._usage.taken(),
        }  # fmt: skip

    def _whole(self, table: pa.Table, journal: Journal) -> tuple[Tables, Cost]:
        try:
            prepared = self._actor.prepare(table)
            return self._forward.submit(self._actor.compute, prepared, journal.beat).result()
        # Whatever one row can raise in a tokenizer, a template or a model: the other rows are computed without it.
        except Exception as error:
            _raise_of_user(error)
            if table.num_rows == 1:
                return self._actor.rejected(table, _reason(error)), Cost()
            first = error
        tables, cost, errors = self._forward.submit(self._each, table, journal, mark=False).result()
        if errors == table.num_rows:
            # Not the rows: the program, the model or the machine.
            raise first
        return tables, cost

    def _row_by_row(self, table: pa.Table, journal: Journal) -> tuple[Tables, Cost]:
        tables, cost, _ = self._forward.submit(self._each, table, journal, mark=True).result()
        return tables, cost

    def _each(self, table: pa.Table, journal: Journal, *, mark: bool) -> tuple[Tables, Cost, int]:
        """Every row by itself; with `mark` under its number in the journal, for the case that the process does not survive it."""
        found: list[Tables] = []
        total, errors = Cost(), 0
        for i in range(table.num_rows):
            row = table.slice(i, 1)
            if mark and journal.killed(i):
                found.append(self._actor.rejected(row, "killed_the_process"))
                continue
            if mark:
                journal.doubt(i)
            try:
                tables, cost = self._actor.compute(self._actor.prepare(row), journal.beat)
            except Exception as error:
                _raise_of_user(error)
                tables, cost, errors = self._actor.rejected(row, _reason(error)), Cost(), errors + 1
            found.append(tables)
            total.tokens += cost.tokens
            total.padded_tokens += cost.padded_tokens
            total.forward_seconds += cost.forward_seconds
            total.contents_with_control_tokens += cost.contents_with_control_tokens
            total.contents_already_templated += cost.contents_already_templated
        if mark:
            journal.doubt(None)
        empty = found or [self._actor.compute(self._actor.prepare(table), journal.beat)[0]]
        return (
            {target: pa.concat_tables([tables[target] for tables in empty]) for target in self._outputs},
            total,
            errors,
        )


def _raise_of_user(error: Exception) -> None:
    """What the user has to mend is no row's fault, unless it names the reason by which such rows are counted."""
    if isinstance(error, UserError) and not hasattr(error, "reason"):
        raise error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or f"error:{type(error).__name__}"
