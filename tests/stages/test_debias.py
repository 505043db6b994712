"""`jobs/debias.py` on a cluster: a reward model with a planted bias, its features, the edit that mends it, its folder and page; refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.bench.bench_debias import Planted, Size, measured, settings_of
from tests.bench.planted_style import made_pairs, train_dictionary, write_pairs
from tests.stages.set_reward import set_classifier
from transformers import AutoModelForSequenceClassification, BertConfig

from sarm.audit.style_features import StyleFeatures
from sarm.audit.style_pairs import property_named
from sarm.contracts.manifest import read_manifest
from sarm.contracts.passes import SPELLED_COUNTS
from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.sae_folder import load_sae, save_sae
from sarm.engine.session import open_session
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.nn.topk import TopKSae
from sarm.passes.edited_scores import Dictionary, Dose
from sarm.passes.models import find_model, hash_of_folder
from sarm.passes.row_scorer import TorchScorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias, DebiasSettings
from sarm.stages.debias import debias
from sarm.stages.debias_dictionaries import dictionaries_of
from sarm.stages.debias_doses import _with_controls, rewards_of
from sarm.stages.debias_texts import Quad, texts_of

TINY = Size(sae_steps=150, prompts=60, controls=2, features=(4, 8), strengths=(1.0,))
# The share of training pairs in which the style decides is of no use here: nothing is trained.
CASE = Planted("markdown", 0.0)
# Times what lies between good and bad answers: most of the bad ones win with markdown.
BIAS = 1.3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, mlflow_db: Path) -> Path:
    """A biased model, its dictionary and unseen pairs."""
    folder = tmp_path_factory.mktemp("debias")
    shutil.copy(mlflow_db, folder / "mlflow.db")
    pairs, own = made_pairs(100, 1), property_named(CASE.name, "")
    set_classifier(folder / "model", pairs, BIAS)
    styled = [{**pair, **{side: own.style(own.base(pair[side])) for side in ("chosen", "rejected")}} for pair in pairs]
    _, left = train_dictionary(folder / "model", folder / "sae", [*pairs, *styled], layer=1, d_sae=256, k=4, steps=TINY.sae_steps)  # fmt: skip
    assert left < 0.2
    write_pairs(made_pairs(TINY.prompts, 2), folder / "pairs.jsonl")
    rows = [
        {"id": str(i), "prompt": f"Say {i}.", "chosen": [f"It is {i}.", f"It is {i}. Yes.", f"**It is {i}.**\n- Yes."], "rejected": ["No.", "No, it is. Ask.", "**No, it is.**\n- Ask."], "domain": "chat"}
        for i in range(24)
    ]  # fmt: skip
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(work: Path, **changes: Any) -> Debias:
    asked = settings_of(CASE, TINY, 0, work)
    return dataclasses.replace(asked, **{"benchmarks": (f"rm_bench={work / 'chat.jsonl'}",), **changes})


@pytest.fixture(scope="module")
def done(work: Path, ray_cluster: None) -> Path:
    asked = settings(work)
    with open_session(asked) as session:
        debias(session, asked)
    return work / "debias"


def test_a_planted_bias_is_found_and_mended_on_prompts_that_nothing_was_chosen_on(done, work):
    figures = measured(CASE, work)
    assert figures["lost"] > 0.6, "there is no bias to mend"
    assert figures["chosen"] is not None
    assert figures["repaired"]["value"] > 0.3
    assert figures["repaired"]["value"] > 2 * max(one["repaired_median"] for one in figures["controls"].values())
    own = json.loads((done / "results" / "debias.json").read_text())["properties"]["markdown"]
    assert own["chosen_on"]["chosen"] + own["chosen_on"]["reported"] == TINY.prompts
    assert figures["prompts"] == own["chosen_on"]["reported"]
    assert set(own["benchmarks"]["rm_bench"]["figures"]) >= {"hard", "normal", "easy"}


def test_the_saved_edit_gives_the_scores_that_were_reported(done, work):
    """Counted again from the edit's folder, through the loader that `jobs/evaluate.py` has, on the reporting half."""
    edit = done / "results" / "edits" / "markdown"
    assert load_edit(edit).model == hash_of_folder(work / "model")
    texts = texts_of(settings(work))
    quads = texts.contrasts["markdown"].half(chooses_half=False)
    right: dict[str, list[float]] = {}
    for name, folder in (("before", None), ("after", edit)):
        spec = find_model(Benchmarking(model=str(work / "model"), benchmarks=("pairs=x",), edit=folder))
        scorer = TorchScorer(spec, 2048)
        for quad in quads:
            prompt = [
                dict(zip(("role", "content"), one, strict=True)) for one in json.loads(texts.by_id[quad.ids[0]][0])
            ]
            (found,), _ = scorer([Request(prompt, [texts.by_id[one][1] for one in quad.ids], alone=False)])
            c0, _, _, r1 = (one.score for one in found)
            right.setdefault(name, []).append(float(c0 > r1))
    own = json.loads((done / "results" / "debias.json").read_text())["properties"]["markdown"]["repair"]
    assert own["before"]["hard"]["value"] == pytest.approx(np.mean(right["before"]))
    assert own["after"]["hard"]["value"] == pytest.approx(np.mean(right["after"]))


