"""Several SAEs from one job: folders and MLflow runs of their own, and nothing trained twice."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from sarm.data.formats.sae_folder import load_sae
from sarm.engine.session import open_session
from sarm.settings.checks import UserError
from sarm.settings.jobs import Pipeline
from sarm.settings.run import RunSettings
from sarm.settings.sae import AlsoSaes, SaeSettings
from sarm.stages import plan
from sarm.stages.train_sae import train_sae


def test_also_is_every_other_combination():
    sae = SaeSettings(d_sae=64, k=4)
    found = AlsoSaes(d_sae=(64, 128), k=(8,), seed=(0, 1)).beside(sae, 0)
    assert [name for name, *_ in found] == [
        "d64-k4-seed1", "d64-k8-seed0", "d64-k8-seed1", "d128-k4-seed0", "d128-k4-seed1", "d128-k8-seed0", "d128-k8-seed1",
    ]  # fmt: skip
    assert all(name == f"d{one.d_sae}-k{one.k}-seed{seed}" for name, one, seed in found)
    assert AlsoSaes().beside(sae, 0) == []
    with pytest.raises(UserError, match="k must be between 1 and d_sae=64, got 100"):
        AlsoSaes(k=(100,)).beside(sae, 0)


def test_saes_of_one_job_are_stages_of_their_own(extracted: Path, preset: Pipeline, tmp_path: Path, mlflow_db: Path):
    out = tmp_path / "tiny"
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    out.mkdir()
    for name in ("corpus", "pairs", "activations"):
        (out / name).symlink_to(extracted / name)
    sae = dataclasses.replace(preset.sae, text_epochs=1, chat_epochs=1)
    config = dataclasses.replace(preset, run=RunSettings(out=out, cpus_per_worker=1), sae=sae)

    def train(also: AlsoSaes) -> dict[Path, int]:
        with open_session(config) as session:
            activations = plan.sae_activations(session.folders, config.data, sae, config.extraction.units)
            train_sae(session, sae, activations, also)
        return {path: path.stat().st_mtime_ns for path in out.glob("sae*/**/manifest.json")}

    alone = train(AlsoSaes())
    together = train(AlsoSaes(d_sae=(128,), seed=(1,)))
    assert {path.parent.name for path in together} == {"sae", "d256-k8-seed1", "d128-k8-seed0", "d128-k8-seed1"}
    assert alone.items() <= together.items(), "the finished SAE was made again"
    assert train(AlsoSaes(d_sae=(128,), seed=(1,))) == together
    assert not (out / "training").exists()
    weights = {path.parent.name: load_sae(path.parent)[0].W_dec for path in together}
    assert weights["d128-k8-seed0"].shape == weights["d128-k8-seed1"].shape == (128, 64)
    assert not torch.equal(weights["d128-k8-seed0"], weights["d128-k8-seed1"])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    parent = json.loads((out / "run.json").read_text())["mlflow_run_id"]
    children = client.search_runs(
        [client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    by_name = {run.data.tags["mlflow.runName"]: run for run in children}
    assert by_name.keys() == {f"train SAE{name}" for name in ("", " d256-k8-seed1", " d128-k8-seed0", " d128-k8-seed1")}
    for run in children:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "sae_text/loss")]
        assert steps
        assert steps == sorted(set(steps))
    assert by_name["train SAE d128-k8-seed0"].data.params["d_sae"] == "128"
