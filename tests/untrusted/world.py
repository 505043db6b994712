"""What the rows of the table of bad inputs share: a run to spoil, and jobs that are run as their scripts, in this process."""

import contextlib
import io
import itertools
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a job ended."""

    code: int
    out: str
    err: str


@dataclass
class World:
    """A folder of its own for one row; `small_run` is finished and must not be touched, `run()` is a copy of it."""

    tmp: Path
    small_run: Path
    tiny_model: Path
    mlflow_uri: str
    _outs: int = 0

    def new_out(self) -> Path:
        """An output folder that nothing was written to."""
        self._outs += 1
        return self.tmp / f"out-{self._outs}"

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def run(self, *, without: tuple[str, ...] = ("sarm",)) -> Path:
        """A copy of the small run in `out`, without some of its folders."""
        shutil.copytree(self.small_run, self.out)
        for name in without:
            shutil.rmtree(self.out / name)
        return self.out

    def model(self) -> Path:
        """A copy of the tiny model's folder."""
        return Path(shutil.copytree(self.tiny_model, self.tmp / "model"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def lines(self, name: str, rows: list[Any]) -> Path:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def job(self, name: str, *arguments: object) -> Ended:
        """Run a job's script with these arguments."""
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        script = ROOT / "jobs" / f"{name}.py"
        sys.argv = [str(script), *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = before
        return Ended(code, out.getvalue(), err.getvalue())

    def refuses(self, *words: str, of: tuple[object, ...], keeps: bool = False) -> str:
        """The one line with which a job (its name, then arguments; `--out` unless given) refuses; it must say `words`.

        Nothing may be left, or, for what only reading all of the data can find, or in a run that was there before (`keeps`), no
        manifest that was not there before.
        """
        name, *arguments = map(str, of)
        before = {path: path.read_bytes() for path in self.tmp.rglob("manifest.json")}
        takes_run = name not in ("reward_card", "convert_sae", "convert_sarm")
        if "--out" not in arguments and takes_run:
            arguments += ["--out", str(self.out)]
        if takes_run and "--mlflow-uri" not in arguments:
            arguments += ["--mlflow-uri", self.mlflow_uri]
        out = next((value for flag, value in itertools.pairwise(arguments) if flag == "--out"), "")
        had = os.path.exists(out)
        ended = self.job(name, *arguments)
        line = refused(ended, *words)
        after = {path: path.read_bytes() for path in self.tmp.rglob("manifest.json")}
        if keeps:
            # The stage before it was done well.
            after = {path: content for path, content in after.items() if path in before or path.parent.name != "corpus"}
        assert after == before
        assert had or keeps or not os.path.exists(out), "something was written"
        return line


def refused(ended: Ended, *words: str) -> str:
    """The line of a job that ended with status 2 and exactly one line about an error, which says `words`."""
    assert ended.code == 2, (ended.code, ended.out[-1000:], ended.err[-3000:])
    *above, line = ended.err.strip().splitlines()
    # A bar that counts rows may stand above the error; nothing stands below it.
    assert line.startswith("error: "), ended.err[-2000:]
    assert not [other for other in above if other.startswith(("error", "Traceback"))], ended.err[-2000:]
    for word in words:
        assert word in line, line
    assert len(line) < 900, line
    return line


class Row(NamedTuple):
    """A row of the table: what is put in, and what must come of it, or why it cannot be put in."""

    number: int
    name: str
    check: Callable[[World], None] | str


class Table:
    """Rows in the order of their numbers."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, number: int, name: str) -> Callable[[Callable[[World], None]], None]:
        """Add the decorated check."""

        def add(check: Callable[[World], None]) -> None:
            self.rows.append(Row(number, name, check))

        return add

    def cannot(self, number: int, name: str, reason: str) -> None:
        """Add a row that no input of this platform can be."""
        self.rows.append(Row(number, name, reason))
