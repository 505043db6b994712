"""What a job would run, reuse and refuse, told from the folders that are there. The folders are real, their content is made up."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sarm.contracts.folders import (
    Folders,
)
from sarm.contracts.manifest import MANIFEST, Manifest, StageFolder
from sarm.engine.ray.machine import Machine
from sarm.engine.session import Session, open_session
from sarm.engine.stopping import JOB_TOKEN
from sarm.settings.checks import UserError
from sarm.settings.jobs import (
    CollectContexts,
    Evaluate,
    ExtractActivations,
    FeaturePages,
    Pipeline,
    PrepareData,
    TrainSae,
    TrainSarm,
)
from sarm.settings.presets import PRESETS
from sarm.settings.run import STAGES as NAMES
from sarm.stages import chain
from sarm.stages.chain_state import move, move_aside, scope_of, state_of
from sarm.stages.stage import STAGES

ORDER = tuple(STAGES)
JOBS = [PrepareData, ExtractActivations, TrainSae, TrainSarm, Evaluate, CollectContexts, FeaturePages]


def config_of(out: Path, job: type = Pipeline, **sections: Any) -> Any:
    """The tiny preset as a job's config, with changed settings by section."""
    preset = PRESETS["tiny"][1]
    run = replace(preset.run, out=out, **sections.pop("run", {}))
    changed = {name: replace(getattr(preset, name), **values) for name, values in sections.items()}
    return replace(preset, run=run, **changed).part(job)


def do(config: Any, *stages: str, finish: bool = True) -> None:
    """Leave what the stages leave, as far as manifests go."""
    folders = Folders(config.run.out)
    for stage in stages:
        for plan in STAGES[stage].folders(config, folders):  # type: ignore[index]
            folder = plan.open()
            folder.claim()
            if finish:
                (plan.folder / "content.json").write_text(json.dumps(plan.folder.name))
                folder.finish({})


def states(config: Any) -> dict[str, str]:
    return {stage.name: stage.state for stage in state_of(config).stages}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_in_an_empty_folder_begins_at_the_first_stage_and_ends_with_its_own(job: type, tmp_path: Path) -> None:
    found = states(config_of(tmp_path / "out", job))
    assert list(found) == [stage for stage in ORDER if stage in found]
    assert next(iter(found)) == "prepare_data"
    assert list(found)[-1] == job.stage
    assert set(found.values()) == {"to do"}
    assert states(config_of(tmp_path / "out", job, run={"only": True})).keys() == {job.stage}
    state_of(config_of(tmp_path / "out", job)).refuse(tmp_path / "out")


def test_contexts_need_no_evaluation_and_pages_need_all() -> None:
    preset = PRESETS["tiny"][1]
    assert "evaluate" not in scope_of(preset.part(CollectContexts))
    assert scope_of(preset.part(FeaturePages)) == ORDER
    assert scope_of(preset) == ORDER
    assert scope_of(replace(preset, pages=replace(preset.pages, in_pipeline=False)))[-1] == "evaluate"


def test_what_is_finished_is_reused_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path / "out", TrainSarm)
    do(config, "prepare_data", "extract_activations")
    do(config, "train_sae", finish=False)
    assert states(config) == {
        "prepare_data": "done",
        "extract_activations": "done",
        "train_sae": "goes on",
        "train_sarm": "to do",
    }
    state_of(config).refuse(config.run.out)


def test_a_finished_chain_is_done_for_every_job(tmp_path: Path) -> None:
    do(config_of(tmp_path / "out"), *STAGES)
    for job in [*JOBS, Pipeline]:
        assert state_of(config_of(tmp_path / "out", job)).is_done, job


def test_other_settings_are_refused_for_the_whole_chain_before_anything_runs(tmp_path: Path) -> None:
    do(config_of(tmp_path / "out"), *STAGES)
    config = config_of(tmp_path / "out", sae={"k": 4}, evaluation={"top_features": 7})
    with pytest.raises(UserError) as refused:
        state_of(config).refuse(config.run.out)
    message = str(refused.value)
    for said in ("k=8, now asked for k=4", "sarm was made from another sae/v1", "top_features=5", "--redo-from train_sae", "Nothing has been started"):  # fmt: skip
        assert said in message
    assert "\n" not in message
    # Its own stage is as it was: what lies behind it does not concern a job.
    assert state_of(config_of(tmp_path / "out", ExtractActivations, evaluation={"top_features": 7})).is_done


@pytest.mark.parametrize("only", [False, True])
def test_a_stage_is_not_done_anew_under_what_was_made_from_it(only: bool, tmp_path: Path) -> None:
    """Seen: after `sae` was deleted, `train_sae --sae.k 4` trained, and the next job said that `sarm` was made from another."""
    import shutil

    do(config_of(tmp_path / "out"), *STAGES)
    shutil.rmtree(tmp_path / "out" / "sae")
    config = config_of(tmp_path / "out", TrainSae, sae={"k": 4}, run={"only": only})
    with pytest.raises(UserError, match=r"train_sae would be done again, and sarm, evaluation, contexts, features in .* were made from what it made before\. Pass --redo-from train_sae"):  # fmt: skip
        state_of(config).refuse(config.run.out)


