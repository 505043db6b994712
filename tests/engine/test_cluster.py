from pathlib import Path

import pytest
import ray

from sarm.engine.ray.cluster import Cluster, check_machine, connect, nodes_without
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings


def cluster(**changes: object) -> Cluster:
    return Cluster(**{"num_nodes": 1, "num_cpus": 8, "num_gpus": 0, "is_local": False, **changes})  # type: ignore[arg-type]


def test_cores_are_shared_out_and_one_is_spared_on_a_joined_cluster() -> None:
    assert cluster().cpus_each(RunSettings(), 1) == 7
    assert cluster().cpus_each(RunSettings(), 3) == 2
    assert cluster(is_local=True).cpus_each(RunSettings(), 1) == 8


def test_workers_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(UserError, match="need 9 CPUs, the cluster has 8"):
        cluster().cpus_each(RunSettings(cpus_per_worker=2), 4)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="4 workers need a GPU each, the cluster has 2"):
        cluster(num_gpus=2).cpus_each(RunSettings(), 4)


def test_one_core_still_runs_one_worker() -> None:
    assert cluster(num_cpus=1).cpus_each(RunSettings(), 1) == 1


def test_a_variable_that_lets_parquet_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE", "1")
    with pytest.raises(UserError, match="lets Parquet files run code"), connect(RunSettings()):
        pass


def test_a_job_that_is_started_again_waits_for_its_cluster_and_a_first_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = []

    def init(**asked: object) -> None:
        tries.append(asked["address"])
        if len(tries) < 3:
            raise ConnectionError("nobody listens")
        raise InterruptedError("it is there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("sarm.engine.ray.cluster.check_listening", lambda address: None)
    monkeypatch.setattr("sarm.engine.ray.cluster._SECONDS_BETWEEN_TRIES", 0.01)
    monkeypatch.delenv("SARM_STARTED_AGAIN", raising=False)
    with (
        pytest.raises(UserError, match=r"no Ray cluster at 10\.0\.0\.9:6379"),
        connect(RunSettings(ray_address="10.0.0.9:6379")),
    ):
        pass
    assert len(tries) == 1
    tries.clear()
    monkeypatch.setenv("SARM_STARTED_AGAIN", "1")
    with pytest.raises(InterruptedError), connect(RunSettings(ray_address="10.0.0.9:6379")):
        pass
    assert tries == ["10.0.0.9:6379"] * 3


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://cluster"])
def test_a_dashboard_is_no_cluster_to_join(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(UserError, match=rf"{address} is the address of a dashboard.*--submit {address}"),
        connect(RunSettings()),
    ):
        pass


def test_nodes_that_do_not_see_the_output_folder_are_named(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node,) = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    assert nodes_without(tmp_path / "out") == []
    assert not list(tmp_path.iterdir()), "and nothing stays there"
    # What is written here is seen by nobody else: a disk of this machine alone.
    monkeypatch.setattr(Path, "touch", lambda path: None)
    assert nodes_without(tmp_path / "out") == [node]


def test_what_cannot_fit_this_machine_is_refused_before_a_cluster_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="900 workers"):
        check_machine(RunSettings(num_workers=900, num_actors=900))
    # One of the two may be meant for another stage, on another machine.
    check_machine(RunSettings(num_workers=900))
    check_machine(RunSettings(num_workers=900, num_actors=900, ray_address="cluster:6379"))
