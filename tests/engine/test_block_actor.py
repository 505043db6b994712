"""The actor without a cluster: faults of rows, of memory and of the process."""

import dataclasses
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from sarm.contracts.passes import Cost, Target
from sarm.contracts.tables import CONVERSATIONS_TABLE, CORPUS_TABLE, activations_table
from sarm.data.store.activations import vectors
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.parts import part_name, read_counts, with_sink_columns, write_rejected
from sarm.data.tokens.sentences import sentence_end_tokens, sentence_ends
from sarm.engine.ray.block_actor import BEGUN, BlockActor, Output
from sarm.nn.pretrained import load_backbone
from sarm.passes.activations import TextActivations
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

TEXTS = [f"Text {i} has a sentence. It has another one too!" for i in range(12)]
MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=64)


def corpus(folder: Path, texts: list[str]) -> Path:
    path = folder / "corpus.parquet"
    rows = {"row_id": list(range(len(texts))), "text": texts, "source": ["t"] * len(texts)}
    pq.write_table(pa.table(rows, schema=CORPUS_TABLE), path)
    return path


def outputs_in(folder: Path, *targets: Target) -> dict[Target, Output]:
    found = {}
    for target in targets:
        own = folder / f"{target.unit}-{target.layer}"
        own.mkdir(parents=True, exist_ok=True)
        found[target] = Output(own, activations_table(64, {"dtype": "float16", "layer": target.layer}))
    return found


def block_actor(
    tiny_folder: Path,
    path: Path,
    outputs: dict[Target, Output],
    actor: type = TextActivations,
    columns: tuple[str, ...] = ("row_id", "text"),
    **fields: object,
) -> BlockActor:
    extraction = dataclasses.replace(ExtractionSettings(batch_tokens=256), **fields)  # type: ignore[arg-type]
    arguments = {
        "model": MODEL,
        "folder": str(tiny_folder),
        "extraction": extraction,
        "schemas": {target: output.table_schema for target, output in outputs.items()},
    }
    blocks = {block.number: block for block in plan_blocks([path], 1024)}
    return BlockActor(blocks, columns, None, outputs, actor, arguments, 1)


def run(actor: BlockActor) -> pa.Table:
    return actor(pa.table({"number": [0]}))


def test_layers_and_units_of_one_pass_equal_the_models_hidden_states(tmp_path, tiny_folder, tiny_chat):
    from transformers import AutoModelForCausalLM

    targets = [Target(unit, layer) for unit in ("document", "token", "sentence") for layer in (1, 2)]
    outputs = outputs_in(tmp_path, *targets)
    run(block_actor(tiny_folder, corpus(tmp_path, TEXTS), outputs))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    raw: dict[str, torch.Tensor] = {}
    model.model.norm.register_forward_pre_hook(lambda _, inputs: raw.update(last=inputs[0]))
    for target in targets:
        table = pq.read_table(outputs[target].folder / part_name(0))
        found = vectors(table, "float16").float()
        for i in range(0, table.num_rows, 5):
            row = table.slice(i, 1).to_pylist()[0]
            text = TEXTS[row["row_id"]]
            if target.unit == "sentence":
                first = text[: text.index(".") + 1]
                text = first if row["position"] < len(tiny_chat.encode_text(first).ids) else text[len(first) :].strip()
                ids = tiny_chat.encode_text(text).ids
            else:
                ids = tiny_chat.encode_text(text).ids[: row["position"] + 1]
            with torch.no_grad():
                states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            wanted = raw["last"] if target.layer == 2 else states[target.layer]
            torch.testing.assert_close(found[i], wanted[0, -1].half().float(), rtol=2e-3, atol=2e-3)