def test_the_same_stage_made_again_is_another_input(tmp_path: Path) -> None:
    config = config_of(tmp_path / "out")
    do(config, *STAGES)
    manifest = tmp_path / "out" / "sae" / MANIFEST
    fields = json.loads(manifest.read_text())
    del fields["checksum"]
    manifest.write_text(json.dumps({**fields, "created": "1999-12-31T00:00:00+00:00"}))
    found = states(config)
    assert found["train_sae"] == "done"
    assert found["train_sarm"] == found["evaluate"] == "refused"


def test_folders_of_other_rules_for_conversations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path / "out")
    do(config, *STAGES)
    monkeypatch.setattr("sarm.stages.plan.PROTOCOL_VERSION", 99)
    found = states(config)
    assert found["prepare_data"] == "done"
    assert {name for name, state in found.items() if state == "refused"} == set(STAGES) - {"prepare_data"}
    assert "protocol_version=2, now asked for protocol_version=99" in state_of(config).stages[1].why


def test_a_new_baseline_is_seen_before_it_is_trained(tmp_path: Path) -> None:
    """An evaluation without it would refuse to go on once it is there."""
    do(config_of(tmp_path / "out"), *STAGES)
    found = states(config_of(tmp_path / "out", Evaluate, reward={"baselines": ("scalar", "random_encoder")}))
    assert found["train_sarm"] == "to do"
    assert found["evaluate"] == "refused"


def test_a_lock_deep_in_a_folder_keeps_all_of_it_where_it_is(tmp_path: Path) -> None:
    """A sweep's cells are locked one by one, and moved together."""
    import multiprocessing

    cell = tmp_path / "out" / "cells" / "a" / "sarm"
    for folder in (cell, tmp_path / "out" / "sae"):
        folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    writer = context.Process(target=_hold, args=(cell, ready, stop))
    writer.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="is being written by somebody"):
            move([tmp_path / "out" / "sae", tmp_path / "out" / "cells"], tmp_path / "out")
        assert cell.exists()
        assert (tmp_path / "out" / "sae").exists()
    finally:
        stop.set()
        writer.join()
    assert move([tmp_path / "out" / "sae", tmp_path / "out" / "cells"], tmp_path / "out") is not None
    assert not cell.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_redo_moves_a_stage_and_all_later_ones_aside_and_nothing_else(stage: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path / "out")
    do(config, *STAGES)
    (tmp_path / "out" / "run.json").write_text("{}")
    (tmp_path / "out" / "report.html").write_text("old")
    asked = config_of(tmp_path / "out", run={"redo_from": stage})
    # A dry run says what will be, and moves nothing.
    planned = states(asked)
    # Contexts are of a model, whether it was evaluated or not.
    kept = ["collect_contexts"] if stage == "evaluate" else []
    before = [*ORDER[: ORDER.index(stage)], *kept]
    assert planned == {name: "done" if name in before else "to do" for name in ORDER}
    assert state_of(config).is_done
    aside = move_aside(asked)
    assert aside is not None
    assert states(config) == planned
    folders = Folders(tmp_path / "out")
    for name in ORDER:
        for plan in STAGES[name].folders(config, folders):
            place = plan.folder if name in before else aside / plan.folder.relative_to(tmp_path / "out")
            assert (place / MANIFEST).exists()
    assert (aside / "run.json").exists()
    assert (aside / "report.html").exists() == (ORDER.index(stage) <= ORDER.index("evaluate"))
    assert move_aside(asked) is None or stage != ORDER[-1]


def test_a_redo_with_other_settings_runs_them(tmp_path: Path) -> None:
    do(config_of(tmp_path / "out"), *STAGES)
    config = config_of(tmp_path / "out", TrainSarm, sae={"k": 4}, run={"redo_from": "train_sae"})
    state_of(config).refuse(config.run.out)
    move_aside(config)
    state_of(config_of(tmp_path / "out", TrainSarm, sae={"k": 4})).refuse(config.run.out)


def test_a_job_that_died_and_is_started_again_keeps_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "out", run={"redo_from": "train_sae"})
    do(config, *STAGES)
    monkeypatch.setenv(JOB_TOKEN, "one")
    assert move_aside(config) is not None, "an earlier start that died before it moved anything has redone nothing"
    do(config, "train_sae")
    assert move_aside(config) is None
    assert (tmp_path / "out" / "sae" / MANIFEST).exists()
    monkeypatch.setenv(JOB_TOKEN, "another")
    assert move_aside(config) is not None, "the same command given anew redoes it"


