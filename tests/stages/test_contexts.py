"""Collecting contexts, on a random SARM: against the model run alone, and the same bytes however the work is shared out."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.passes.alone import run_alone
from tests.stages.random_sarm import D_SAE, random_sarm

from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.tokens.sentences import sentence_ends
from sarm.engine.ray.passes import run_over
from sarm.engine.ray.room import Cluster, Node
from sarm.interpret.context_store import load_contexts
from sarm.interpret.context_tables import Chosen, strongest
from sarm.interpret.context_texts import Ref, parts, sentence_spans, unpack
from sarm.passes.contexts import pair_slices
from sarm.passes.reader import sarm_reader
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings
from sarm.settings.run import RunSettings
from sarm.stages.context_blocks import pair_blocks
from sarm.stages.context_collection import collect_contexts

SETTINGS = ContextsSettings(corpus=True, max_texts=30, top=4, per_decile=1, sampled=20, batch_tokens=512)


@pytest.fixture(scope="module")
def sarm(tiny_folder, tiny_chat, tmp_path_factory):
    return random_sarm(tmp_path_factory.mktemp("contexts") / "sarm", tiny_folder, tiny_chat)


@pytest.fixture(scope="module")
def files(extracted: Path):
    return [sorted((extracted / name).glob("*.parquet")) for name in ("pairs", "corpus")]


@pytest.fixture(scope="module")
def collected(sarm, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    counts = collect_contexts(SETTINGS, sarm_reader(sarm, SETTINGS.batch_tokens), *files, folder, run_alone)
    rest = {"schema": "contexts/v1", "created": "", "git_commit": "", "config": {}, "inputs": {}, "files": {}}
    manifest = {**rest, "counts": {**counts, "model": "this"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load_contexts(folder, "this")


@pytest.fixture(scope="module")
def one_by_one(sarm, tiny_chat):
    """The latents of a conversation's final token, the model run on it alone."""
    model = load_sarm(sarm)

    def read(prompt, response):
        (tokens,) = tiny_chat.encode_responses(prompt, [response])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens.ids]))
        latents = torch.zeros(D_SAE)
        return latents.scatter(0, output.latent_indices[0], output.latent_values[0]).numpy()

    return read