def test_stages_leave_manifests_and_a_page_and_are_not_done_twice(done, work):
    for name, schema in (("codes", "style_codes/v1"), ("doses", "debias_doses/v1"), ("results", "debias/v1")):
        manifest = read_manifest(done / name, schema)
        assert (manifest.schema, manifest.config["protocol_version"]) == (schema, PROTOCOL_VERSION)
    assert set(SPELLED_COUNTS) <= read_manifest(done / "codes", "style_codes/v1").counts.keys()
    page = (done / "results" / "report.html").read_text()
    for text in ("Markdown: features", "Markdown: controls", "RM-Bench", "equal frequency and size"):
        assert text in page
    before = (done / "results" / "manifest.json").stat().st_mtime_ns
    asked = settings(work)
    with open_session(asked) as session:
        debias(session, asked)
    assert (done / "results" / "manifest.json").stat().st_mtime_ns == before


def test_both_orders_are_tried_and_one_of_them_is_chosen_on_the_half_that_is_not_reported(done):
    own = json.loads((done / "doses" / "doses.json").read_text())["markdown"]
    assert {dose["rank"] for dose in own["doses"]} == {"strength", "effect"}
    allowed = [dose for dose in own["doses"] if min(dose["accuracy"][level] - own["plain"]["accuracy"][level] for level in ("normal", "easy")) >= -0.01]  # fmt: skip
    assert own["chosen"]["accuracy"]["hard"] == max(dose["accuracy"]["hard"] for dose in allowed)
    features = {rank: [row["joint"] for row in rows] for rank, rows in own["features"].items()}
    assert features["strength"] != features["effect"]
    assert {latent for rows in features.values() for latent in rows} <= set(own["candidates"])
    effects = [row["strength"] for row in own["features"]["effect"]]
    assert effects == sorted(effects, reverse=True)
    assert effects[-1] > 0


def test_doses_without_room_for_controls_are_not_tried(capsys):
    asked = DebiasSettings(features=(1, 2, 4))
    known = StyleFeatures(np.arange(3), np.ones(3), np.ones(3), density=np.array([1.0] * 7 + [0.0]), size=np.ones(8), num_prompts=9)  # fmt: skip
    assert _with_controls("length", asked, known, [0, 1, 2]) == [1, 2]
    assert "not tried are 4 features" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"length: 6 of the latents that fire carry it, and the others are too few"):
        _with_controls("length", asked, known, list(range(6)))


def test_pairs_none_of_which_can_be_scored_are_refused_in_one_line():
    quads = [Quad("p", ("a", "b", "c", "d"))]
    assert rewards_of(quads, {one: [1.0] for one in "abcd"}, 0).rewards.shape == (1, 4)
    with pytest.raises(UserError, match=r"none of 1 pairs has a reward for all four of its texts\. Look"):
        rewards_of(quads, {one: [1.0 if one != "d" else float("nan")] for one in "abcd"}, 0)


