import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import get_node_ip_address
from tests.ray_head import free_ports, running_head

from sarm.engine.ray.cluster import check_machine, connect, nodes_without
from sarm.engine.ray.room import Cluster, Node, with_room
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings


def cluster(*nodes: Node, **changes: Any) -> Cluster:
    return Cluster(nodes=nodes or (Node(8),), **{"is_local": False, **changes})


def test_cores_are_shared_out_and_one_is_spared_on_a_joined_cluster() -> None:
    assert cluster().cpus_each(RunSettings(), 1) == 7
    assert cluster().cpus_each(RunSettings(), 3) == 2
    assert cluster(is_local=True).cpus_each(RunSettings(), 1) == 8


def test_workers_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(UserError, match="need 9 CPUs, the cluster has 8"):
        cluster().cpus_each(RunSettings(cpus_per_worker=2), 4)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="4 workers need a GPU each, the cluster has 2"):
        cluster(Node(8, 2)).cpus_each(RunSettings(), 4)


def test_one_core_still_runs_one_worker() -> None:
    assert cluster(Node(1)).cpus_each(RunSettings(), 1) == 1


def test_cores_are_shared_out_node_by_node() -> None:
    # A worker is on one node: two nodes of four cores have room for one of four beside a spare core, not for one of seven.
    two = cluster(Node(4), Node(4))
    assert two.cpus_each(RunSettings(), 1) == 4
    assert two.cpus_each(RunSettings(), 2) == 3
    assert two.cpus_each(RunSettings(), 3) == 2
    assert two.cpus_each(RunSettings(), 7) == 1
    ragged = cluster(Node(0), Node(2), Node(16))
    assert ragged.cpus_each(RunSettings(), 1) == 16
    assert ragged.cpus_each(RunSettings(), 4) == 4
    with pytest.raises(
        UserError, match="1 workers of 5 cores do not fit the cluster's nodes, each on one: 4 CPUs, 4 CPUs"
    ):
        cluster(Node(4), Node(4), is_local=False).cpus_each(RunSettings(cpus_per_worker=5), 1)


def test_gpus_are_shared_out_with_the_cores_beside_them() -> None:
    cards = cluster(Node(4), Node(16, 8), Node(16, 8))
    assert cards.cpus_each(RunSettings(), 16) == 2, "the spare core is the head's, which has no GPU"
    assert cards.cpus_each(RunSettings(), 8) == 4
    assert not cluster(Node(16, 8), gpus_wanted="no").use_gpu
    assert cluster(Node(16, 8), gpus_wanted="no").cpus_each(RunSettings(), 9) == 1
    assert cluster(Node(16), gpus_wanted="yes").use_gpu
    with pytest.raises(
        UserError, match=r"the cluster has 0\. .*--use-gpu no.*--wait-for-nodes SECONDS and --use-gpu yes"
    ):
        cluster(Node(16), gpus_wanted="yes").cpus_each(RunSettings(), 1)


@pytest.mark.parametrize(
    ("nodes", "asked", "workers"),
    [
        ((Node(2),), 0, 1),
        ((Node(16),), 3, 3),
        ((Node(4), Node(4), Node(4)), 0, 3),
        ((Node(2), Node(16), Node(16)), 0, 2),
        ((Node(16, 8),), 0, 8),
        ((Node(4), Node(16, 8), Node(16, 8)), 0, 16),
        ((Node(4), Node(16, 8), Node(16, 8)), 5, 5),
        ((Node(4, 8),), 0, 3),
    ],
)
def test_a_run_takes_all_gpus_or_a_worker_a_node_unless_it_says_how_many(
    nodes: tuple[Node, ...], asked: int, workers: int
) -> None:
    found = cluster(*nodes).workers(RunSettings(), asked)
    assert found == workers
    if not asked:
        assert cluster(*nodes).cpus_each(RunSettings(), found) >= 1, "what is taken by default fits"


