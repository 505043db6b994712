"""Audit, steering, contexts and cards of a classifier with a dictionary."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tests.passes.alone import run_alone
from tests.passes.attached import D_SAE, attached_model, save_random_sae
from tests.passes.foreign_checkpoints import LAYOUTS, checkpoint

from sarm.audit.codes import AuditCodes
from sarm.audit.pairs import AUDIT_PAIRS
from sarm.audit.patching import explained_share, patched_figures
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sarm_folder import read_latents
from sarm.engine.session import open_session
from sarm.interpret.context_store import load_contexts
from sarm.nn.sae import standardise
from sarm.nn.topk import TopKSae
from sarm.passes.attached_model import model_reader
from sarm.passes.edited_rewards import CodeEdit
from sarm.passes.models import find_model
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.report.reward_card import card, print_card
from sarm.settings.audit import AuditFeatures, Relabel, Steer
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.contexts import ContextsSettings
from sarm.settings.conversion import ConvertSae
from sarm.settings.run import RunSettings
from sarm.stages.audit import audit
from sarm.stages.audit_codes import write_codes
from sarm.stages.card import read_prefixes
from sarm.stages.context_collection import collect_contexts
from sarm.stages.convert_sae import convert_sae
from sarm.stages.edited_rewards import effects_of_edits
from sarm.stages.relabel import relabel
from sarm.stages.steer import steer

# A pass without a cluster asks Ray for its context, which would start one of its own.
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def attached(tiny_folder, tmp_path_factory) -> Path:
    return attached_model(tmp_path_factory.mktemp("classifier"), tiny_folder)


@pytest.fixture(scope="module")
def pairs(attached) -> pa.Table:
    rows = pq.read_table(attached.parent / "pairs" / "part-00000.parquet").to_pylist()
    return pa.Table.from_pylist([{**row, "role": "target", "source": "made", "subset": ""} for row in rows], schema=AUDIT_PAIRS)  # fmt: skip


def test_codes_of_a_classifier_have_its_own_rewards(attached, pairs, tmp_path):
    counts = write_codes(pairs, model_reader(attached, 256), tmp_path, run_alone)
    assert counts["rejected"] == {}
    assert "its reward is no sum over latents" in counts["notes"][0]
    found = {row["response_id"]: row for row in pq.read_table(tmp_path / "responses.parquet").to_pylist()}
    named = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    spec = find_model(Benchmarking(model=str(attached.parent / "classifier"), benchmarks=("pairs=x",)))
    score = load_scorer(spec, 256)
    for pair, own in list(zip(pairs.to_pylist(), named, strict=True))[:4]:
        (scored,), _ = score([Request(pair["prompt"], [pair["chosen"], pair["rejected"]], alone=False)])
        for side, one in zip(("chosen", "rejected"), scored, strict=True):
            assert found[own[f"{side}_id"]]["reward"] == pytest.approx(one.score, abs=1e-4)
            assert sum(found[own[f"{side}_id"]]["sentence_sizes"]) > 0


def test_effects_of_edits_come_in_the_order_of_the_responses_that_were_asked_for(attached, pairs, tmp_path):
    write_codes(pairs, model_reader(attached, 256), tmp_path / "codes", run_alone)
    responses = pq.read_table(tmp_path / "codes" / "responses.parquet")
    ids, latents = responses["response_id"].to_pylist(), responses["latents"].to_pylist()
    reader = model_reader(attached, 256)
    counts = np.bincount([latent for own in latents for latent in own])
    some = int(np.flatnonzero((counts > 0) & (counts < len(ids)))[0])
    edits = [CodeEdit((some,)), CodeEdit((some,), 1.0), CodeEdit((some,), scope="rewarded")]
    found = effects_of_edits(pairs=pairs, response_ids=ids, reader=reader, edits=edits, folder=tmp_path / "edits", run_pass=run_alone)  # fmt: skip
    assert found.patched.shape == found.linear.shape == (len(ids), 3)
    assert np.isfinite(found.patched).all()
    assert not found.patched[:, 1].any()
    silent = np.array([some not in own for own in latents])
    assert not found.patched[silent, 2].any(), "a latent that is silent at the rewarded token has nothing to remove there"  # fmt: skip
    assert (np.abs(found.patched[~silent, 2]) > 1e-4).all()
    again = effects_of_edits(pairs=pairs, response_ids=ids[::-1], reader=reader, edits=edits, folder=tmp_path / "again", run_pass=run_alone)  # fmt: skip
    np.testing.assert_array_equal(again.patched, found.patched[::-1])


def test_contexts_of_a_classifier_are_collected_as_those_of_a_sarm(attached, tmp_path):
    settings = ContextsSettings(top=3, per_decile=1, sampled=20, batch_tokens=512, span_answers=2)
    files = sorted((attached.parent / "pairs").glob("*.parquet"))
    counts = collect_contexts(settings, model_reader(attached, 512), files, [], tmp_path, run_alone)
    assert counts["latents"] > 5
    assert counts["places"]["rewarded"] > 0
    rest = {"schema": "contexts/v1", "created": "", "git_commit": "", "config": {}, "inputs": {}, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({**rest, "counts": {**counts, "model": "this"}}))
    assert load_contexts(tmp_path, "this").facts["d_sae"] == D_SAE


def test_a_card_of_a_classifier_says_what_no_term_makes(attached):
    reader = model_reader(attached)
    messages = [{"role": "user", "content": "how does a garden grow"}, {"role": "assistant", "content": "Slowly. Then at once!"}]  # fmt: skip
    prefixes = read_prefixes(reader, messages)
    (weight_S,) = read_latents(attached, "score.weight")
    content = card(prefixes=prefixes, weight_S=weight_S, names={}, num_features=3, mean_and_std=(0.0, 0.0))
    spec = find_model(Benchmarking(model=str(attached.parent / "classifier"), benchmarks=("pairs=x",)))
    ((whole,),), _ = load_scorer(spec, 256)([Request(messages[:1], [messages[1]["content"]], alone=False)])
    assert content["reward"] == pytest.approx(whole.score, abs=1e-4)
    terms = sum(one["value"] for one in content["features"]) + content["rest"]
    assert terms + content["beyond"] == pytest.approx(content["reward"], abs=1e-6)
    ((begun,),), _ = load_scorer(spec, 256)([Request(messages[:1], ["Slowly."], alone=False)])
    assert content["sentences"][0]["reward"] == pytest.approx(begun.score, abs=1e-4)
    shown = io.StringIO()
    print_card(content, Console(file=shown, width=120))
    assert "no term: the reward is no sum of latents" in shown.getvalue()


def made(num: int, seed: int) -> AuditCodes:
    from scipy import sparse

    rng = np.random.default_rng(seed)
    z = sparse.csr_array(rng.random((2 * num, 4)))
    return AuditCodes(
        weight=np.array([1.0, -1.0, 0.5, 0.0]), reward=rng.normal(size=2 * num), tokens=np.ones(2 * num), z=z, sentence=z,
        ends=np.ones(2 * num, dtype=np.int64), residual=np.zeros((2 * num, 2)), pair_ids=np.arange(num).astype(str),
        prompts=(np.arange(num) // 2).astype(str), roles=np.array(["target"] * num), subsets=np.array([""] * num),
        chosen=np.arange(num), rejected=np.arange(num) + num, required=np.zeros(num),
    )  # fmt: skip


def test_figures_of_patching_are_those_of_their_definition():
    codes, rng = made(10, 0), np.random.default_rng(1)
    patched_RG = rng.normal(size=(20, 6))
    linear_RG = patched_RG + 0.1 * rng.normal(size=(20, 6))
    found = patched_figures(codes, patched_RG, linear_RG)
    own = patched_RG[:10, 0] - patched_RG[10:, 0]
    assert found.change.value == pytest.approx(own.mean())
    assert found.linear == pytest.approx((linear_RG[:10, 0] - linear_RG[10:, 0]).mean())
    distance = np.abs(patched_RG[:, 0] - linear_RG[:, 0]).mean()
    assert found.error == pytest.approx(distance / np.abs(patched_RG[:, 0]).mean())
    assert found.correlation == pytest.approx(np.corrcoef(patched_RG[:, 0], linear_RG[:, 0])[0, 1])
    margins = codes.reward[:10] - codes.reward[10:]
    assert found.accuracy_after == pytest.approx((margins + own > 0).mean())
    same = patched_figures(codes, patched_RG, patched_RG)
    assert (same.error, same.linear_share, round(same.correlation or 0, 9)) == (0.0, 1.0, 1.0)
    nothing = patched_figures(codes, np.zeros((20, 6)), np.zeros((20, 6)))
    assert (nothing.error, nothing.linear_share, nothing.correlation, nothing.correlation_sets) == (None, None, None, None)  # fmt: skip
    assert explained_share(codes) == pytest.approx(np.corrcoef(codes.reward, codes.z @ codes.weight)[0, 1] ** 2)


@pytest.fixture(scope="module")
def audited(extracted: Path, ray_cluster: None, tiny_folder, tmp_path_factory, mlflow_db: Path) -> Path:
    """An audit of a classifier, through the cluster."""
    from sarm.data.store.activations import ActivationStore

    work = tmp_path_factory.mktemp("classifier-audit")
    shutil.copy(mlflow_db, work / "mlflow.db")
    checkpoint(work / "classifier", tiny_folder, LAYOUTS["transformers"])
    sae = TopKSae(64, 96, 24)
    import torch

    sae.initialise_(standardise(ActivationStore(extracted / "activations" / "chat").read_sides()[1]), torch.Generator().manual_seed(0))  # fmt: skip
    (work / "sae").mkdir()
    save_sae(sae, work / "sae", {"activations": {"model": str(work / "classifier"), "layer": 1}})
    convert_sae(ConvertSae(source=work / "sae", target=work / "sarm", format="attached", model=str(work / "classifier"), pairs=extracted / "pairs", responses=40, max_length=128))  # fmt: skip
    rows = [{"prompt": f"What is {i} plus {j}?", "chosen": f"It is {i + j}.", "rejected": f"It is {i}. Ask again.", "subset": "sums"} for i in range(5) for j in range(2)]  # fmt: skip
    (work / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = AuditFeatures(
        run=RunSettings(out=work / "audit", cpus_per_worker=1), sarm=work / "sarm", select=(str(extracted / "pairs"),),
        target=(str(extracted / "pairs"),), off_target=(f"pairs={work / 'sums.jsonl'}",), permutations=500, controls=10,
        upstream_controls=5, deletions=2, max_off_target=1.0, max_features=4, fdr=0.5,
    )  # fmt: skip
    with open_session(asked) as session:
        audit(session, asked)
    return asked.run.out


def test_an_audit_of_a_classifier_shows_patching_beside_its_linear_approximation(audited):
    causal = json.loads((audited / "causal" / "causal.json").read_text())
    selection = json.loads((audited / "features" / "selection.json").read_text())
    assert selection["completeness"] is None
    assert 0 <= selection["linear_head_explains"] <= 1
    for scope in ("all", "rewarded"):
        own = causal["inside"][scope]
        assert own["value"] != 0
        assert own["error"] > 0
        assert own["patched_ci95"][0] <= own["value"] <= own["patched_ci95"][1]
        terms = causal["terms"][scope]
        assert len(terms["latents"]) == causal["num_features"]
        assert terms["residual"] < 0.05
        # Each response misses its own change by little, so that the pairs' mean margin does too.
        assert sum(terms["terms"]) == pytest.approx(
            terms["patched"], abs=0.1 * max(abs(own["value"]), abs(terms["patched"]))
        )
    page = (audited / "audit.html").read_text()
    assert "its reward is no sum over latents" in page
    assert "explained by the linear head" in page
    assert "What each feature has of the change" in page
    assert "every figure marked exact" not in page


def test_steering_a_classifier_writes_an_edit_that_scores_as_it_was_measured(audited):
    asked = Steer(run=RunSettings(out=audited), name="tripled", strength=3.0, strengths=(1.0, 3.0), controls=10)
    with open_session(asked, is_guest=True) as session:
        folder = steer(session, asked)
    content = json.loads((folder / "steering.json").read_text())
    assert content["doses"][0]["target_margin"] == 0
    assert content["doses"][1]["target_margin"] == pytest.approx(content["target"]["margin_shift"]["value"])
    pairs = [row for row in pq.read_table(audited / "codes" / "texts.parquet").to_pylist() if row["role"] == "target"]
    classifier = str(audited.parent / "classifier")
    shifts = []
    for edit in (None, folder):
        spec = find_model(Benchmarking(model=classifier, benchmarks=("pairs=x",), edit=edit))
        scored, _ = load_scorer(spec, 256)([Request(row["prompt"], [row["chosen"], row["rejected"]], alone=False) for row in pairs])  # fmt: skip
        shifts.append(np.mean([a.score - b.score for a, b in scored]))
    assert shifts[1] - shifts[0] == pytest.approx(content["target"]["margin_shift"]["value"], abs=1e-3)
    assert "inside the model" in (audited / "audit.html").read_text()


def test_pairs_are_poisoned_and_denoised_by_a_classifiers_features(audited):
    asked = Relabel(run=RunSettings(out=audited), poison=(0.1,), denoise=(0.1,), seeds=2)
    with open_session(asked, is_guest=True) as session:
        folder = relabel(session, asked)
    content = json.loads((folder / "relabel.json").read_text())
    assert "a linear head on the dictionary's codes stands in for it" in content["retraining"]
    assert {row["method"] for row in content["rows"]} > {"features"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"edit": "add"}, "is of head weights, and a classifier's latents have none. Pass --edit scale"),
        ({"undo": "tripled"}, "leave the edit out"),
        ({"features": (95000,)}, "there is no latent 95000"),
    ],
)
def test_edits_that_a_classifier_cannot_have_are_refused(flags, said, audited):
    asked = Steer(run=RunSettings(out=audited), name="other", controls=10, **flags)
    with open_session(asked, is_guest=True) as session, pytest.raises(UserError, match=said):
        steer(session, asked)
    assert not (audited / "steer" / "other").exists()


def test_a_dictionary_whose_latents_never_fire_at_rewarded_tokens_is_refused(tiny_folder, tmp_path, attached):
    save_random_sae(tmp_path / "sae", str(attached.parent / "classifier"), bias=-1e6)
    with pytest.raises(UserError, match=r"no latent of .* fires at a rewarded token"):
        convert_sae(ConvertSae(source=tmp_path / "sae", target=tmp_path / "out", format="attached", model=str(attached.parent / "classifier"), pairs=attached.parent / "pairs"))  # fmt: skip