def test_many_actors_write_the_same_bytes_as_one_that_reads_in_another_order(sarm, files, tmp_path, ray_cluster):
    run = RunSettings(out=tmp_path, num_actors=2, cpus_per_worker=1)
    cluster = Cluster(nodes=(Node(6),), is_local=False)
    # One pass is enough to see it, and starting actors is what takes time.
    settings = dataclasses.replace(SETTINGS, corpus=False, span_answers=0)
    for name, how in (("many", lambda work: run_over(work, run, cluster)), ("one", run_alone)):
        (tmp_path / name).mkdir()
        collect_contexts(settings, sarm_reader(sarm, settings.batch_tokens), *files, tmp_path / name, how)
    for name in ("contexts.parquet", "latents.parquet"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_rewarded_places_are_those_of_the_model_run_alone(collected, files, one_by_one):
    pairs = pa.concat_tables(pq.read_table(path) for path in files[0]).to_pylist()
    seen = {side: [one_by_one(pair["prompt"], pair[side]) for pair in pairs] for side in ("chosen", "rejected")}
    both = np.array([*seen["chosen"], *seen["rejected"]])
    texts = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    rows = {row["latent"]: row for row in collected.latents.to_pylist() if row["place"] == "rewarded"}
    assert rows.keys() == set(np.flatnonzero((both > 0).any(0)).tolist())
    for latent, row in rows.items():
        assert (row["count"], row["total"]) == ((both[:, latent] > 0).sum(), len(both))
        assert row["max"] == pytest.approx(both[:, latent].max(), abs=1e-4)
        for side, found in seen.items():
            assert row[f"{side}_mean"] == pytest.approx(np.array(found)[:, latent].mean(), abs=1e-4)
        assert [a + b for a, b in zip(row["chosen_histogram"], row["rejected_histogram"], strict=True)] == row[
            "histogram"
        ]
        best = {}
        for text, value in zip(texts, both[:, latent], strict=True):
            if value > 0:
                best[text] = max(best.get(text, 0.0), value)
        top = [r for r in collected.of(latent, "rewarded").to_pylist() if r["kind"] == "top"]
        assert [r["rank"] for r in top] == list(range(min(len(best), SETTINGS.top)))
        np.testing.assert_allclose(
            [r["activation"] for r in top], sorted(best.values(), reverse=True)[: SETTINGS.top], atol=1e-4
        )


def test_every_context_is_its_own_text_and_carries_its_activation(collected, files, one_by_one):
    pairs = {pair["pair_id"]: pair for path in files[0] for pair in pq.read_table(path).to_pylist()}
    rows = [row for row in collected.contexts.to_pylist() if row["place"] == "rewarded"]
    for row in random.Random(1).sample(rows, 20):
        pair = pairs[row["pair_id"]]
        assert row["text_id"] == f"{row['pair_id']}/{row['side']}"
        assert row["text"] == pair[row["side"]]
        assert row["prompt"] == pair["prompt"][-1]["content"]
        assert one_by_one(pair["prompt"], row["text"])[row["latent"]] == pytest.approx(row["activation"], abs=1e-4)
    for latent in {row["latent"] for row in rows}:
        own = collected.of(latent, "rewarded")["text"].to_pylist()
        assert len(own) == len(set(own)), "a text is shown once"


def test_sentence_ends_are_counted_for_every_answer_and_text(collected, files):
    pairs = pa.concat_tables(pq.read_table(path) for path in files[0]).to_pylist()
    texts = [row["text"] for path in files[1] for row in pq.read_table(path).to_pylist()][: SETTINGS.max_texts]
    texts += [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    row = next(row for row in collected.latents.to_pylist() if row["place"] == "sentence")
    assert row["total"] == sum(len(sentence_ends(text)) for text in texts)
    sides = {r["side"] for r in collected.contexts.to_pylist() if r["place"] == "sentence"}
    assert sides == {"chosen", "rejected", "text"}
    for row in collected.contexts.to_pylist():
        if row["place"] == "sentence":
            assert row["span_end"] == len(row["text"])
            assert sentence_ends(row["text"][row["span_start"] :])[-1] == row["span_end"] - row["span_start"] - 1


def test_the_driving_part_is_the_one_whose_loss_lowers_the_latent_most(collected, files, one_by_one):
    pairs = {pair["pair_id"]: pair for path in files[0] for pair in pq.read_table(path).to_pylist()}
    marked = [
        row for row in collected.contexts.to_pylist()
        if row["place"] == "rewarded" and row["kind"] == "top" and row["rank"] < SETTINGS.span_contexts and row["span_start"] >= 0
    ]  # fmt: skip
    assert marked
    for row in marked[:6]:
        prompt, text, latent = pairs[row["pair_id"]]["prompt"], row["text"], row["latent"]
        left = {(a, b): one_by_one(prompt, text[:a] + text[b:])[latent] for a, b in parts(text, SETTINGS.span_pieces)}
        assert left[row["span_start"], row["span_end"]] == pytest.approx(min(left.values()), abs=1e-4)


def test_answers_of_one_word_have_contexts_without_a_driving_part(sarm, tmp_path):
    message = [{"role": "user", "content": "yes or no"}]
    pair = {
        "pair_id": "p",
        "prompt_id": "q",
        "prompt": message,
        "chosen": "yes",
        "rejected": "no",
        "source": "s",
        "split": "train",
    }
    pq.write_table(pa.Table.from_pylist([pair], schema=PAIRS_TABLE), tmp_path / "pairs.parquet")
    settings = dataclasses.replace(SETTINGS, corpus=False)
    counts = collect_contexts(
        settings, sarm_reader(sarm, settings.batch_tokens), [tmp_path / "pairs.parquet"], [], tmp_path, run_alone
    )
    table = pq.read_table(tmp_path / "contexts.parquet")
    assert set(table["text"].to_pylist()) == {"yes", "no"}
    assert set(table["span_start"].to_pylist()) == {-1}
    assert counts["places"] == {"rewarded": 2}


def test_contexts_of_an_abs_topk_model_are_apart_by_sign(files, tiny_folder, tiny_chat, tmp_path):
    folder = random_sarm(tmp_path / "sarm", tiny_folder, tiny_chat, architecture="abs_topk")
    (tmp_path / "contexts").mkdir()
    settings = dataclasses.replace(SETTINGS, corpus=False, span_answers=0)
    counts = collect_contexts(
        settings, sarm_reader(folder, settings.batch_tokens), *files, tmp_path / "contexts", run_alone
    )
    assert counts["d_sae"] == 2 * D_SAE
    pairs = {pair["pair_id"]: pair for path in files[0] for pair in pq.read_table(path).to_pylist()}
    rows = [
        r for r in pq.read_table(tmp_path / "contexts" / "contexts.parquet").to_pylist() if r["place"] == "rewarded"
    ]
    model = load_sarm(folder)
    signs = set()
    for row in random.Random(1).sample(rows, 20):
        (tokens,) = tiny_chat.encode_responses(pairs[row["pair_id"]]["prompt"], [row["text"]])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens.ids]))
        of_latent = dict(zip(output.latent_indices[0].tolist(), output.latent_values[0].tolist(), strict=True))
        sign = 1 if row["latent"] < D_SAE else -1
        assert sign * of_latent[row["latent"] % D_SAE] == pytest.approx(row["activation"], abs=1e-4)
        assert row["activation"] > 0
        signs.add(sign)
    assert signs == {1, -1}