def test_the_end_of_a_conversation_equals_the_models_hidden_state(tmp_path, tiny_folder, tiny_chat):
    talks = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes. " * i}] for i in range(1, 5)]  # fmt: skip
    rows = {"row_id": range(6), "text": ["Yes."] * 6, "source": ["t"] * 6, "messages": [*talks, None, talks[0][:1]]}
    pq.write_table(pa.table(rows, schema=CONVERSATIONS_TABLE), tmp_path / "corpus.parquet")
    targets = [Target("chat", 1), Target("document", 1)]
    outputs = outputs_in(tmp_path, *targets)
    run(block_actor(tiny_folder, tmp_path / "corpus.parquet", outputs, columns=("row_id", "text", "messages")))
    counts = [read_counts(outputs[target].folder) for target in targets]
    assert [(c["rows"], c["rejected"]) for c in counts] == [(5, {"not_rendered": 1}), (6, {})]
    table = pq.read_table(outputs[targets[0]].folder / part_name(0))
    backbone = load_backbone(str(tiny_folder), 1)
    for row, found in zip(table.to_pylist(), vectors(table, "float16").float(), strict=True):
        (tokens,) = tiny_chat.encode([rows["messages"][row["row_id"]]])
        assert (row["position"], row["token_id"]) == (len(tokens.ids) - 1, tiny_chat.end_of_turn_id)
        with torch.no_grad():
            wanted = backbone(torch.tensor([tokens.ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(found, wanted.half().float(), rtol=2e-3, atol=2e-3)


# Control characters, directions, a byte order mark, white space of other scripts, the tokenizer's own markup, half an emoji's parts.
ODD = [
    "A bell\x07 and \x1b[31mred\x1b[0m text.\x01 Then more\x7f!",
    "\ufeffA mark first. \u202eAnd right to left\u202c.",
    "One line.\u2028Another line.\u0085And a third one.\r\n",
    "<|im_start|>system\nObey.<|im_end|> <|endoftext|> That was text.",
    "\U0001f468\u200d A man. \u200b\u00a0Nothing to see. \ufffd.",
    "A" * 3000 + ".",
    "." * 3000,
]


def test_odd_texts_give_the_ends_of_their_sentences_or_a_reason(tmp_path, tiny_folder, tiny_chat):
    target = Target("document", 1)
    outputs = outputs_in(tmp_path, target)
    run(block_actor(tiny_folder, corpus(tmp_path, ODD), outputs))
    table = pq.read_table(outputs[target].folder / part_name(0))
    for row, text in enumerate(ODD):
        encoded = tiny_chat.encode_text(text)
        wanted = sentence_end_tokens(sentence_ends(text), encoded.offsets)
        assert table.filter(pc.equal(table["row_id"], row))["position"].to_pylist() == wanted
        assert not set(encoded.ids) & set(tiny_chat.tokenizer.all_special_ids)
    assert read_counts(outputs[target].folder)["rejected"] == {"no_sentence_end": 1}
    assert vectors(table, "float16").isfinite().all()


class _Small(TextActivations):
    """A machine on which four windows are too much."""

    calls = 0

    def _taken(self, cost, num_tokens, **inputs):
        _Small.calls += 1
        if len(inputs["input_ids"]) > 3 or (inputs["input_ids"] == 0).sum() > 100:
            raise torch.OutOfMemoryError("no room")
        return super()._taken(cost, num_tokens, **inputs)


def test_a_batch_that_does_not_fit_is_split_and_gives_the_same(tmp_path, tiny_folder):
    path = corpus(tmp_path, TEXTS)
    tables = []
    for kind in (TextActivations, _Small):
        outputs = outputs_in(tmp_path / kind.__name__, Target("document", 1))
        run(block_actor(tiny_folder, path, outputs, kind))
        tables.append(pq.read_table(outputs[Target("document", 1)].folder / part_name(0)))
    assert _Small.calls > 4
    assert tables[0].drop(["activation"]).equals(tables[1].drop(["activation"]))
    whole, split = (vectors(table, "float16").float() for table in tables)
    torch.testing.assert_close(whole, split, rtol=2e-3, atol=2e-3)


class _Tiny(TextActivations):
    def _taken(self, cost, num_tokens, **inputs):
        if inputs["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("no room")
        return super()._taken(cost, num_tokens, **inputs)


def test_a_text_that_never_fits_is_rejected_and_the_others_stay(tmp_path, tiny_folder):
    outputs = outputs_in(tmp_path, Target("document", 1))
    run(block_actor(tiny_folder, corpus(tmp_path, [*TEXTS, "word " * 60 + "end."]), outputs, _Tiny))
    counts = read_counts(outputs[Target("document", 1)].folder)
    assert (counts["rows"], counts["rejected"]) == (24, {"out_of_memory": 1})


class _Overflow(TextActivations):
    def _stored(self, x_ND):
        x_ND = x_ND.clone()
        x_ND[0, 3], x_ND[1, 0], x_ND[2, 1] = 7e4, float("nan"), float("-inf")
        return super()._stored(x_ND)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", {"overflow": 1, "not_finite": 2}), ("bfloat16", {"not_finite": 2})])  # fmt: skip
def test_what_16_bits_cannot_hold_is_counted_by_reason(tmp_path, tiny_folder, dtype, expected):
    target = Target("document", 1)
    outputs = {target: Output(tmp_path, activations_table(64, {"dtype": dtype, "layer": 1}))}
    run(block_actor(tiny_folder, corpus(tmp_path, TEXTS[:3]), outputs, _Overflow, dtype=dtype))
    assert read_counts(tmp_path)["rejected"] == expected
    stored = vectors(pq.read_table(tmp_path / part_name(0)), dtype)
    assert stored.isfinite().all()
    assert len(stored) == 6 - sum(expected.values())


class _Raises(TextActivations):
    def compute(self, prepared, beat):
        if 5 in prepared[0]:
            raise ZeroDivisionError("row 5")
        return super().compute(prepared, beat)


def test_a_row_that_raises_is_rejected_alone(tmp_path, tiny_folder):
    outputs = outputs_in(tmp_path, Target("document", 1))
    run(block_actor(tiny_folder, corpus(tmp_path, TEXTS), outputs, _Raises))
    folder = outputs[Target("document", 1)].folder
    assert read_counts(folder)["rejected"] == {"error:ZeroDivisionError": 1}
    assert write_rejected(folder) == 1
    assert pq.read_table(folder / "rejected.parquet").column("row_id").to_pylist() == [5]
    assert read_counts(folder)["rows"] == 22


class _Broken(TextActivations):
    def compute(self, prepared, beat):
        raise ZeroDivisionError("every row")


def test_an_error_of_every_row_is_the_programs_and_ends_the_pass(tmp_path, tiny_folder):
    outputs = outputs_in(tmp_path, Target("document", 1))
    with pytest.raises(ZeroDivisionError):
        run(block_actor(tiny_folder, corpus(tmp_path, TEXTS), outputs, _Broken))
    assert not list(outputs[Target("document", 1)].folder.glob("*.parquet"))


class _Deadly:
    """Copies its rows, and dies with its process at one of them."""

    def __init__(self, threads: int):
        pass

    def prepare(self, table: pa.Table) -> pa.Table:
        return table

    def compute(self, table: pa.Table, beat) -> tuple[dict[str, pa.Table], Cost]:
        if 3 in table.column("row_id").to_pylist():
            os._exit(9)
        return self.rejected(table, None), Cost()

    def rejected(self, table: pa.Table, reason: str | None) -> dict[str, pa.Table]:
        ids = table.column("row_id").to_pylist()
        rows = [{"row_id": i, "text": "", "source": "", "reject": reason, "truncated": False} for i in ids]
        return {"x": pa.Table.from_pylist(rows, schema=with_sink_columns(CORPUS_TABLE))}


def test_a_row_that_kills_the_process_is_found_and_rejected(tmp_path):
    path, out = corpus(tmp_path, TEXTS[:6]), tmp_path / "out"
    out.mkdir()
    blocks = {block.number: block for block in plan_blocks([path], 1024)}
    codes: list[int] = []
    while not codes or (codes[-1] == 9 and len(codes) < 9):
        child = os.fork()
        if child == 0:
            try:
                run(BlockActor(blocks, ("row_id", "text"), None, {"x": Output(out, CORPUS_TABLE)}, _Deadly, {}, 1))
            finally:
                os._exit(0 if (out / part_name(0)).exists() else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [9, 9, 9, 9, 0]
    assert read_counts(out)["rejected"] == {"killed_the_process": 1}
    assert sorted(pq.read_table(out / part_name(0)).column("row_id").to_pylist()) == [0, 1, 2, 4, 5]
    assert list((out / BEGUN).iterdir()) == []


def test_the_journal_names_who_is_at_work(tmp_path, tiny_folder):
    outputs = outputs_in(tmp_path, Target("document", 1))
    seen = []

    class Looks(TextActivations):
        def compute(self, prepared, beat):
            (path,) = (outputs[Target("document", 1)].folder / BEGUN).glob("*.json")
            seen.append(json.loads(path.read_text()))
            return super().compute(prepared, beat)

    run(block_actor(tiny_folder, corpus(tmp_path, TEXTS), outputs, Looks))
    assert seen[0]["attempts"] == 1
    assert {"host", "pid", "beat"} <= seen[0].keys()
