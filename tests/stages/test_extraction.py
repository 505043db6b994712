import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from sarm.contracts.ids import stable_int
from sarm.contracts.manifest import read_manifest
from sarm.contracts.passes import Target
from sarm.contracts.tables import CORPUS_TABLE, activations_table
from sarm.data.formats.models import model_folder
from sarm.data.store.activations import ActivationStore
from sarm.data.store.blocks import plan_blocks
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.sentences import sentence_end_tokens, sentence_ends
from sarm.data.tokens.windows import num_tokens
from sarm.engine.passes import Pass
from sarm.engine.ray.block_actor import Output
from sarm.engine.ray.passes import run_over
from sarm.engine.ray.room import Cluster, Node
from sarm.nn.pretrained import load_backbone
from sarm.passes.activations import TextActivations
from sarm.settings.checks import StalledError, UserError
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.jobs import Pipeline
from sarm.settings.model import ModelSettings
from sarm.settings.run import RunSettings
from sarm.stages.extract import rows_within


def one_by_one(model: ModelSettings, ids: list[int]) -> torch.Tensor:
    backbone = load_backbone(model_folder(model), model.layer)
    with torch.no_grad():
        return backbone(torch.tensor([ids])).last_hidden_state[0]


def table_of(folder: Path) -> pa.Table:
    return ds.dataset([str(p) for p in sorted(folder.glob("part-*.parquet"))]).to_table()


