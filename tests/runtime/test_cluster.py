import pytest

from sarm.config import Run, UserError
from sarm.runtime.cluster import Cluster, connect


def cluster(**changes: object) -> Cluster:
    return Cluster(**{"num_nodes": 1, "num_cpus": 8, "num_gpus": 0, "is_local": False, **changes})  # type: ignore[arg-type]


def test_cores_are_shared_out_and_one_is_spared_on_a_joined_cluster() -> None:
    assert cluster().cpus_each(Run(), 1) == 7
    assert cluster().cpus_each(Run(), 3) == 2
    assert cluster(is_local=True).cpus_each(Run(), 1) == 8


def test_workers_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(UserError, match="need 9 CPUs, the cluster has 8"):
        cluster().cpus_each(Run(cpus_per_worker=2), 4)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="4 workers need a GPU each, the cluster has 2"):
        cluster(num_gpus=2).cpus_each(Run(), 4)


def test_one_core_still_runs_one_worker() -> None:
    assert cluster(num_cpus=1).cpus_each(Run(), 1) == 1


def test_a_variable_that_lets_parquet_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE", "1")
    with pytest.raises(UserError, match="lets Parquet files run code"), connect(Run()):
        pass
