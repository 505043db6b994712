"""Rows 24 to 47: data sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tests.untrusted.small_run import D_IN, activation_folder, refinish, write_sae
from tests.untrusted.world import Table, World

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.packing import collate, text_row
from sarm.settings.data import DataSettings
from sarm.settings.model import ModelSettings

TABLE = Table()
row = TABLE.row
GOOD = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def prepare(world: World, *words: str, pairs: object = None, texts: object = None, whole: bool = False) -> str:
    """`jobs/prepare_data.py` refuses a source; `whole` where only reading it to its end can tell."""
    flags: list[object] = []
    flags += ["--data.pairs", pairs] if pairs is not None else []
    flags += ["--data.texts", texts] if texts is not None else []
    return world.refuses(*words, of=("prepare_data", "tiny", *flags, "--out", world.new_out()), keeps=whole)


def texts(world: World, values: Any, name: str = "texts.parquet", column: str = "text") -> Path:
    pq.write_table(pa.table({column: values}), world.tmp / name)
    return world.tmp / name


def counted(world: World, bad: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What is counted of bad rows between good ones, which are kept."""
    good = [{**GOOD, "prompt": f"question {i}"} for i in range(20)]
    path = world.lines("mixed.jsonl", [*good, *bad])
    counts = prepare_pairs(DataSettings(pairs=(str(path),)), world.tmp / "mixed")
    assert counts["rows"] == 20
    return counts["rejected"]


@row(24, "0 rows / 0 files / glob matches none")
def _(world: World) -> None:
    prepare(world, "no file matches", pairs=world.tmp / "*.jsonl")
    prepare(world, "no usable text", "empty.jsonl", texts=world.file("empty.jsonl", ""), whole=True)
    prepare(world, "no usable text", texts=texts(world, pa.array([], pa.string())), whole=True)


@row(25, "0-byte Parquet")
def _(world: World) -> None:
    prepare(world, "zero.parquet (0 bytes)", pairs=world.file("zero.parquet", b""))


@row(26, "truncated Parquet")
def _(world: World) -> None:
    whole = texts(world, ["a", "b"]).read_bytes()
    prepare(world, f"cut.parquet ({len(whole) - 9} bytes)", "truncated", texts=world.file("cut.parquet", whole[:-9]))


@row(27, "bit-flipped page")
def _(world: World) -> None:
    part = world.run(without=("sarm", "sae")) / "activations" / "text" / "part-000000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    world.refuses("part-000000.parquet has changed", of=("train_sae", "tiny", "--only"))


@row(28, "column missing")
def _(world: World) -> None:
    prepare(world, "has no column 'text'", "it has body", texts=texts(world, ["a"], column="body"))
    prepare(
        world,
        "holds no preference pairs",
        "prompt, chosen",
        pairs=world.lines("a.jsonl", [{"prompt": "p", "chosen": "c"}]),
    )


@row(29, "text column is int/list/struct/binary")
def _(world: World) -> None:
    for kind, values in (("int64", [1]), ("list<", [["a"]]), ("struct<", [{"a": 1}]), ("binary", [b"a"])):
        prepare(world, f"'text' of {world.tmp}/texts.parquet is {kind}", texts=texts(world, values))


@row(30, "null text")
def _(world: World) -> None:
    prepare(
        world, "2 missing_text, first", "row 0", texts=texts(world, pa.array([None, None], pa.string())), whole=True
    )


@row(31, "empty / whitespace text")
def _(world: World) -> None:
    prepare(world, "3 empty, first", texts=texts(world, ["", "  ", "\n"]), whole=True)


@row(32, "invalid UTF-8 / lone surrogate")
def _(world: World) -> None:
    content = b'{"text": "\xff\xfe"}\n{"text": "\\ud800"}\n'
    path = world.file("odd.jsonl", content)
    prepare(world, "1 invalid_utf8, first", "odd.jsonl:1", "1 lone_surrogate", texts=path, whole=True)