def test_every_sentence_end_of_the_corpus_is_there_once(extracted: Path, preset: Pipeline) -> None:
    chat = load_chat_tokenizer(preset.model, model_folder(preset.model))
    expected = set()
    for row in table_of(extracted / "corpus").to_pylist():
        encoded = chat.encode_text(row["text"])
        ends = sentence_end_tokens(sentence_ends(row["text"]), encoded.offsets)
        expected |= {(row["row_id"], position) for position in ends}
    keys, _ = ActivationStore(extracted / "activations" / "text").read(["row_id", "position"])
    found = list(zip(keys["row_id"].to_pylist(), keys["position"].to_pylist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_a_stored_sentence_end_equals_the_model_run_alone_to_16_bits(extracted: Path, preset: Pipeline) -> None:
    chat = load_chat_tokenizer(preset.model, model_folder(preset.model))
    keys, vectors = ActivationStore(extracted / "activations" / "text").read(["row_id", "position"])
    texts = {row["row_id"]: row["text"] for row in table_of(extracted / "corpus").to_pylist()}
    for i in range(0, len(vectors), len(vectors) // 7):
        key = keys.slice(i, 1).to_pylist()[0]
        ids = chat.encode_text(texts[key["row_id"]]).ids
        alone = one_by_one(preset.model, ids[: key["position"] + 1])[-1]
        torch.testing.assert_close(vectors[i], alone.half().float(), rtol=2e-3, atol=2e-3)


def test_a_stored_chat_end_is_the_rewarded_token_of_its_response(extracted: Path, preset: Pipeline) -> None:
    chat = load_chat_tokenizer(preset.model, model_folder(preset.model))
    pairs = {stable_int(row["pair_id"]): row for row in table_of(extracted / "pairs").to_pylist()}
    store = ActivationStore(extracted / "activations" / "chat")
    keys, vectors = store.read(["row_id", "doc_id", "side", "position", "token_id"])
    assert {pairs[row]["split"] for row in keys["row_id"].to_pylist()} == {"train"}
    assert [pairs[row]["prompt_id"] for row in keys["row_id"].to_pylist()] == keys["doc_id"].to_pylist()
    assert store.num_rows == 2 * sum(pair["split"] == "train" for pair in pairs.values())
    for i in range(0, len(vectors), len(vectors) // 7):
        key = keys.slice(i, 1).to_pylist()[0]
        pair = pairs[key["row_id"]]
        (tokens,) = chat.encode_responses(pair["prompt"], [pair[key["side"]]])
        assert (key["position"], key["token_id"]) == (len(tokens.ids) - 1, chat.end_of_turn_id)
        alone = one_by_one(preset.model, tokens.ids)[-1]
        torch.testing.assert_close(vectors[i], alone.half().float(), rtol=2e-3, atol=2e-3)


def test_statistics_lie_with_the_data(extracted: Path) -> None:
    _, vectors = ActivationStore(extracted / "activations" / "text").read()
    statistics = json.loads((extracted / "activations" / "text" / "statistics.json").read_text())
    torch.testing.assert_close(torch.tensor(statistics["mean"]), vectors.mean(0), rtol=1e-4, atol=1e-4)
    assert statistics["rows"] == len(vectors)


class Sleeps(TextActivations):
    """Does not come back from a block."""

    def compute(self, prepared, beat):
        time.sleep(60)
        return super().compute(prepared, beat)


def text_pass(
    folder: Path, texts: list[str], target: Path, model: ModelSettings, actor: type = TextActivations
) -> Pass:
    folder.mkdir(exist_ok=True)
    rows = {"row_id": list(range(len(texts))), "text": texts, "source": ["t"] * len(texts)}
    pq.write_table(pa.table(rows, schema=CORPUS_TABLE), folder / "a.parquet", row_group_size=20)
    outputs = {Target("document", 1): Output(target, activations_table(64, {"dtype": "float16", "layer": model.layer}))}
    return Pass(
        name="test",
        blocks=plan_blocks([folder / "a.parquet"], 1),
        columns=("row_id", "text"),
        keep=None,
        actor=actor,
        arguments={
            "model": model,
            "folder": model_folder(model),
            "extraction": ExtractionSettings(),
            "schemas": {key: output.table_schema for key, output in outputs.items()},
        },
        outputs=outputs,
        id_columns=("row_id",),
        input_ids=lambda table: table.column("row_id").to_pylist(),
        output_id="row_id",
    )


def do(work: Pass, num_actors: int = 1, **options: float) -> dict:
    run = RunSettings(out=Path("unused"), num_actors=num_actors, cpus_per_worker=1)
    (counts,) = run_over(work, run, Cluster(nodes=(Node(6),), is_local=False), **options).values()
    return counts


def run_text(folder: Path, texts: list[str], target: Path, model: ModelSettings, num_actors: int = 1) -> dict:
    return do(text_pass(folder, texts, target, model), num_actors)


@pytest.mark.usefixtures("ray_cluster")
def test_texts_without_a_sentence_end_are_counted_and_long_ones_cut_into_windows(
    tmp_path: Path, preset: Pipeline
) -> None:
    model = dataclasses.replace(preset.model, max_length=16)
    long = "One two three four five six. " * 30
    counts = run_text(tmp_path / "in", ["no end here", "A sentence.", long.strip()], tmp_path / "out", model)
    assert counts["rejected"] == {"no_sentence_end": 1}
    table = table_of(tmp_path / "out")
    assert counts["rows"] == table.num_rows == 31
    positions = table.filter(pc.equal(table["row_id"], 2))["position"].to_pylist()
    assert positions == sorted(positions)
    assert len(set(positions)) == 30
    assert max(positions) > model.max_length


@pytest.mark.usefixtures("ray_cluster")
def test_two_actors_write_what_one_writes(tmp_path: Path, preset: Pipeline) -> None:
    texts = [f"Sentence {i} is here. And number {i * i} follows." for i in range(150)]
    tables = []
    for actors in (1, 2):
        run_text(tmp_path / f"in{actors}", texts, tmp_path / f"out{actors}", preset.model, actors)
        tables.append(table_of(tmp_path / f"out{actors}").drop(["activation"]))
    assert tables[0].equals(tables[1])


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_of_which_nothing_is_usable_is_an_error_that_counts_the_reasons(
    tmp_path: Path, preset: Pipeline
) -> None:
    with pytest.raises(UserError, match="no_sentence_end"):
        run_text(tmp_path / "in", ["no end", "none here either"], tmp_path / "out", preset.model)


@pytest.mark.usefixtures("ray_cluster")
def test_a_pass_goes_on_with_the_blocks_that_are_missing_or_torn(tmp_path: Path, preset: Pipeline) -> None:
    texts = [f"Sentence {i} is here. " * 9 for i in range(60)]
    work = text_pass(tmp_path / "in", texts, tmp_path / "out", preset.model)
    counts = do(work)
    assert len(work.blocks) > 8
    before = table_of(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("part-*"))
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:-7])
    again = do(work)
    assert {path for path in files if path.stat().st_mtime_ns != stamps[path]} == {files[1], files[4]}
    assert table_of(tmp_path / "out").equals(before)
    assert again["rows"] == counts["rows"] == 540
    assert again["audited_rows"] == 60


@pytest.mark.usefixtures("ray_cluster")
def test_a_hung_pass_ends_and_names_the_block_and_the_process(tmp_path: Path, preset: Pipeline) -> None:
    texts = [f"Sentence {i} is here. " * 9 for i in range(20)]
    work = text_pass(tmp_path / "in", texts, tmp_path / "out", preset.model, Sleeps)
    with pytest.raises(StalledError, match=r"nothing has happened for 20 s: block \d+ .* was begun by process \d+ on "):
        do(work, stall_seconds=20.0)


class LoadsSlowly(TextActivations):
    """Reads its weights for longer than a block may stand still."""

    def __init__(self, **arguments: Any):
        ended = time.monotonic() + 30
        while time.monotonic() < ended:
            sum(i * i for i in range(200_000))
            time.sleep(0.2)
        super().__init__(**arguments)


class NeverLoads(TextActivations):
    def __init__(self, **_: Any):
        time.sleep(60)


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_loads_for_long_is_no_stall_and_one_that_never_does_is(tmp_path: Path, preset: Pipeline) -> None:
    texts = ["A sentence. Another one."] * 3
    work = text_pass(tmp_path / "in", texts, tmp_path / "slow", preset.model, LoadsSlowly)
    # Both limits are below what it takes: signs of life hold it up. An actor's process gives none before it has imported torch.
    assert do(work, stall_seconds=3.0, start_seconds=25.0)["rows"] == 6
    work = text_pass(tmp_path / "in", texts, tmp_path / "never", preset.model, NeverLoads)
    with pytest.raises(StalledError, match="none has begun a block: they are still starting or loading the model"):
        do(work, stall_seconds=1.0, start_seconds=15.0)


@pytest.mark.usefixtures("ray_cluster")
def test_a_starved_pass_ends_and_says_how_many_actors_have_room(tmp_path: Path, preset: Pipeline) -> None:
    work = text_pass(tmp_path / "in", ["A sentence."] * 20, tmp_path / "out", preset.model)
    run = RunSettings(out=Path("unused"), num_actors=1, cpus_per_worker=40)
    with pytest.raises(StalledError, match=r"1 actors of 40 CPUs were asked for and the 1 nodes .* have room for 0"):
        run_over(work, run, Cluster(nodes=(Node(99),), is_local=False), stall_seconds=3.0)


def test_limits_keep_the_first_texts(extracted: Path, preset: Pipeline) -> None:
    chat = load_chat_tokenizer(preset.model, model_folder(preset.model))
    files = sorted((extracted / "corpus").glob("*.parquet"))
    texts = [text for path in files for text in pq.read_table(path)["text"].to_pylist()]
    tokens = [len(chat.encode_text(text).ids) for text in texts]
    sentences = [len(sentence_ends(text)) for text in texts]
    counts = {
        "tokens": lambda some: num_tokens(some, chat),
        "sentences": lambda some: map(len, map(sentence_ends, some)),
    }
    for what, lengths in {"tokens": tokens, "sentences": sentences}.items():
        limit = sum(lengths[:7]) + lengths[7] - 1
        assert rows_within(files, limit, what, counts[what]) == 7
        assert rows_within(files, limit + 1, what, counts[what]) == 8
        with pytest.raises(UserError, match=f"more than --limit-{what} {lengths[0] - 1}"):
            rows_within(files, lengths[0] - 1, what, counts[what])


def test_manifests_name_their_inputs(extracted: Path) -> None:
    manifest = read_manifest(extracted / "activations" / "text", "activations/v1")
    assert list(manifest.inputs) == ["corpus/v1"]
    assert manifest.counts["activations"]["layer"] == 1
