"""An ablation on a real cluster: what is shared is done once, what is there is not done again, what fails is marked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from ray.util.placement_group import placement_group, placement_group_table

from sarm.engine.ray.placement import note_placement_group, release_placement_groups
from sarm.engine.ray.room import Cluster, Node
from sarm.settings.sweep import Ablation
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.sweep.folder import claim_sweep
from sarm.stages.sweep.report import Report
from sarm.stages.sweep.run import check_plan, run_sweep
from sarm.stages.sweep.trials import run_trials


@pytest.fixture(scope="module")
def config(tmp_path_factory, extracted: Path, mlflow_db: Path) -> Ablation:
    """A small sweep whose shared data is there already: a pipeline's stages are a sweep's where their settings are equal."""
    tiny = ABLATIONS["tiny"][1]
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    shutil.copy(mlflow_db, out.parent / "mlflow.db")
    sweep = replace(tiny.sweep, layers=(1,), widths=(2, 4), components=("sarm",), report_steps=4)
    found = replace(tiny, run=replace(tiny.run, out=out), sae=replace(tiny.sae, cross_entropy_texts=0), sweep=sweep)
    claim_sweep(found)
    for name in ("corpus", "pairs"):
        shutil.copytree(extracted / name, out / name)
    for name in ("text", "chat", "heldout"):
        shutil.copytree(extracted / "activations" / name, out / "activations" / "layer1" / name)
    return found


@pytest.fixture(scope="module")
def swept(config: Ablation, ray_cluster: None) -> Report:
    return run_sweep(config)


def manifests(config: Ablation) -> dict[str, int]:
    out = config.run.out
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("manifest.json")}


def client(config: Ablation) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{config.run.out.parent / 'mlflow.db'}")


def runs(config: Ablation, parent: str | None = None) -> list:
    (experiment,) = client(config).search_experiments(filter_string="name = 'sarm'")
    found = client(config).search_runs([experiment.experiment_id])
    return [run for run in found if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == parent]


def test_every_cell_has_a_row_in_every_form_of_the_table(config, swept):
    table = pq.read_table(swept.folder / "table.parquet").to_pylist()
    assert [(row["width"], row["status"], row["d_sae"]) for row in table] == [(2, "done", 128), (4, "done", 256)]
    assert all(0 <= row["ci95_low"] <= row["heldout_accuracy"] <= row["ci95_high"] <= 1 for row in table)
    wide, narrow = (next(row for row in table if row["width"] == width) for width in (4, 2))
    assert wide["minus_centre"] is None, "it is the centre"
    gain = narrow["heldout_accuracy"] - wide["heldout_accuracy"]
    assert narrow["minus_centre"] == pytest.approx(gain)
    assert narrow["minus_centre_low"] <= gain <= narrow["minus_centre_high"]
    assert all(row["fvu_heldout"] > 0 and row["training_seconds"] > 0 for row in table)
    assert len((swept.folder / "table.csv").read_text().splitlines()) == 3
    assert "| sarm | 1 | 4x | 8 | 1 |" in (swept.folder / "table.md").read_text()
    assert swept.best["heldout_accuracy"] == max(row["heldout_accuracy"] for row in table)


def test_what_is_shared_is_done_once(config, swept):
    (parent,) = runs(config)
    stages = [run.data.tags[MLFLOW_RUN_NAME] for run in runs(config, parent.info.run_id)]
    assert {name[:20] for name in stages if not name.startswith("sarm-")} == {
        "train SAE layer1-x2-",
        "train SAE layer1-x4-",
    }
    reads = [json.loads(path.read_text())["counts"]["one_read"] for path in config.run.out.glob("sae/*/manifest.json")]
    assert len(reads) == 2
    assert [len(read) for read in reads] == [2, 2], "one read for both"
    assert reads[0] == reads[1]
    costs = json.loads((swept.folder / "costs.json").read_text())
    own = sum(row["training_seconds"] + row["evaluation_seconds"] for row in swept.rows)
    assert costs["cells_seconds"] == pytest.approx(own)
    at_once = costs["trials_at_once"]
    stages = at_once * costs["shared_seconds"] + own
    assert costs["overhead"] == pytest.approx(at_once * costs["sweep_seconds"] / stages)


def test_mlflow_has_a_run_for_each_cell_with_a_tag_for_every_axis(config, swept):
    (parent,) = runs(config)
    cells = [run for run in runs(config, parent.info.run_id) if "component" in run.data.tags]
    axes = {tuple(run.data.tags[name] for name in ("layer", "width", "k", "seed", "component")) for run in cells}
    assert axes == {("1", "2", "8", "0", "sarm"), ("1", "4", "8", "0", "sarm")}
    for run in cells:
        assert run.info.status == "FINISHED"
        assert run.data.params["d_sae"] in ("128", "256")
        assert run.data.metrics["heldout_accuracy"] >= 0
        assert {child.data.tags[MLFLOW_RUN_NAME] for child in runs(config, run.info.run_id)} == {
            "train SARM",
            "evaluate",
        }
    # No server runs, so that an address would lead nowhere.
    assert swept.compare == f"make ui OUTPUTS={config.run.out.parent}"
    assert f"compare the cells: `{swept.compare}`" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["best_cell"] == swept.best["cell"]
    (version,) = client(config).search_model_versions(f"name = '{config.run.out.name}'")
    assert version.run_id == parent.info.run_id
    assert version.source.endswith(f"best/{swept.best['cell']}")


def test_a_finished_sweep_does_nothing_again(config, swept, capsys):
    before = manifests(config)
    again = run_sweep(config)
    assert "all cells are done" in capsys.readouterr().out
    assert manifests(config) == before
    assert again.rows == swept.rows


def test_optuna_proposes_cells_of_the_grid_and_is_told_what_they_reached(config, swept, capsys):
    """On cells that are done, so that a trial costs nothing."""
    plan = check_plan(replace(config, sweep=replace(config.sweep, search="optuna")))
    (parent,) = runs(config)
    plan = plan._replace(
        mlflow_uri=f"sqlite:///{config.run.out.parent / 'mlflow.db'}", parent_run_id=parent.info.run_id
    )
    before = manifests(config)
    cluster = Cluster(nodes=(Node(6),), is_local=False)
    run_trials(plan, plan.cells, cluster, num_samples=4)
    assert manifests(config) == before
    said = capsys.readouterr().out
    started = [line.split()[1] for line in said.splitlines() if line.endswith(": started")]
    assert len(started) == 4
    assert {name.rstrip(":") for name in started} <= {plan.name(cell) for cell in plan.cells}
    assert "failed" not in said


def test_a_setting_is_an_axis_and_what_its_cells_share_is_not_done_again(config, swept, capsys):
    before = manifests(config)
    sweep = replace(config.sweep, widths=(2,), centre=None, axes=("sae.architecture=topk,batch_topk",))
    found = run_sweep(replace(config, sweep=sweep))
    new = manifests(config).keys() - before.keys()
    assert {name: when for name, when in manifests(config).items() if name in before} == before
    assert sorted(name.split("-s0-")[0] for name in new if name.startswith("sae/")) == [
        "sae/layer1-x2-k8-sae.architecture-batch_topk"
    ]
    assert [(row["sae.architecture"], row["status"]) for row in found.rows] == [
        ("topk", "done"),
        ("batch_topk", "done"),
    ]
    assert "| component | layer | width | k | sae.architecture | seeds |" in (found.folder / "table.md").read_text()
    assert pq.read_table(found.folder / "table.parquet")["sae.architecture"].to_pylist() == ["topk", "batch_topk"]
    # Another grid is another run: MLflow cannot change parameters.
    (parent,) = [run for run in runs(config) if run.data.params.get("axes")]
    (run,) = [run for run in runs(config, parent.info.run_id) if run.data.tags.get("sae.architecture")]
    assert run.data.tags["sae.architecture"] == run.data.params["sae.architecture"] == "batch_topk"
    # Proposals for cells that are done cost nothing.
    plan = check_plan(replace(config, sweep=replace(sweep, search="optuna")))
    plan = plan._replace(
        mlflow_uri=f"sqlite:///{config.run.out.parent / 'mlflow.db'}", parent_run_id=parent.info.run_id
    )
    capsys.readouterr()
    cluster = Cluster(nodes=(Node(6),), is_local=False)
    run_trials(plan, plan.cells, cluster, num_samples=3)
    said = [line.split()[1].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.endswith(": started")]
    assert len(said) == 3
    assert set(said) <= {plan.name(cell) for cell in plan.cells}


def test_a_new_value_runs_only_its_cells_and_one_that_cannot_work_is_marked(config, swept, capsys):
    before = manifests(config)
    (broken,) = config.run.out.glob("sae/layer1-x4-k8-*/sae_weights.safetensors")
    broken.write_bytes(b"torn")
    more = replace(config.sweep, components=("sarm", "random_encoder", "scalar"))
    report = run_sweep(replace(config, sweep=more))
    assert {name: when for name, when in manifests(config).items() if name in before} == before
    status = {(row["component"], row["width"]): row["status"] for row in report.rows}
    assert status == {
        ("sarm", 2): "done",
        ("sarm", 4): "done",
        ("random_encoder", 4): "failed",
        ("scalar", 0): "done",
    }
    assert "starting again" not in capsys.readouterr().out, "no second try would mend it"
    (failed,) = [row for row in report.rows if row["status"] == "failed"]
    assert "sae_weights.safetensors has changed" in failed["reason"]
    assert failed["reason"].replace("|", "/") in (report.folder / "table.md").read_text()
    assert release_placement_groups(config.run.out) == [], "nothing was left to release"


def test_the_placement_group_of_a_stopped_trial_is_given_back(tmp_path, ray_cluster):
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    note_placement_group(tmp_path / "cell" / ".ray_train", group.id.hex())
    assert release_placement_groups(tmp_path / "other") == []
    assert release_placement_groups(tmp_path / "cell") == [group.id.hex()]
    assert placement_group_table(group)["state"] == "REMOVED"
    assert release_placement_groups(tmp_path / "cell") == []