@row(33, "NUL, control chars, RTL override, 1 MB of emoji")
def _(world: World) -> None:
    # A NUL is counted; the others are text. tests/report/hostile.py puts them into every page.
    path = world.lines("nul.jsonl", [{"text": "a\0b"}])
    prepare(world, "1 nul_byte, first", texts=path, whole=True)
    odd = ["bell \x07", "right \u202e to left", "🦊" * 250_000]
    ended = world.job("prepare_data", "tiny", "--out", world.tmp / "kept", "--mlflow-uri", world.mlflow_uri,
                      "--data.texts", world.lines("odd.jsonl", [{"text": text} for text in odd]))  # fmt: skip
    assert ended.code == 0, ended.err[-2000:]
    kept = pq.read_table(world.tmp / "kept" / "corpus" / "part-00000.parquet")["text"].to_pylist()
    assert kept == odd


@row(34, "over-long (10 k tokens)")
def _(world: World) -> None:
    chat = load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), world.tiny_model)
    conversation = [{"role": "user", "content": "word " * 10_000}, {"role": "assistant", "content": "The end."}]
    (tokens,) = chat.encode([conversation])
    assert len(tokens.ids) == 128
    assert tokens.num_truncated > 9_000
    assert tokens.ids[-1] == chat.end_of_turn_id, "the beginning is lost, never the rewarded token"


@row(35, "last token is padding (left pad + mask.sum−1)")
def _(world: World) -> None:
    rows = [
        text_row(number, [7] * length, ())._replace(taken=[(number, length - 1)]) for number, length in ((0, 3), (1, 9))
    ]
    batch = collate(rows, pad_id=0, join=False)
    taken = batch.input_ids[batch.rows, batch.columns]
    assert taken.tolist() == [7, 7], "the last token of each row, not what fills it"
    assert (batch.segment_ids[0] >= 0).sum() == 3


@row(36, "no pad token")
def _(world: World) -> None:
    folder = world.model()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat_tokenizer(ModelSettings(name=str(folder), layer=1), folder)
    chat.tokenizer.pad_token = None
    assert chat.pad_id == chat.end_of_turn_id


TABLE.cannot(
    37,
    "ids null / duplicated / string",
    "ids are not read but made: int64 from a text's hash, so that a text that stands twice is one row; the audit of every extraction compares them",
)


@row(38, "preference pair with chosen == rejected, missing side, ties")
def _(world: World) -> None:
    bad = [{**GOOD, "rejected": "yes "}, {"prompt": "q", "chosen": "yes"}, {**GOOD, "chosen": None}]
    assert counted(world, bad) == {"equal_answers": 1, "no_rejected": 1, "no_chosen": 1}
    tie = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": None}
    prepare(world, "2 no_preference, first", "ties.jsonl:1", pairs=world.lines("ties.jsonl", [tie, tie]), whole=True)


@row(39, "conversation roles wrong order, empty message, unknown role")
def _(world: World) -> None:
    def turns(*roles: str, content: str = "text") -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role in roles]

    bad = [
        {**GOOD, "prompt": turns("user", "assistant")},
        {**GOOD, "prompt": turns("wizard")},
        {**GOOD, "prompt": turns("user", content=" ")},
        {**GOOD, "prompt": []},
    ]
    assert counted(world, bad) == {"bad_roles": 2, "empty_prompt": 2}
    path = world.lines("roles.jsonl", [bad[0]])
    prepare(world, "1 bad_roles, first", "roles.jsonl:1", pairs=path, whole=True)


@row(40, "JSONL bad line 812")
def _(world: World) -> None:
    path = world.file("bad.jsonl", '{"text": ""}\n' * 811 + '{"text": "a"\n')
    prepare(world, "1 bad_json, first", "bad.jsonl:812", texts=path, whole=True)


