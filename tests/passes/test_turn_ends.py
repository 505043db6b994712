"""What actors compute for `turn_end`, row by row against passes over the conversations that stop there. No cluster."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.data.tokens.test_groups import pair
from tests.passes.alone import run_alone
from tests.passes.test_refused_pairs import NO_SYSTEM
from transformers import AutoTokenizer

from sarm.contracts.ids import response_id_of, stable_int
from sarm.contracts.passes import Target
from sarm.contracts.tables import CONVERSATIONS_TABLE, CORPUS_TABLE, PAIRS_TABLE, activations_table
from sarm.data.sources.tiny import tiny_pairs, tiny_texts
from sarm.data.store.activations import vectors
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.parts import finished_table, part_files
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.turn_ends import AnswerEnds
from sarm.engine.passes import Pass
from sarm.engine.ray.block_actor import Inputs, Output
from sarm.nn.pretrained import load_backbone
from sarm.passes.activations import Backbone, ChatActivations
from sarm.passes.turn_ends import PairTurnEnds, TextTurnEnds, response_row_ids
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=128)
EXTRACTION = ExtractionSettings(batch_tokens=512, units=("turn_end",), word_share=0.2)
TURN_ENDS, CHAT_ENDS = Target("turn_end", 2), Target("chat", 2)
LAYERS = [Target("turn_end", 1), TURN_ENDS]
SCHEMAS = {target: activations_table(64, {"dtype": "bfloat16"}, kinds=True) for target in LAYERS}


def ends_of(actor: type[Backbone], table: pa.Table, folder: Path, schemas: Any = None, **extraction: Any) -> Any:
    settings = ExtractionSettings(**{**vars(EXTRACTION), "dtype": "bfloat16", **extraction})
    worker: Any = actor(MODEL, str(folder), settings, schemas or SCHEMAS, 1)
    return worker.compute(worker.prepare(table), lambda: None)[0]


def texts_table(num: int = 12) -> pa.Table:
    rows = [{"row_id": 100 + n, "text": text, "source": "s"} for n, text in zip(range(num), tiny_texts(), strict=False)]
    return pa.Table.from_pylist(rows, schema=CORPUS_TABLE)


def pairs_table(num: int = 12) -> pa.Table:
    rows = [
        {**row, "pair_id": f"p{n}", "prompt_id": row["prompt"][0]["content"], "split": "train"}
        for n, row in zip(range(num), tiny_pairs(), strict=False)
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS_TABLE)


def assert_as_alone(table: pa.Table, layer: int, sequences: dict[tuple[int, int], list[int]], folder: Path) -> None:
    """Each stored row is the last token of its own sequence, by (row_id, position); the vectors of some are compared."""
    model = load_backbone(str(folder), layer)
    found = vectors(table, "bfloat16").float()
    keys = table.select(["row_id", "position", "num_tokens", "token_id"]).to_pylist()
    for number, (x_D, key) in enumerate(zip(found, keys, strict=True)):
        ids = sequences[key["row_id"], key["position"]]
        assert (key["num_tokens"], key["token_id"]) == (len(ids), ids[-1])
        if number % 4:
            continue
        with torch.no_grad():
            alone = model(torch.tensor([ids])).last_hidden_state[0, -1]
        # What is stored has 8 bits behind the point.
        torch.testing.assert_close(x_D, alone, rtol=2**-8, atol=1e-5)


def sequences_of(chat: ChatTokenizer, prompt: list, answer: str, seed: str) -> dict[int, tuple[list[int], str]]:
    """Ids and kind of every end of an answer, by position, from conversations that stop there."""
    (tokens,) = chat.encode_responses(prompt, [answer], offsets=True)
    found = {len(tokens.ids) - 1: (tokens.ids, "true_end")}
    for column, kind in AnswerEnds(chat, "rules", EXTRACTION.word_share).branches(answer, tokens, seed).items():
        (stopped,) = chat.encode_responses(prompt, [answer[: tokens.offsets[column][1]]])
        found[len(stopped.ids) - 1] = stopped.ids, kind
    return found


def test_every_distinct_response_has_each_of_its_ends_once_and_as_alone(tiny_folder, tiny_chat):
    table = pairs_table()
    tables = ends_of(PairTurnEnds, table, tiny_folder)
    responses = {
        stable_int(response_id_of(row["prompt"], row[side])): (row["prompt"], row[side], row["prompt_id"])
        for row in table.to_pylist()
        for side in ("chosen", "rejected")
    }
    assert len(responses) < 2 * table.num_rows, "some responses are in several pairs"
    expected = {
        (row_id, position): end
        for row_id, (prompt, answer, _) in responses.items()
        for position, end in sequences_of(tiny_chat, prompt, answer, f"{row_id:016x}").items()
    }
    for target in LAYERS:
        rows = tables[target].to_pylist()
        assert Counter((row["row_id"], row["position"]) for row in rows) == Counter(expected.keys())
        for row in rows:
            assert row["kind"] == expected[row["row_id"], row["position"]][1]
            assert (row["doc_id"], row["side"], row["reject"]) == (responses[row["row_id"]][2], "response", None)
        kinds = Counter(row["kind"] for row in rows)
        assert kinds["true_end"] == len(responses)
        assert min(kinds["sentence"], kinds["word"]) > len(responses) / 2
        ids = {key: end[0] for key, end in expected.items()}
        assert_as_alone(tables[target], target.layer, ids, tiny_folder)


def test_ends_of_pairs_are_beside_turn_ends_what_they_are_without(tiny_folder):
    table = pairs_table()
    plain = activations_table(64, {"dtype": "bfloat16"})
    alone = ends_of(ChatActivations, table, tiny_folder, {CHAT_ENDS: plain})[CHAT_ENDS]
    beside = ends_of(PairTurnEnds, table, tiny_folder, {CHAT_ENDS: plain, TURN_ENDS: SCHEMAS[TURN_ENDS]})[CHAT_ENDS]
    assert beside.drop(["activation"]).equals(alone.drop(["activation"]))
    torch.testing.assert_close(
        vectors(beside, "bfloat16").float(), vectors(alone, "bfloat16").float(), rtol=2**-7, atol=1e-5
    )


def test_texts_are_answers_with_each_end_once_and_as_alone(tiny_folder, tiny_chat):
    table = texts_table()
    tables = ends_of(TextTurnEnds, table, tiny_folder)
    ends = AnswerEnds(tiny_chat, "rules", EXTRACTION.word_share)
    expected: dict[tuple[int, int], tuple[list[int], str]] = {}
    num_turns = 0
    for row in table.to_pylist():
        first = 0
        for number, turn in enumerate(ends.turns(row["text"], f"{row['row_id']:016x}")):
            own = sequences_of(tiny_chat, turn.prompt, turn.answer, f"{row['row_id']:016x}:{number}")
            expected |= {(row["row_id"], first + position): end for position, end in own.items()}
            first += max(own) + 1
            num_turns += 1
    assert num_turns > table.num_rows, "some texts are too long for one answer"
    rows = tables[TURN_ENDS].to_pylist()
    assert Counter((row["row_id"], row["position"]) for row in rows) == Counter(expected.keys())
    assert all(row["kind"] == expected[row["row_id"], row["position"]][1] for row in rows)
    assert {(row["doc_id"], row["side"]) for row in rows} == {(f"{n:016x}", "text") for n in range(100, 112)}
    assert_as_alone(tables[TURN_ENDS], 2, {key: end[0] for key, end in expected.items()}, tiny_folder)


def test_of_a_conversation_in_the_corpus_the_last_answer_is_taken(tiny_folder, tiny_chat):
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So it is. And so on."}]
    rows = [
        {"row_id": n, "text": "Plain text. Of two sentences.", "source": "", "messages": messages}
        for n, messages in enumerate((turns, turns[:1], None))
    ]
    table = pa.Table.from_pylist(rows, schema=CONVERSATIONS_TABLE)
    found = ends_of(TextTurnEnds, table, tiny_folder, word_share=None)[TURN_ENDS]
    positions = [row["position"] for row in found.to_pylist() if row["row_id"] == 0]
    (tokens,) = tiny_chat.encode([turns])
    (stopped,) = tiny_chat.encode([[turns[0], {"role": "assistant", "content": "So it is."}]])
    assert positions == [len(stopped.ids) - 1, len(tokens.ids) - 1]
    assert {row["row_id"] for row in found.to_pylist()} == {0, 1, 2}


@pytest.fixture(scope="module")
def no_system(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model under a template without system turns."""
    found = tmp_path_factory.mktemp("model")
    for path in tiny_folder.iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            (found / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(found)
    return found


def test_responses_and_texts_that_cannot_be_encoded_are_rejected_by_reason(no_system: Path):
    refused = pair("r", "a", "b")
    refused["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    table = pa.Table.from_pylist([pair("p", "a", "b"), refused], schema=PAIRS_TABLE)
    found = ends_of(PairTurnEnds, table, no_system)[TURN_ENDS]
    assert Counter(found["reject"].to_pylist()) == {None: 2, "template_refuses": 2}
    assert set(found["row_id"].to_pylist()) == set(response_row_ids(table))
    system = [refused["prompt"][0], *pair("r", "a", "b")["prompt"], {"role": "assistant", "content": "a"}]
    rows = [{"row_id": n, "text": "A text.", "source": "", "messages": m} for n, m in enumerate((system, None))]
    texts = ends_of(TextTurnEnds, pa.Table.from_pylist(rows, schema=CONVERSATIONS_TABLE), no_system)[TURN_ENDS]
    assert dict(zip(texts["row_id"].to_pylist(), texts["reject"].to_pylist(), strict=True)) == {0: "template_refuses", 1: None}  # fmt: skip
    finished = finished_table(found, SCHEMAS[TURN_ENDS])
    assert finished.column_names == SCHEMAS[TURN_ENDS].names


def text_pass(folder: Path, model: Path) -> Pass:
    target = LAYERS[0]
    return Pass(
        name="texts",
        blocks=plan_blocks([folder.parent / "corpus.parquet"], 1),
        columns=("row_id", "text"),
        keep=None,
        actor=TextTurnEnds,
        arguments={"model": MODEL, "folder": str(model), "extraction": EXTRACTION, "schemas": _schemas(target)},
        outputs={target: Output(folder, _schemas(target)[target])},
        id_columns=("row_id",),
        input_ids=lambda table: table.column("row_id").to_pylist(),
        output_id="row_id",
    )


def pair_pass(folder: Path, model: Path) -> Pass:
    target, chat = LAYERS[0], Target("chat", 1)
    schemas = _schemas(target) | {chat: activations_table(64, {"dtype": "float16"})}
    return Pass(
        name="pairs",
        blocks=plan_blocks([folder.parent / "pairs.parquet"], 1, together="prompt_id"),
        columns=("pair_id", "prompt_id", "split", "prompt", "chosen", "rejected", "margin", "subset"),
        keep=None,
        actor=PairTurnEnds,
        arguments={"model": MODEL, "folder": str(model), "extraction": EXTRACTION, "schemas": schemas},
        outputs={
            chat: Output(folder / "chat", schemas[chat]),
            target: Output(
                folder / "ends",
                schemas[target],
                Inputs(("pair_id", "prompt", "chosen", "rejected"), response_row_ids, "row_id"),
            ),
        },
        id_columns=("pair_id",),
        input_ids=lambda table: [stable_int(pair_id) for pair_id in table.column("pair_id").to_pylist()],
        output_id="row_id",
    )


def _schemas(target: Target) -> dict[Target, pa.Schema]:
    return {target: activations_table(64, {"dtype": "float16"}, kinds=True)}


@pytest.mark.parametrize("make_pass", [text_pass, pair_pass], ids=["texts", "pairs"])
def test_a_killed_pass_goes_on_where_it_was_and_writes_the_same(
    make_pass: Callable[[Path, Path], Pass], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some blocks, whatever their size.
    monkeypatch.setattr("sarm.data.store.blocks._MIN_BYTES", 1)
    pq.write_table(texts_table(12), tmp_path / "corpus.parquet", row_group_size=2)
    pq.write_table(pairs_table(30), tmp_path / "pairs.parquet", row_group_size=3)
    works = {name: make_pass(tmp_path / name, tiny_folder) for name in ("whole", "killed")}
    assert len(works["whole"].blocks) >= 4
    counts = run_alone(works["whole"])
    assert sum(counts[LAYERS[0]]["kinds"].values()) == counts[LAYERS[0]]["rows"]
    killed_at_reading(3, works["killed"])
    done = part_files_of(tmp_path / "killed")
    assert 0 < len(done) < len(part_files_of(tmp_path / "whole"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    again = run_alone(works["killed"])
    assert {path: path.stat().st_mtime_ns for path in done} == stamps
    assert again[LAYERS[0]]["kinds"] == counts[LAYERS[0]]["kinds"]
    whole, killed = ([pq.read_table(p) for p in part_files_of(tmp_path / name)] for name in works)
    assert whole == killed


def part_files_of(folder: Path) -> Sequence[Path]:
    return [path for own in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) for path in part_files(own)]


def killed_at_reading(number: int, work: Pass) -> None:
    """Do the pass in a child that the model's reading of this number kills."""
    child = os.fork()
    if child == 0:
        try:
            whole, readings = Backbone._read, []

            def read(*arguments: Any) -> Any:
                readings.append(1)
                if len(readings) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(*arguments)

            Backbone._read = read  # type: ignore[method-assign]
            run_alone(work)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
