"""Audit codes, contexts, completions and held-out scores whose process is killed: the next run does what is left, and writes the same.

No cluster: a child does the blocks, and kills itself in the middle of one (`chaos/` kills jobs and their actors).
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.passes.alone import run_alone
from tests.stages.random_sarm import random_sarm

from sarm.audit.pairs import AUDIT_PAIRS
from sarm.contracts.ids import prompt_id_of, stable_id
from sarm.contracts.tables import CORPUS_TABLE, PAIRS_TABLE
from sarm.data.store.parts import part_files
from sarm.engine.passes import Counts, Pass, RunPass
from sarm.passes.models import find_model
from sarm.passes.reader import Reader, sarm_reader
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.contexts import ContextsSettings
from sarm.stages.audit_codes import write_codes
from sarm.stages.completion_scores import score_requests
from sarm.stages.context_collection import collect_contexts

WORDS = [
    "garden",
    "grows",
    "slowly",
    "with",
    "water",
    "light",
    "patience",
    "and",
    "a",
    "great",
    "deal",
    "of",
    "work",
    "over",
    "many",
    "weeks",
]
CONTEXTS = ContextsSettings(corpus=True, top=4, per_decile=1, sampled=20, span_answers=12, batch_tokens=256)


def text(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] for i in range(length)).capitalize() + "."


def pairs(num: int) -> list[dict[str, Any]]:
    found = []
    for n in range(num):
        prompt = [{"role": "user", "content": f"question {n // 3}: {text(n // 3, 4)}"}]
        chosen, rejected = f"{text(n, 9)} {text(n + 1, 5)}", text(n + 2, 6 + n % 9)
        known = {"prompt_id": prompt_id_of(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        found.append({"pair_id": stable_id(str(n)), **known, "source": "s", "split": "train", "role": "target", "subset": "x", "margin": None})  # fmt: skip
    return found


@pytest.fixture(scope="module")
def reader(tiny_folder, tiny_chat, tmp_path_factory) -> Reader:
    return sarm_reader(random_sarm(tmp_path_factory.mktemp("killed") / "sarm", tiny_folder, tiny_chat), 256)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarm.stages.audit_codes._BLOCK_ROWS", 4)
    monkeypatch.setattr("sarm.stages.completion_scores.BLOCK_PROMPTS", 2)
    monkeypatch.setattr("sarm.passes.contexts._SLICE_ROWS", 8)
    monkeypatch.setattr("sarm.stages.context_collection._ANSWERS_OF_BLOCK", 2)


def codes(folder: Path, reader: Reader, run_pass: RunPass) -> None:
    write_codes(pa.Table.from_pylist(pairs(30), schema=AUDIT_PAIRS), reader, folder, run_pass)


def contexts(folder: Path, reader: Reader, run_pass: RunPass) -> None:
    # Beside the stage's folder, as in a run.
    rows = pa.Table.from_pylist(pairs(30)).select(PAIRS_TABLE.names).cast(PAIRS_TABLE)
    pq.write_table(rows, folder.parent / "pairs.parquet")
    texts = [{"row_id": n, "text": f"{text(n, 8)} {text(n + 3, 7)}", "source": "s"} for n in range(12)]
    pq.write_table(pa.Table.from_pylist(texts, schema=CORPUS_TABLE), folder.parent / "corpus.parquet")
    files = [[folder.parent / f"{name}.parquet"] for name in ("pairs", "corpus")]
    collect_contexts(CONTEXTS, reader, *files, folder, run_pass)


def completions(folder: Path, reader: Reader, run_pass: RunPass) -> None:
    spec = find_model(Benchmarking(model=str(reader.folder), benchmarks=("pairs=x",)))
    asked = [(json.dumps([["user", f"question {n // 3}"]]), text(n, 5 + n % 7), f"id{n}") for n in range(30)]
    known = [
        key for path in folder.glob("*/part-*.parquet") for key in pq.read_table(path)["completion_id"].to_pylist()
    ]
    score_requests(spec, [row for row in asked if row[2] not in known], folder, 256, run_pass)


def killed_at_reading(number: int, stage: Callable[..., None], folder: Path, reader: Reader) -> None:
    """Do the stage in a child that the model's reading of this number kills."""
    child = os.fork()
    if child == 0:
        try:
            whole, readings = Reader.read, []

            def read(*arguments: Any, **options: Any) -> Any:
                readings.append(1)
                if len(readings) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(*arguments, **options)

            Reader.read = read  # type: ignore[method-assign]
            stage(folder, reader, run_alone)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def tables(folder: Path) -> dict[str, Any]:
    """Every file that is left, parts of the cache's passes by their number; times are those of a run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.read_table(path)
        times = [name for name in ("started", "seconds") if name in table.column_names]
        found[path.name] = table.drop_columns(times).to_pylist() if times else path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("stage", "kills"),
    # Of contexts, in pairs, texts and driving parts.
    [(codes, [3, 4]), (contexts, [3, 6, 9]), (completions, [3, 2])],
    ids=["codes", "contexts", "completions"],
)
def test_a_killed_pass_goes_on_where_it_was_and_writes_the_same(
    stage: Callable[..., None], kills: Sequence[int], reader: Reader, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    blocks: dict[str, list[int]] = {}

    def counting(work: Pass) -> Counts:
        return run_alone(work, shuffled=False, before_block=lambda block: blocks.setdefault(work.name, []).append(block.number))  # fmt: skip

    stage(whole, reader, counting)
    every = {name: sorted(numbers) for name, numbers in blocks.items()}
    assert all(len(numbers) >= 3 for numbers in every.values()), every
    for number in kills:
        before = parts(killed)
        killed_at_reading(number, stage, killed, reader)
        assert before.items() < parts(killed).items(), "blocks that were done stay, and others have come"
    before = parts(killed)
    blocks.clear()
    stage(killed, reader, counting)
    assert sum(map(len, blocks.values())) == sum(map(len, every.values())) - len(before)
    assert tables(killed) == tables(whole)


def parts(folder: Path) -> dict[Path, int]:
    """The blocks that are done, with the time when."""
    folders = {path.parent for path in folder.rglob("part-*.parquet")}
    return {path: path.stat().st_mtime_ns for own in folders for path in part_files(own)}