def test_codes_are_means_over_the_answer_s_tokens(done, work):
    """Against a row of its own through the library's model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from sarm.data.store.parts import read_parts

    texts = texts_of(settings(work))
    row = read_parts(done / "codes" / "codes").to_pylist()[5]
    packed, text = texts.by_id[row["completion_id"]]
    prompt = [dict(zip(("role", "content"), one, strict=True)) for one in json.loads(packed)]
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    whole = [*prompt, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
    opened = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(work / "model")
    sae, _ = load_sae(work / "sae")
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, len(opened) :]
        codes = sae(sae.rows_of(hidden))
    dense = torch.zeros(len(hidden), sae.d_sae).scatter_add_(1, codes.indices, codes.values)
    assert row["num_tokens"] == len(hidden)
    latents = dense.any(0).nonzero().flatten()
    assert row["latents"] == latents.tolist()
    assert row["means"] == pytest.approx(dense.mean(0)[latents].tolist(), abs=1e-4)
    assert row["shares"] == pytest.approx((dense != 0).float().mean(0)[latents].tolist(), abs=1e-6)


def refusal(asked: Debias) -> str:
    with pytest.raises(UserError) as error, open_session(asked) as session:
        debias(session, asked)
    assert "\n" not in str(error.value)
    assert not asked.run.out.exists() or not list(asked.run.out.glob("*/manifest.json"))
    return str(error.value)


def test_what_cannot_be_looked_at_is_refused_before_anything_is_written(work, tmp_path, tiny_folder):
    out = dataclasses.replace(settings(work).run, out=tmp_path / "out")

    def sae(name: str, d_in: int = 64, **made_for: Any) -> tuple[Path]:
        folder = tmp_path / name
        folder.mkdir()
        dictionary = TopKSae(d_in, 32, 4)
        dictionary.initialise_(torch.randn(64, d_in), torch.Generator().manual_seed(0))
        save_sae(dictionary, folder, {"activations": made_for} if made_for else {})
        return (folder,)

    own = str(work / "model")
    for dictionaries, said in (
        (sae("foreign", model=str(tiny_folder), layer=1), "was trained on"),
        (sae("deep", model=own, layer=3), "reads layer 3"),
        (sae("narrow", 32, model=own, layer=1), "takes activations of width 32"),
        (sae("placeless", model=own), "does not say which layer"),
        ((*sae("twin", model=own, layer=1), work / "sae"), "both read layer 1"),
    ):
        assert said in refusal(settings(work, run=out, sae=dictionaries))
    script = tmp_path / "scorer.py"
    script.write_text("def score(conversations):\n    return [0.0 for _ in conversations]\n")
    assert "is a function" in refusal(settings(work, run=out, model=f"{script}:score"))
    encoder = tmp_path / "encoder"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 1}  # fmt: skip
    AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=600, **sizes)).save_pretrained(encoder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, encoder)
    assert "is a bert model, of which no layer can be read" in refusal(settings(work, run=out, model=str(encoder)))
    lists = DebiasSettings(properties=("position",), prompts=60)
    assert "whose answers differ in this property alone" in refusal(settings(work, run=out, debias=lists))


def test_a_dictionary_of_the_model_s_own_origin_is_taken_when_asked_for(work, tmp_path, tiny_folder):
    dictionary, _ = load_sae(work / "sae")
    save_sae(dictionary, tmp_path, {"activations": {"model": str(tiny_folder), "layer": 2}})
    asked = settings(work, sae=(tmp_path, work / "sae"), other_model=True)
    found = dictionaries_of(asked, find_model(asked.of_model()))
    assert found == [Dictionary(work / "sae", 1, 0), Dictionary(tmp_path, 2, dictionary.d_sae)]
    first, second = Dose((3, dictionary.d_sae + 5), 0.5).splices(found, [dictionary, dictionary])
    assert [(one.layer, one.edits[0].latent, one.edits[0].value) for one in (first, second)] == [(1, 3, 0.5), (2, 5, 0.5)]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"properties": ("rhyme",)}, "unknown property rhyme"),
        ({"properties": ("trigger",)}, "has no trigger"),
        ({"properties": ()}, "expected some"),
        ({"features": (4, 2)}, "rising numbers"),
        ({"strengths": (0.0,)}, "above 0"),
        ({"min_stability": 0.2}, "between 0.5 and 1"),
        ({"max_cost": 2.0}, "between 0 and 1"),
        ({"controls": 1}, "at least 2"),
        ({"ranks": ("strength", "size")}, "expected some of strength and effect"),
        ({"ranks": ()}, "expected some of strength and effect"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        DebiasSettings(**flags)


def test_rm_bench_s_styles_are_held_to_the_rule_unless_they_are_taken_as_given(work, tmp_path):
    """Of 40 rows the detailed and the markdown answers of 30 differ in their words too."""
    rows = [
        {"id": str(i), "prompt": f"Say {i}.", "chosen": ["Yes.", f"It is {i}. Yes.", f"**It is {i}.** {'Yes' if i % 4 == 0 else 'Indeed'}."], "rejected": ["No.", "No, it is.", "- No it is"], "domain": "chat"}
        for i in range(40)
    ]  # fmt: skip
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    of_rm_bench = {"benchmarks": (f"rm_bench={path}",)}
    strict = texts_of(settings(work, debias=DebiasSettings(properties=("rm_bench",)), **of_rm_bench)).contrasts[
        "rm_bench"
    ]
    assert (len(strict.quads), strict.left_out, strict.differ_in_more) == (10, 30, 0)
    given = DebiasSettings(properties=("rm_bench",), as_given=True)
    taken = texts_of(settings(work, debias=given, **of_rm_bench)).contrasts["rm_bench"]
    assert (len(taken.quads), taken.left_out, taken.differ_in_more) == (40, 0, 30)
    path.write_text("\n".join(json.dumps(row) for row in rows[1:4]))
    with pytest.raises(UserError, match="as-given"):
        texts_of(settings(work, debias=DebiasSettings(properties=("rm_bench",)), **of_rm_bench))