def test_nothing_to_read_no_latents_and_latents_that_never_fire_are_one_line(
    sarm, files, tiny_folder, tiny_chat, tmp_path
):
    reader = sarm_reader(sarm, SETTINGS.batch_tokens)
    with pytest.raises(UserError, match="nothing to read"):
        ContextsSettings(split="none")
    with pytest.raises(UserError, match="no heldout pairs"):
        collect_contexts(ContextsSettings(split="heldout"), reader, [], [], tmp_path, run_alone)
    silent = random_sarm(tmp_path / "silent", tiny_folder, tiny_chat, bias=-1e9)
    settings = ContextsSettings(split="none", corpus=True, max_texts=2)
    with pytest.raises(UserError, match="so there are no contexts"):
        collect_contexts(settings, sarm_reader(silent), *files, tmp_path, run_alone)
    scalar = random_sarm(tmp_path / "scalar", tiny_folder, tiny_chat, head="scalar")
    with pytest.raises(UserError, match="scalar model without latents"):
        sarm_reader(scalar)
    with pytest.raises(UserError, match="holds no reward model"):
        sarm_reader(tmp_path / "nowhere")


def test_contexts_of_another_model_or_torn_ones_are_refused(collected, tmp_path):
    with pytest.raises(UserError, match="another model"):
        load_contexts(collected.folder, "that")
    torn = tmp_path / "torn"
    shutil.copytree(collected.folder, torn)
    (torn / "contexts.parquet").write_bytes((torn / "contexts.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        load_contexts(torn)
    pq.write_table(pa.table({"latent": [1]}), torn / "contexts.parquet")
    with pytest.raises(UserError, match="expected latent, place"):
        load_contexts(torn)


def test_blocks_cover_a_split_once_and_cut_slices_where_a_whole_file_would(files):
    table = pa.concat_tables(pq.read_table(path) for path in files[0])
    of_split = [i for i, split in enumerate(table["split"].to_pylist()) if split == "train"]
    blocks, num_rows = pair_blocks(files[0], "train")
    rows = [row for block in blocks for row in range(block.start, block.stop) if row in set(of_split)]
    assert rows == of_split
    assert num_rows == len(of_split)
    prompts = [f"prompt {i // 5}" for i in range(700)]
    cuts = list(pair_slices(prompts))
    assert all(prompts[stop - 1] != prompts[stop] for _, stop in cuts[:-1]), "a prompt's pairs stay together"
    for start, _ in cuts:
        # A block begins at some slice: from there on, it is cut in the same places.
        assert [(a + start, b + start) for a, b in pair_slices(prompts[start:])] == [
            cut for cut in cuts if cut[0] >= start
        ]
    assert list(pair_slices(["one"] * 600)) == [(0, 256), (256, 512), (512, 600)]


def test_references_and_spans_go_there_and_back():
    for ref in (Ref(False, 0, 0, 0, -1), Ref(True, 8191, 2**30 - 1, 1, 2**18 - 3)):
        assert unpack(ref.pack()) == ref
    text = "  First one. Second, longer one!\n\nAnd a tail"
    assert [text[a:b] for a, b in sentence_spans(text)] == ["First one.", "Second, longer one!"]
    assert [text[a:b] for a, b in parts(text, 8)] == ["First one.", "Second, longer one!", "And a tail"]
    assert [text[a:b] for a, b in parts(text, 2)] == ["First one. Second, longer one!", "And a tail"]
    words = " ".join("word" for _ in range(24))
    assert len(parts(words, 8)) == 3
    assert parts("yes", 8) == []


def test_answers_to_take_apart_are_those_of_the_largest_latents_and_no_more_than_asked_for():
    chosen = Chosen(
        np.array([0, 0, 1, 2, 2]), np.array([-1, -1, -1, -1, 3]), np.array([0, 1, 0, 0, 0]), np.array([10, 11, 12, 10, 13]), np.ones(5)
    )  # fmt: skip
    size = np.array([1.0, 3.0, 2.0])
    assert strongest(chosen, size, 1, 9) == {12: [1], 10: [2, 0]}
    assert strongest(chosen, size, 2, 9) == {12: [1], 10: [2, 0], 11: [0]}
    assert strongest(chosen, size, 2, 1) == {12: [1]}