@row(41, "CSV ragged, BOM, other delimiter")
def _(world: World) -> None:
    prepare(world, "1 ragged_row, first", "a.csv:2", texts=world.file("a.csv", "\ufefftext;b\n1;2;3\n"), whole=True)
    prepare(world, "unknown extension", ".csv", texts=world.file("a.xlsx", "x"))
    ended = world.job("rate", world.tmp, "--filled", world.file("a.csv", "latent;rating\n1;2\n"), "--out", world.out)
    assert (ended.code, "manifest.json" in ended.err) == (2, True)


@row(42, "mixed schema across files")
def _(world: World) -> None:
    for name, column in (("a.parquet", "text"), ("b.parquet", "body")):
        texts(world, ["a"], name, column)
    prepare(world, "b.parquet has no column 'text'", texts=world.tmp / "*.parquet")


@row(43, "HF dataset without config/split, gated, offline, renamed column")
def _(world: World) -> None:
    prepare(world, "is not a data set", "hf:NAME:SPLIT", texts="hf:a/b/c/d")


@row(44, "Parquet with Ray pickle extension type")
def _(world: World) -> None:
    for name in (b"ray.data.arrow_pickled_object", b"ray.data.arrow_tensor_v2", b"arrow.py_extension_type"):
        metadata = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": b"\x80\x04."}
        field = pa.field("chosen", pa.binary(), metadata=metadata)
        plain = [pa.field("prompt", pa.string()), pa.field("rejected", pa.string())]
        table = pa.table([pa.array(["q"]), pa.array(["no"]), pa.array([b"yes"])], schema=pa.schema([*plain, field]))
        pq.write_table(table, world.tmp / "evil.parquet")
        prepare(world, "evil.parquet", "extension type", pairs=world.tmp / "evil.parquet")


@row(45, "symlink out of the data root, ..")
def _(world: World) -> None:
    run = world.run()
    manifest = json.loads((run / "pairs" / "manifest.json").read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        text = json.dumps(
            {key: value for key, value in manifest.items() if key != "checksum"} | {"files": {name: "0" * 64}}
        )
        (run / "pairs" / "manifest.json").write_text(text)
        world.refuses("no file of this folder", of=("train_sarm", "tiny", "--only"))
    (run / "pairs" / "link.json").symlink_to("/etc/hostname")
    refinish(run / "pairs", "pairs/v1")
    world.refuses("'link.json' is a link out of this folder", of=("train_sarm", "tiny", "--only"))


@row(46, "activation shard dim ≠ SAE input dim / other model hash / other layer")
def _(world: World) -> None:
    run = world.run(without=("sarm", "sae"))
    chat = run / "activations" / "chat"
    x_ND = torch.randn(96, D_IN // 2, generator=torch.Generator().manual_seed(0))
    made_from = ("pairs/v1", run / "pairs")
    activation_folder(chat, ("train", "chat", 1), x_ND, made_from)
    world.refuses("chat activations are of", "Extract both", of=("train_sae", "tiny", "--only"))
    for made_for, words in (
        ({"model": "other/model", "layer": 1}, "other/model, asked for tiny:llama"),
        ({"model": "tiny:llama", "layer": 2}, "layer 2, asked for 1"),
    ):
        write_sae(run / "sae", run, made_for)
        world.refuses("was trained on", words, of=("train_sarm", "tiny", "--only"))
    write_sae(run / "sae", run, {"model": "tiny:llama", "layer": 1}, d_in=32)
    world.refuses("width 32", "has 64", of=("train_sarm", "tiny", "--only"))


@row(47, "activations all zero / constant / non-finite")
def _(world: World) -> None:
    run = world.run(without=("sarm", "sae"))
    text = run / "activations" / "text"
    made_from = ("corpus/v1", run / "corpus")
    for x_ND in (torch.zeros(96, D_IN), torch.ones(96, 1) * torch.arange(D_IN)):
        activation_folder(text, ("all", "document", 1), x_ND, made_from)
        world.refuses("are all alike", "activations/text", of=("train_sae", "tiny", "--only"))
    assert (ACTIVATIONS_FOLDER, (run / "sae").exists()) == ("activations/v1", False)