def test_a_job_does_not_redo_what_comes_after_it(tmp_path: Path) -> None:
    for job, asked in ((TrainSae, "evaluate"), (CollectContexts, "evaluate")):
        with pytest.raises(UserError, match=r"--redo-from evaluate is no stage that this job runs"):
            state_of(config_of(tmp_path / "out", job, run={"redo_from": asked}))
    with pytest.raises(
        UserError, match=r"--redo-from prepare_data is no stage that this job runs. Pass one of train_sae"
    ):
        state_of(config_of(tmp_path / "out", TrainSae, run={"redo_from": "prepare_data", "only": True}))


def test_the_pipeline_has_no_stage_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only has no meaning"):
        state_of(config_of(tmp_path / "out", run={"only": True}))


def test_who_is_refused_keeps_what_is_there(tmp_path: Path) -> None:
    """Seen: every folder of a run was moved aside, and then a source was found missing."""
    from sarm.stages.chain import run_chain

    do(config_of(tmp_path / "out"), *STAGES)
    asked = config_of(tmp_path / "out", data={"pairs": ("/no/such.jsonl",)}, run={"redo_from": "prepare_data"})
    with pytest.raises(UserError, match=r"such\.jsonl"):
        run_chain(asked)
    assert state_of(config_of(tmp_path / "out")).is_done
    assert not (tmp_path / "out.aside").exists()


def test_a_folder_that_is_being_written_is_not_moved(tmp_path: Path) -> None:
    import multiprocessing

    config = config_of(tmp_path / "out", run={"redo_from": "train_sae"})
    do(config, *STAGES)
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    writer = context.Process(target=_hold, args=(tmp_path / "out" / "sae", ready, stop))
    writer.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="is being written by somebody"):
            move_aside(config)
        assert (tmp_path / "out" / "sae" / MANIFEST).exists()
    finally:
        stop.set()
        writer.join()


def _hold(folder: Path, ready: Any, stop: Any) -> None:
    from sarm.engine.writer_lock import WriterLock

    with WriterLock(folder, "somebody"):
        ready.set()
        stop.wait(60)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "out" / "pairs").mkdir(parents=True)
    (tmp_path / "out" / "pairs" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="claimed"):
        state_of(config_of(tmp_path / "out"))


def test_stages_are_those_that_a_flag_can_name_and_the_readme_lists_each_as_it_is_declared() -> None:
    assert ORDER == NAMES
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, stage in STAGES.items():
        assert f"| `jobs/{name}.py` | {stage.reads} | {stage.writes} |" in readme


@pytest.mark.parametrize(
    ("machine", "use_gpu", "is_first"),
    [
        (Machine(2, 8, "H100", gpu_memory_gb=85.0), "auto", True),
        (Machine(2, 8, "H100", gpu_memory_gb=85.0), "no", False),
        (Machine(64, is_joined=True), "auto", True),
        (Machine(2), "yes", True),
        (Machine(2), "auto", False),
    ],
    ids=["gpus", "gpus-unused", "joined", "gpus-to-come", "cores"],
)
def test_gpus_and_clusters_are_looked_at_before_data_is_prepared_and_cores_alone_are_not_waited_for(
    machine: Machine, use_gpu: str, is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UnusableError(Exception):
        pass

    def refuses(_: Session) -> None:
        raise UnusableError

    monkeypatch.setattr(chain, "machine_of", lambda _: machine)
    monkeypatch.setattr(Session, "cluster", property(refuses))
    with pytest.raises(UnusableError):
        chain.run_chain(config_of(tmp_path / "out", ExtractActivations, run={"use_gpu": use_gpu}))
    assert (tmp_path / "out" / "corpus" / MANIFEST).exists() != is_first


@pytest.mark.usefixtures("ray_cluster")
def test_gpus_that_are_not_there_are_refused_before_data_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 workers need a GPU each, the cluster has 0"):
        chain.run_chain(config_of(tmp_path / "out", run={"use_gpu": "yes"}))
    assert not (tmp_path / "out" / "corpus").exists()


def test_folders_that_are_made_together_say_so_and_add_their_time_once(tmp_path: Path) -> None:
    # Seconds of imports, that the process which holds a lock would wait for too.
    from sarm.stages.report import _own_seconds

    def made(*names: str) -> list[Manifest]:
        folders = {name: StageFolder(tmp_path / "out" / name, "rows/v1", {}) for name in names}

        def body(children: Any) -> dict[str, dict[str, Any]]:
            time.sleep(0.2)
            for name in children:
                (folders[name].folder / "content.json").write_text(name)
            return {name: {} for name in children}

        return list(session.stages({name: name for name in names}, folders, body, resume=False).values())

    with open_session(config_of(tmp_path / "out", ExtractActivations)) as session:
        both, alone = made("a", "b"), made("c")
    assert len({manifest.counts["seconds"] for manifest in both}) == 1
    assert sum(_own_seconds(manifest) or 0 for manifest in both) == pytest.approx(both[0].counts["seconds"])
    assert _own_seconds(alone[0]) == alone[0].counts["seconds"] >= 0.2