def test_a_run_that_asks_for_all_gpus_waits_for_the_first_and_takes_what_has_come() -> None:
    empty, grown = cluster(Node(2), gpus_wanted="yes"), cluster(Node(2), Node(16, 8), gpus_wanted="yes")
    asked: list[Any] = []
    run = RunSettings(wait_for_nodes=5)
    now = with_room(empty, run, 0, look=lambda: grown, ask=asked.append)
    assert asked[0] == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}]
    assert now.workers(run, run.num_workers) == 8


def test_what_a_later_stage_has_no_room_for_is_refused_before_the_first_begins() -> None:
    eight = cluster(Node(64, 8))
    eight.check_room(RunSettings(), (0, 8))
    with pytest.raises(UserError, match=r"16 workers need a GPU each, the cluster has 8\."):
        eight.check_room(RunSettings(), (0, 16))
    eight.check_room(RunSettings(wait_for_nodes=60.0), (0, 16))


def test_a_job_waits_for_the_nodes_that_an_autoscaler_brings_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    empty, grown = cluster(Node(2), gpus_wanted="yes"), cluster(Node(2), Node(8, 4), gpus_wanted="yes")
    seen = iter([empty, empty, grown])
    run = RunSettings(wait_for_nodes=5, cpus_per_worker=2)
    assert with_room(empty, run, 3, look=lambda: next(seen), ask=asked.append) == grown
    assert asked == [[{"CPU": 2.0, "GPU": 1.0}] * 3 + [{"CPU": 1.0}], []], "and nothing is held when they are there"
    assert "waiting for nodes: 3 workers of 2 CPUs and a GPU each; there are 1 nodes with 2 CPUs and 0 GPUs" in capsys.readouterr().out  # fmt: skip
    with pytest.raises(UserError, match=r"after 0 s the cluster still has no room: 3 workers need a GPU each"):
        with_room(empty, RunSettings(wait_for_nodes=0.05), 3, look=lambda: empty, ask=asked.append)
    assert asked[-1] == []
    # Without waiting, and where there is room, nobody is asked.
    assert with_room(empty, RunSettings(), 3, look=lambda: grown, ask=asked.append) == empty
    assert with_room(grown, run, 3, look=lambda: empty, ask=asked.append) == grown
    assert len(asked) == 4


WORKER = {"resources": {"CPU": 3, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
# What Ray's own tests of its autoscaler write: nodes are processes of this machine.
GROWING: dict[str, Any] = {
    "cluster_name": "growing", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5, "auth": {}, "docker": {}, "file_mounts": {},
    "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True},
    "head_node_type": "ray.head.default",
    "available_node_types": {"ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}, "worker": WORKER},
    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [],
}  # fmt: skip
WAITS = """
import sys
from sarm.engine.ray.cluster import connect, room_for
from sarm.settings.run import RunSettings

run = RunSettings(ray_address=sys.argv[1], use_gpu="yes", wait_for_nodes=120, cpus_per_worker=2)
with connect(run) as before:
    now = room_for(before, run, 2)
    print(sorted(before.nodes), sorted(now.nodes))
"""


def test_a_cluster_that_starts_from_no_workers_grows_to_what_a_job_needs(tmp_path: Path) -> None:
    """Ray's own autoscaler."""
    (gcs,) = free_ports(1)
    provider = GROWING["provider"] | {"gcs_address": f"{get_node_ip_address()}:{gcs}"}
    (tmp_path / "growing.json").write_text(json.dumps(GROWING | {"provider": provider}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    flag = f"--autoscaling-config={tmp_path / 'growing.json'}"
    with running_head(tmp_path, environment, num_cpus=1, gcs=gcs, more=[flag]) as head:
        command = [sys.executable, "-c", WAITS, head.gcs]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=head.environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "[Node(cpus=1, gpus=0)] [Node(cpus=1, gpus=0), Node(cpus=3, gpus=1), Node(cpus=3, gpus=1)]" in done.stdout
    assert "waiting for nodes: 2 workers of 2 CPUs and a GPU each" in done.stdout


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
