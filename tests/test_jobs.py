"""Jobs as a user runs them: processes with a command line, an exit status, and files left behind."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sarm.contracts.manifest import sha256_of
from sarm.data.sources.tiny import CHAT_TEMPLATE, tiny_pairs

RunJob = Callable[..., subprocess.CompletedProcess[str]]
FIGURES = {
    "heldout_accuracy",
    "heldout_accuracy_ci95",
    "length_baseline_accuracy",
    "scalar_head_accuracy",
    "fvu",
    "alive_at_reward",
    "stage_seconds",
    "peak_rss_gb",
}


def test_the_report_has_the_figures_that_a_reader_needs(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report.keys() >= FIGURES
    low, high = report["heldout_accuracy_ci95"]
    assert 0 <= low <= report["heldout_accuracy"] <= high <= 1
    # The made-up preferences are easy; a chain that has lost its labels, its tokens or its split is near one half.
    assert report["heldout_accuracy"] > 0.8
    assert 0 < report["alive_at_reward"] <= 1
    assert report["completeness"] < 1e-4
    assert {"corpus", "pairs", "activations/text", "sae", "sarm", "scalar_head", "evaluation"} <= report[
        "stage_seconds"
    ].keys()
    assert report["peak_rss_gb"] > 0.1
    assert report["citation"]["command"].endswith(f"pipeline.py tiny --out {finished}")
    assert report["citation"]["manifests"]["model"] == sha256_of(finished / "sarm" / "manifest.json")
    sources = re.findall(
        r"""(?:src|href|action|url)\s*[=(]\s*["']?([^"'\s)>]+)""", (finished / "report.html").read_text()
    )
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources), sources


def test_the_model_left_behind_scores_as_the_report_says(finished: Path) -> None:
    import pyarrow.dataset as ds
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import sarm.nn.modeling_sarm  # noqa: F401  registers the model type

    model = AutoModelForSequenceClassification.from_pretrained(finished / "sarm")
    tokenizer = AutoTokenizer.from_pretrained(finished / "sarm")
    pairs = {
        p["pair_id"]: p
        for p in ds.dataset([str(p) for p in (finished / "pairs").glob("*.parquet")]).to_table().to_pylist()
    }
    scores = (
        ds.dataset([str(p) for p in (finished / "evaluation" / "sarm_scores").glob("*.parquet")]).to_table().to_pylist()
    )
    for row in scores[:5]:
        pair = pairs[row["pair_id"]]
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            reward = model(**ids).logits.item()
        assert reward == pytest.approx(row["chosen_reward"], abs=1e-4)


def test_mlflow_has_a_parent_with_a_child_per_stage(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.parent / 'mlflow.db'}")
    parent = json.loads((finished / "run.json").read_text())["mlflow_run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.data.tags["mlflow.runName"] for run in children} == {
        "prepare corpus", "prepare pairs", "extract sentence ends", "extract chat ends", "extract held-out chat ends",
        "train SAE", "train SARM", "train scalar head", "evaluate", "collect contexts", "feature pages",
    }  # fmt: skip
    assert all(run.info.status == "FINISHED" for run in [*children, client.get_run(parent)])
    sarm = next(run for run in children if run.data.tags["mlflow.runName"] == "train SARM")
    history = client.get_metric_history(sarm.info.run_id, "sarm/loss")
    assert [metric.step for metric in history] == list(range(1, len(history) + 1))
    assert {file.path for file in client.list_artifacts(parent)} >= {
        "report.html",
        "report.json",
        "figures",
        "accuracies.json",
    }


def test_the_chain_ends_with_contexts_and_feature_pages_of_this_model(finished: Path) -> None:
    from mlflow import MlflowClient

    from sarm.interpret.context_store import load_contexts
    from sarm.passes.models import hash_of_folder

    store = load_contexts(finished / "contexts", hash_of_folder(finished / "sarm"))
    fired = set(store.latents["latent"].to_pylist())
    assert (finished / "features" / "features.html").read_text().count("<tr data-sign") == len(fired) > 10
    # The last held-out pair is counted: all of them are read, on both sides.
    heldout = json.loads((finished / "pairs" / "manifest.json").read_text())["counts"]["splits"]["heldout"]
    assert set(store.latents.filter(pc.equal(store.latents["place"], "rewarded"))["total"].to_pylist()) == {2 * heldout}
    assert pc.max(store.contexts["span_end"]).as_py() > 0
    run = json.loads((finished / "run.json").read_text())["mlflow_run_id"]
    logged = MlflowClient(f"sqlite:///{finished.parent / 'mlflow.db'}").list_artifacts(run, "features")
    assert {Path(file.path).name for file in logged} >= {
        "features.html",
        "features-001.html",
        "features.md",
        "contributions.png",
    }


def test_asking_again_is_a_no_op_and_keeps_every_byte(finished: Path, run_job: RunJob) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    done = run_job("pipeline", "tiny", "--out", finished)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "starting Ray" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")} == before


