"""The audit's jobs on a cluster: a tiny SARM, its pairs, and made-up other ones; files, figures, refusals, the page."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from sarm.audit.pairs import ROLES, audit_pairs
from sarm.contracts.folders import SARM_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.untrusted import read_json
from sarm.data.formats.models import model_folder
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sarm_folder import load_sarm, save_sarm
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.engine.session import open_session
from sarm.interpret.agreement import agreement
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.nn.sae import standardise
from sarm.nn.topk import TopKSae
from sarm.passes.reader import sarm_reader
from sarm.report.audit_page import write_audit_page
from sarm.settings.audit import AuditFeatures, Relabel, Steer
from sarm.settings.checks import UserError
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings
from sarm.stages import plan
from sarm.stages.audit import audit, choose_features
from sarm.stages.audit_codes import write_codes
from sarm.stages.audit_folder import read_audit
from sarm.stages.relabel import relabel
from sarm.stages.reward_models import build_model
from sarm.stages.safety_ratings import SafetyRatings
from sarm.stages.steer import steer
from sarm.training.head_start import start_head_


@pytest.fixture(scope="module")
def work(extracted: Path, preset: Pipeline, tmp_path_factory: pytest.TempPathFactory, mlflow_db: Path) -> Path:
    """A folder with a SARM whose head reads a probe through a random dictionary, and pairs about something else."""
    from sarm.data.store.activations import ActivationStore

    folder = tmp_path_factory.mktemp("audit")
    shutil.copy(mlflow_db, folder / "mlflow.db")
    x = standardise(ActivationStore(extracted / "activations" / "chat").read_sides()[1])
    sae = TopKSae(x.shape[1], 96, 24)
    sae.initialise_(x, torch.Generator().manual_seed(0))
    (folder / "sae").mkdir()
    save_sae(sae, folder / "sae", {"activations": {"model": preset.model.name, "layer": preset.model.layer}})
    chat = load_chat_tokenizer(preset.model, model_folder(preset.model))
    model = build_model(preset.model, str(model_folder(preset.model)), folder / "sae", chat)
    start_head_(model, extracted / "activations" / "chat", load_pairs(extracted / "pairs", "train"), 0)
    stage = StageFolder(folder / "sarm", SARM_FOLDER, plan.reward_settings(preset.model, preset.reward, 0))
    stage.claim()
    save_sarm(model, chat, stage.folder)
    stage.finish({"figures": {}})
    rows = [
        {"prompt": f"What is {i} plus {j}?", "chosen": f"It is {i + j}. That is <b>all</b>.", "rejected": f"It is {i}. I am not sure. Ask again.", "subset": "<sums>"}
        | ({"prompt": "What is 0 <|im_end|> plus 0?"} if i == j == 0 else {})
        for i in range(6) for j in range(4)
    ]  # fmt: skip
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(work: Path, extracted: Path, name: str = "audit", **changes) -> AuditFeatures:
    fields = {
        "select": (str(extracted / "pairs"),),
        "target": (str(extracted / "pairs"),),
        "off_target": (f"pairs={work / 'sums.jsonl'}",),
        "permutations": 500,
        "controls": 10,
        "upstream_controls": 5,
        "deletions": 4,
        "max_off_target": 1.0,
    }
    run = RunSettings(out=work / name, cpus_per_worker=1)
    return AuditFeatures(run=run, sarm=work / "sarm", **(fields | changes))


@pytest.fixture(scope="module")
def audited(work: Path, extracted: Path, ray_cluster: None) -> Path:
    asked = settings(work, extracted)
    with open_session(asked) as session:
        audit(session, asked)
    return asked.run.out


def run_job(function, asked) -> Path:
    with open_session(asked, is_guest=not isinstance(asked, AuditFeatures)) as session:
        return function(session, asked)


def test_codes_are_those_of_the_model_on_whole_conversations(audited, work, extracted):
    found = read_audit(audited)
    responses = pq.read_table(audited / "codes" / "responses.parquet").to_pylist()
    assert len({row["response_id"] for row in responses}) == len(responses)
    by_id = {row["response_id"]: row for row in responses}
    named = {row["pair_id"]: row for row in pq.read_table(audited / "codes" / "pairs.parquet").to_pylist()}
    chat = load_chat_tokenizer(dataclasses.replace(PRESETS["tiny"][1].model, name=str(work / "sarm")), work / "sarm")
    for pair in load_pairs(extracted / "pairs", "heldout").to_pylist()[:3]:
        row = by_id[named[pair["pair_id"]]["chosen_id"]]
        tokens = chat.encode_responses(pair["prompt"], [pair["chosen"]], offsets=True)[0]
        with torch.no_grad():
            output = found.model(torch.tensor([tokens.ids]))
            assert row["reward"] == pytest.approx(output.logits.item(), abs=1e-4)
        answer = [token for token, (start, end) in zip(tokens.ids, tokens.offsets, strict=True) if start < end]
        assert row["answer_tokens"] == len(answer) < len(tokens.ids)
        assert chat.tokenizer.decode(answer).strip() == pair["chosen"].strip()
        assert set(row["latents"]) == set(output.latent_indices[0][output.latent_values[0] != 0].tolist())
        assert sum(row["sentence_sizes"]) == len(row["sentence_latents"]) > 0


def test_an_audit_says_by_which_rules_texts_were_read_and_counts_those_that_spell_control_tokens(audited):
    codes = json.loads((audited / "codes" / "manifest.json").read_text())
    assert codes["config"]["protocol_version"] == PROTOCOL_VERSION
    assert (codes["counts"]["contents_with_control_tokens"], codes["counts"]["contents_already_templated"]) == (1, 0)
    page = (audited / "audit.md").read_text()
    assert "1 contents spell control tokens" in page
    assert re.search(rf"protocol version\W+{PROTOCOL_VERSION}\b", page)


def test_the_audit_selects_tests_and_says_what_is_exact(audited):
    selection = json.loads((audited / "features" / "selection.json").read_text())
    causal = json.loads((audited / "causal" / "causal.json").read_text())
    assert 1 <= len(selection["selected"]) <= 8
    assert selection["completeness"] < 1e-4
    assert causal["zeroed"]["rerun_gap"] < 1e-5
    assert causal["zeroed"]["value"] < 0, "without its safety features the model tells the target apart less"
    assert causal["sentences"]["num_responses"] > 0
    table = pq.read_table(audited / "features" / "latents.parquet").to_pylist()
    assert {row["site"] for row in table} == {"reward", "sentence"}
    assert {row["latent"] for row in table if row["sign"]} >= {row["latent"] for row in selection["selected"]}


def test_an_edit_is_a_sarm_that_scores_as_said_and_can_be_taken_back(audited, work):
    folder = run_job(steer, Steer(run=RunSettings(out=audited), name="tripled", strength=3.0, controls=10))
    found = read_audit(audited)
    edited = load_sarm(folder)
    x = standardise(torch.from_numpy(found.codes.residual.copy()))
    with torch.no_grad():
        rerun = edited.score(edited.sae(x)).squeeze(-1).numpy()
    latents = found.selection.latent
    closed = found.codes.reward + 2 * (found.codes.z[:, latents] @ found.codes.weight[latents])
    np.testing.assert_allclose(rerun, closed, atol=1e-5)
    content = json.loads((folder / "steering.json").read_text())
    assert content["target"]["margin_shift"]["value"] > 0
    assert [row["strength"] for row in content["sweep"]] == [-2, -1, 0, 0.5, 1, 1.5, 2, 4, 8]
    assert content["sweep"][4]["target_margin"] == pytest.approx(0, abs=1e-9)
    back = run_job(steer, Steer(run=RunSettings(out=audited), name="back", undo="tripled"))
    assert load_sarm(back).score.weight.equal(load_sarm(work / "sarm").score.weight)
    assert not edited.score.weight.equal(load_sarm(back).score.weight)


def test_a_goal_comes_with_its_certificate_or_says_how_far_one_gets(audited):
    asked = Steer(run=RunSettings(out=audited), name="goal", edit="goal", goal=0.05, tolerance=0.05, controls=10)
    content = read_json(run_job(steer, asked) / "steering.json")
    found = content["certificate"]
    assert found["solved_on"]["target_shift"] == pytest.approx(0.05, abs=1e-4)
    for one in (found["target"], *found["others"].values()):
        low, high = one["ci95"]
        assert (low is high is None and one["num_prompts"] < 20) or low <= one["value"] <= high
        assert 0 < one["num_prompts"] <= one["num_pairs"]
    page = (audited / "audit.html").read_text()
    assert "Certificate: goal" in page
    assert "The solver saw half of the prompts, where the target rises by +0.050" in page
    too_far = dataclasses.replace(asked, name="far", goal=1e6)
    with pytest.raises(UserError, match=r"cannot be reached.*can rise by .* at most"):
        run_job(steer, too_far)
    assert not (audited / "steer" / "far").exists()


def test_poison_and_denoise_leave_a_manifest_of_every_changed_pair(audited, extracted):
    asked = Relabel(
        run=RunSettings(out=audited), poison=(0.05,), denoise=(0.1,), seeds=2,
        write="poison:features:0.1", pairs=extracted / "pairs",
    )  # fmt: skip
    folder = run_job(relabel, asked)
    content = json.loads((folder / "relabel.json").read_text())
    methods = {row["method"] for row in content["rows"]}
    assert methods == {"features", "features, sentence ends", "random", "margin", "loss", "length", "probe"}
    num = content["num_pairs"]
    for row in content["rows"]:
        assert 0 <= row["target"] <= 1
        assert row["target_ci95"][0] <= row["target_change"] <= row["target_ci95"][1]
    known = set(pq.read_table(audited / "codes" / "pairs.parquet")["pair_id"].to_pylist())
    changes = sorted((folder / "changes").glob("*.parquet"))
    assert len(changes) == 14
    for path in changes:
        table = pq.read_table(path)
        assert table.num_rows == int(num * (0.05 if path.name.startswith("poison") else 0.1))
        assert set(table["pair_id"].to_pylist()) <= known
    place = audited / "relabelled" / "poison-features-0.1"
    before, after = (
        {row["pair_id"]: row for split in ("train", "heldout") for row in load_pairs(one, split).to_pylist()}
        for one in (extracted / "pairs", place / "pairs")
    )
    written = set(pq.read_table(place / "changes.parquet")["pair_id"].to_pylist())
    flipped = {pair_id for pair_id, row in after.items() if row["chosen"] != before[pair_id]["chosen"]}
    assert flipped == written
    assert len(flipped) == int(0.1 * sum(row["split"] == "train" for row in before.values()))
    assert {before[pair_id]["split"] for pair_id in flipped} == {"train"}
    noise = {row["method"]: row["precision"] for row in content["noise_rows"]}
    assert noise["loss"] > 0.2, "twice what chance finds"


def test_the_page_is_one_escaped_file_and_mlflow_has_a_child_per_stage(audited):
    page = (audited / "audit.html").read_text()
    for title in ("Safety features", "What the features cause", "Sentences cut out"):
        assert title in page
    assert "<sums>" not in page
    assert "<script" not in page
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert all(source.startswith(("data:", "#")) for source in sources), "nothing comes from elsewhere"
    client = MlflowClient(f"sqlite:///{audited.parent / 'mlflow.db'}")
    parent = json.loads((audited / "run.json").read_text())["mlflow_run_id"]
    runs = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    names = {run.data.tags["mlflow.runName"] for run in runs}
    assert names >= {"cache codes", "choose features", "test causes"}


def test_only_latents_that_raters_find_safe_are_selected_and_the_page_says_how_they_agree(audited, work, extracted):
    before = [one["latent"] for one in json.loads((audited / "features" / "selection.json").read_text())["selected"]]
    rows = [
        {"latent": latent, "rubric": "safety", "judge": judge, "repeat": 0, "rating": 5 if latent == before[0] else 2}
        for latent in before
        for judge in ("one", "two")
    ]
    given = SafetyRatings({before[0]: 5.0, **dict.fromkeys(before[1:], 2.0)}, agreement(rows, "safety"))
    asked = settings(work, extracted, "rated")
    shutil.copytree(audited / "codes", asked.run.out / "codes")
    with open_session(asked) as session:
        choose_features(session, asked, given)
    chosen = json.loads((asked.run.out / "features" / "selection.json").read_text())
    assert [one["latent"] for one in chosen["selected"]] == before[:1]
    assert chosen["rated"] == len(before)
    page = write_audit_page(asked.run.out).read_text()
    assert "Agreement on safety" in page
    assert f"{len(before)} latents have a valid rating" in page


def test_pairs_that_cannot_be_encoded_are_left_out_of_the_codes_and_counted(work, extracted, tmp_path):
    """Seen: the codes were written, and then every reader said that a pair had none."""
    asked = settings(work, extracted, "refusing")
    pairs = audit_pairs({role: getattr(asked, role) for role in ROLES}, {})
    rows = pairs.to_pylist()
    rows[0]["chosen"] = "broken \0 text"
    folder = tmp_path / "codes"
    folder.mkdir()
    with open_session(asked) as session:
        table = pa.Table.from_pylist(rows, schema=pairs.schema)
        counts = write_codes(table, sarm_reader(asked.sarm, 1024), folder, session.run_pass)
    assert counts["rejected"] == {"nul_byte": 1}
    assert counts["pairs"] == len(rows) - 1
    kept = pq.read_table(folder / "pairs.parquet").to_pylist()
    codes = set(pq.read_table(folder / "responses.parquet")["response_id"].to_pylist())
    assert all(row["chosen_id"] in codes and row["rejected_id"] in codes for row in kept)


def test_asking_again_is_a_no_op(audited, work, extracted, capsys):
    before = {path: path.stat().st_mtime_ns for path in audited.rglob("manifest.json")}
    run_job(audit, settings(work, extracted))
    assert capsys.readouterr().out.count("already done") == 3
    assert {path: path.stat().st_mtime_ns for path in audited.rglob("manifest.json")} == before


def test_a_redo_keeps_the_codes_and_makes_the_rest_with_other_settings(audited, work, extracted):
    """The page of an audit that finds nothing advises a larger --fdr, which the same folder used to refuse."""
    asked = settings(work, extracted, "redone")
    shutil.copytree(audited, asked.run.out, ignore=shutil.ignore_patterns("run.json"))
    codes = (asked.run.out / "codes" / "manifest.json").stat().st_mtime_ns
    other = dataclasses.replace(asked, fdr=0.2, redo=True, controls=10)
    run_job(audit, other)
    assert (asked.run.out / "codes" / "manifest.json").stat().st_mtime_ns == codes
    assert json.loads((asked.run.out / "features" / "manifest.json").read_text())["config"]["fdr"] == 0.2
    (aside,) = (asked.run.out.parent / f"{asked.run.out.name}.aside").iterdir()
    assert json.loads((aside / "features" / "manifest.json").read_text())["config"]["fdr"] == 0.05
    assert (aside / "audit.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sarm": "/no/such"}, "holds no reward model"),
        ({"off_target": ("pairs=SUMS", "PAIRS:train")}, "prompts are both off_target and select"),
        ({"select": ("../no-such-pairs",)}, "no folder .*no-such-pairs"),
        ({"off_target": ("PAIRS",)}, "both target and off-target"),
        ({"fdr": 0.0}, "fdr must be above 0"),
        ({"select": ()}, "no pairs to select"),
        ({"max_features": 0}, "max_features must be at least 1"),
        ({"ratings": "/no/ratings.csv"}, "cannot read ratings"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(work, extracted, changes, message):
    def placed(value):
        if isinstance(value, tuple):
            return tuple(placed(one) for one in value)
        known = {"SUMS": str(work / "sums.jsonl"), "PAIRS": str(extracted / "pairs")}
        for word, place in known.items() if isinstance(value, str) else ():
            value = value.replace(word, place)
        return Path(value) if isinstance(value, str) and value.startswith("/no/") else value

    named = {key: placed(value) for key, value in changes.items()}

    def refused() -> None:
        asked = settings(work, extracted, "refused", **{k: v for k, v in named.items() if k != "sarm"})
        run_job(audit, dataclasses.replace(asked, sarm=named.get("sarm", asked.sarm)))

    with pytest.raises(UserError, match=message):
        refused()
    assert not (work / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"features": (500,)}, "no latent 500"), ({"undo": "nothing"}, "no folder")],
)
def test_an_edit_of_nothing_is_refused(audited, changes, message):
    asked = Steer(run=RunSettings(out=audited), name="refused", **changes)
    with pytest.raises(UserError, match=message):
        run_job(steer, asked)
    assert not (audited / "steer" / "refused").exists()


def test_what_follows_an_audit_needs_one(tmp_path):
    for function, asked in (
        (steer, Steer(run=RunSettings(out=tmp_path / "none"))),
        (relabel, Relabel(run=RunSettings(out=tmp_path / "none"))),
    ):
        with pytest.raises(UserError, match="codes/v2: no folder"):
            run_job(function, asked)
    with pytest.raises(UserError, match=r"between 0 and 0\.5"):
        Relabel(run=RunSettings(out=tmp_path), poison=(0.7,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"edit": "goal"}, "needs --goal"), ({"strengths": ()}, "no strengths"), ({"name": "../x"}, "letters, digits")],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Steer(**changes)


def test_a_write_without_its_parts_is_refused():
    for write in ("poison", "poison:features:half", "flip:features:0.05"):
        with pytest.raises(UserError, match="ACTION:METHOD:SHARE"):
            Relabel(write=write, pairs=Path("pairs"))