def test_a_job_that_gets_sigterm_ends_with_75_and_says_how_to_go_on() -> None:
    """`tests/stages/test_resume.py` shows what SIGTERM does to the workers of a training."""
    script = """
import os, signal, time
from sarm.settings.jobs import TrainSarm
from sarm.stages.job import run_job

def job(config):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

run_job(TrainSarm, job, "Sleep.", ["tiny"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr[-2000:]
    line = "stopped by SIGTERM; finished stages are kept, and this command goes on: python -c tiny"
    assert done.stderr.strip() == line


@pytest.mark.parametrize(
    "job", ["prepare_data", "extract_activations", "train_sae", "train_sarm", "evaluate", "feature_pages"]
)
def test_each_job_alone_finds_its_stage_done(job: str, finished: Path, run_job: RunJob) -> None:
    done = run_job(job, "tiny", "--out", finished)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "already done" in done.stdout


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    # A progress bar may stand above the error; nothing stands below it.
    *above, line = done.stderr.strip().splitlines()
    assert line.startswith("error: "), done.stderr[-2000:]
    assert not [other for other in above if other.startswith(("error", "Traceback"))]
    for word in words:
        assert word in line, line
    assert "starting Ray" not in done.stdout


BAD_FLAGS = {
    "wrong flag": ("train_sae", ["tiny", "--sae.kk", "3"], ["--sae.kk", "--sae.k"]),
    "wrong value": ("train_sae", ["tiny", "--sae.k", "many"], ["--sae.k", "many"]),
    "wrong preset": ("pipeline", ["dmo"], ["dmo", "demo"]),
    "a file of settings that is not there": (
        "pipeline",
        ["tiny", "--config", "/no/such.yaml"],
        ["/no/such.yaml", "No such file"],
    ),
    "a later stage's redo": ("train_sae", ["tiny", "--redo-from", "evaluate"], ["evaluate", "train_sae"]),
    "only its own stage": ("train_sarm", ["tiny", "--only"], ["no folder", "first"]),
    "k beyond the dictionary": (
        "pipeline",
        ["tiny", "--sae.k", "300"],
        ["k must be between 1 and d_sae=256", "300", "--sae.k"],
    ),
    "layer beyond the model": ("pipeline", ["tiny", "--model.layer", "9"], ["layer 9", "2 blocks", "--model.layer"]),
    "further layer beyond the model": ("pipeline", ["tiny", "--layers", "1", "9"], ["layer 9", "2 blocks", "--layers"]),
    "unknown model": ("pipeline", ["tiny", "--model.name", "/no/such/model"], ["/no/such/model", "--model.name"]),
    "unknown built-in": ("pipeline", ["tiny", "--model.name", "demo:gpt9"], ["demo:gpt9", "demo:smollm2"]),
    "missing file": ("pipeline", ["tiny", "--data.pairs", "/no/such.jsonl"], ["/no/such.jsonl"]),
    "relative database": ("prepare_data", ["tiny", "--mlflow-uri", "sqlite:///x.db"], ["x.db", "sqlite:////absolute"]),
    "no model to evaluate": (
        "evaluate",
        ["--model", "/no/such", "--benchmarks", "pairs=/no/such.jsonl"],
        ["/no/such", "--model"],
    ),
    "unknown benchmark": (
        "evaluate",
        ["--model", "json:loads", "--benchmarks", "chess=x.jsonl"],
        ["chess", "reward_bench_2", "--benchmarks"],
    ),
    "nothing to compare": ("compare", ["/no/a", "/no/b"], ["/no/a", "benchmarks/v2"]),
    "contexts of nothing": ("collect_contexts", ["tiny", "--only"], ["pairs/v1", "no folder"]),
    "pages of nothing": ("feature_pages", ["tiny", "--only"], ["contexts/v1", "no folder"]),
    "card of nothing": ("reward_card", ["--model", "/no/such", "--prompt", "a", "--response", "b"], ["/no/such"]),
    "nan rate": ("train_sarm", ["tiny", "--reward.lr", "nan"], ["finite", "--reward.lr"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_command_is_one_line_with_status_2_and_leaves_nothing(
    case: str, tmp_path: Path, run_job: RunJob
) -> None:
    job, arguments, words = BAD_FLAGS[case]
    refused(run_job(job, *arguments, *(["--out", tmp_path / "out"] if arguments else [])), *words)
    assert not (tmp_path / "out").exists()


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_a_file_without_rejected_is_refused(tmp_path: Path, run_job: RunJob) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "c"}])
    refused(run_job("prepare_data", "tiny", "--out", tmp_path / "out", "--data.pairs", file), "pairs.jsonl", "rejected")
    assert not (tmp_path / "out").exists()


def test_unusable_rows_are_counted_by_reason_and_the_rest_is_kept(tmp_path: Path, run_job: RunJob) -> None:
    good = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    bad = [{"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "p", "chosen": "only"}]
    pairs = jsonl(tmp_path / "pairs.jsonl", [*good, *bad])
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(b'{"text": "A sentence."}\n{"text": "\xff\xfe broken"}\n{"text": "  "}\nnot json\n')
    done = run_job("prepare_data", "tiny", "--out", tmp_path / "out", "--data.pairs", pairs, "--data.texts", texts)
    assert done.returncode == 0, done.stderr[-2000:]
    of_pairs = json.loads((tmp_path / "out" / "pairs" / "manifest.json").read_text())["counts"]
    of_texts = json.loads((tmp_path / "out" / "corpus" / "manifest.json").read_text())["counts"]
    assert of_pairs["rows"] == 40
    assert of_pairs["rejected"] == {"equal_answers": 1, "no_rejected": 1}
    assert of_texts["rows"] == 1
    assert of_texts["rejected"] == {"invalid_utf8": 1, "empty": 1, "bad_json": 1}


def test_pairs_that_the_template_refuses_are_left_out_of_every_stage_by_the_same_word(
    tmp_path: Path, tiny_folder: Path, run_job: RunJob
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusing + CHAT_TEMPLATE)
    good = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in tiny_pairs()]
    good[0]["chosen"] += " <|im_end|>"
    system = {"role": "system", "content": "Be kind."}
    bad = [
        {"prompt": [system, {"role": "user", "content": f"question {i}?"}], "chosen": "Gladly.", "rejected": "No."}
        for i in range(30)
    ]
    rendered = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "chosen": "a", "rejected": "b"}
    pairs = jsonl(tmp_path / "pairs.jsonl", [*good, *bad, rendered])
    out = tmp_path / "out"
    # Baselines would count what the SARM does.
    done = run_job("pipeline", "tiny", "--out", out, "--model.name", model, "--data.pairs", pairs, "--reward.baselines")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    counts = {
        name: json.loads((out / name / "manifest.json").read_text())["counts"]
        for name in ("pairs", "activations/chat", "activations/heldout", "sarm", "evaluation", "contexts")
    }
    assert counts["pairs"]["rejected"] == {"already_templated": 1}
    refused = {split: sum(pair["prompt"][0]["role"] == "system" for pair in pq.read_table(out / "pairs" / "part-00000.parquet").to_pylist() if pair["split"] == split) for split in ("train", "heldout")}  # fmt: skip
    assert sum(refused.values()) == 30
    assert counts["activations/chat"]["rejected"] == {"template_refuses": 2 * refused["train"]}
    assert counts["activations/heldout"]["rejected"] == {"template_refuses": 2 * refused["heldout"]}
    assert counts["sarm"]["figures"]["rejected_template_refuses"] == refused["train"]
    assert counts["evaluation"]["rejected"] == {"template_refuses": refused["heldout"]}
    spelled = "contents_with_control_tokens"
    read = [counts["activations/chat"][spelled] + counts["activations/heldout"][spelled]]
    read += [counts["sarm"]["figures"][spelled] + counts["evaluation"][spelled]]
    assert counts["pairs"][spelled] == 1
    assert set(read) == {1}
    assert spelled in counts["contexts"]


def test_an_empty_corpus_is_refused(tmp_path: Path, run_job: RunJob) -> None:
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": ""}])
    refused(run_job("prepare_data", "tiny", "--out", tmp_path / "out", "--data.texts", texts), "texts.jsonl")


def test_other_settings_do_not_touch_a_finished_folder(finished: Path, run_job: RunJob) -> None:
    refused(run_job("pipeline", "tiny", "--out", finished, "--sae.k", "9"), "sae", "k=8", "k=9", "--out")


def test_a_foreign_folder_is_refused(tmp_path: Path, run_job: RunJob) -> None:
    (tmp_path / "out" / "pairs").mkdir(parents=True)
    (tmp_path / "out" / "pairs" / "thesis.txt").write_text("mine")
    refused(run_job("pipeline", "tiny", "--out", tmp_path / "out"), "pairs", "claimed")
    assert (tmp_path / "out" / "pairs" / "thesis.txt").read_text() == "mine"


def test_an_sae_of_another_shape_is_refused(finished: Path, tmp_path: Path, run_job: RunJob) -> None:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for name in ("sarm", "evaluation", "contexts", "features"):
        shutil.rmtree(out / name)
    config = json.loads((out / "sae" / "cfg.json").read_text())
    (out / "sae" / "cfg.json").write_text(json.dumps({**config, "d_sae": 99}))
    refused(run_job("train_sarm", "tiny", "--out", out), "sae_weights.safetensors", "99")
    assert not (out / "sarm").exists()


@pytest.mark.parametrize("preset", ["demo", "sarm-1b", "sarm-2b", "sarm-4b", "safer-1b", "safer-3b"])
def test_every_preset_resolves_without_a_network(preset: str, run_job: RunJob) -> None:
    done = run_job("pipeline", preset, "--dry-run")
    assert done.returncode == 0
    assert "train_sarm           to do" in done.stdout
    assert "GB" in done.stdout
    assert "unknown" not in done.stdout, "the sources and models of the presets are known"
