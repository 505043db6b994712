"""Kills while a pass runs on a cluster of three nodes: nothing may be lost, doubled or torn, whoever dies.

The whole of it (`make test-chaos`) takes minutes, says what it does and writes outputs/bench/extraction_chaos.json; the suite runs a
short form. The order of the kills, the nodes and the processes come from a seed, and every kill waits until the pass has got on since
the last one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sarm.contracts.ids import stable_int
from sarm.contracts.tables import CORPUS_TABLE
from sarm.data.store.activations import vectors
from sarm.data.store.parts import audit, part_files

ROOT = Path(__file__).parents[2]
# Deaths are seen after seconds instead of half a minute.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}
_NODE = {"object_store_memory": 100_000_000, "include_dashboard": False}
_SECONDS_FOR_PROGRESS = 400
# Of each text.
SENTENCES = 9


class ThreeNodes:
    """A head and two worker nodes on this machine, of which the workers may die."""

    def __init__(self, seed: int):
        from ray.cluster_utils import Cluster

        self._random = random.Random(seed)
        self._cluster = Cluster(
            initialize_head=True,
            connect=False,
            head_node_args={"num_cpus": 1, "_system_config": _HEALTH, **_NODE},
        )
        self._workers = [self._add(), self._add()]

    @property
    def address(self) -> str:
        return self._cluster.address

    def _add(self):
        return self._cluster.add_node(num_cpus=2, **_NODE)

    def raylet(self) -> None:
        """A worker node dies at once, and another takes its place."""
        node = self._random.choice(self._workers)
        os.kill(_raylet_pid(node), signal.SIGKILL)
        self._replace(node)

    def frozen(self) -> None:
        """A worker node says nothing for longer than it is waited for, while its processes go on, and then comes back."""
        node = self._random.choice(self._workers)
        pid = _raylet_pid(node)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(8)
        os.kill(pid, signal.SIGCONT)
        self._replace(node)

    def actor(self) -> bool:
        """One of the processes that compute dies."""
        found = [
            child.pid
            for node in self._workers
            for child in psutil.Process(_raylet_pid(node)).children(recursive=True)
            if "BlockActor" in " ".join(child.cmdline())
        ]
        if found:
            os.kill(self._random.choice(sorted(found)), signal.SIGKILL)
        return bool(found)

    def stop(self) -> None:
        self._cluster.shutdown()

    def _replace(self, node) -> None:
        self._workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self._workers.append(self._add())


def _raylet_pid(node) -> int:
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    return node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid


class Driver:
    """The process that runs the pass; started again until it ends well."""

    def __init__(self, address: str, folder: Path):
        self._command = [sys.executable, str(ROOT / "tests" / "chaos" / "driver.py"), address, str(folder)]
        self._log, self.starts = folder / "driver.log", 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.start()

    def ended(self) -> int | None:
        return self._process.poll()

    def wait(self) -> None:
        """Until the pass is done; a driver that gives up is started again, twice at most."""
        for _ in range(3):
            if self._process.wait(timeout=400) == 0:
                return
            self.start()
        raise AssertionError(self.said()[-3000:])

    def said(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def write_corpus(folder: Path, num_texts: int) -> None:
    texts = [f"Text {i} begins here. " + f"It goes on for sentence {i}. " * (SENTENCES - 1) for i in range(num_texts)]
    rows = {"row_id": [stable_int(t) for t in texts], "text": texts, "source": ["chaos"] * num_texts}
    pq.write_table(pa.table(rows, schema=CORPUS_TABLE), folder / "corpus.parquet", row_group_size=50)


def disturb(folder: Path, kills: list[str], num_texts: int, seed: int, *, rerun: bool) -> dict[str, object]:
    """Run the pass under kills until it is done, and with `rerun` once more when it is; what was done and what it took."""
    write_corpus(folder, num_texts)
    cluster = ThreeNodes(seed)
    driver = Driver(cluster.address, folder)
    log, started = [], time.monotonic()

    def parts() -> int:
        return len(part_files(folder / "out"))

    try:
        for kill in kills:
            goal, limit = parts() + 2, time.monotonic() + _SECONDS_FOR_PROGRESS
            while parts() < goal:
                assert time.monotonic() < limit, f"no progress before {kill}: {log}\n{driver.said()[-2000:]}"
                assert driver.ended() in (None, 1), driver.said()[-2000:]
                if driver.ended() is not None:
                    driver.start()
                time.sleep(0.1)
            if kill == "driver":
                driver.kill()
            elif kill == "actor":
                while not cluster.actor():
                    assert time.monotonic() < limit, "no actor to kill"
                    time.sleep(0.1)
            else:
                getattr(cluster, kill)()
            log.append({"kill": kill, "at_seconds": round(time.monotonic() - started, 1), "blocks_done": parts()})
            print(f"{log[-1]['at_seconds']:7.1f} s  {kill:<8}{parts():5} blocks are done", flush=True)
        driver.wait()
        outcome = {"seconds": round(time.monotonic() - started, 1), "driver_starts": driver.starts}
        if rerun:
            again = time.monotonic()
            driver.start()
            driver.wait()
            outcome["rerun_seconds"] = round(time.monotonic() - again, 1)
    finally:
        driver.stop()
        cluster.stop()
    return {"seed": seed, "texts": num_texts, "blocks": parts(), **outcome, "kills": log}


def differences(folder: Path) -> dict[str, int]:
    """What the disturbed pass left, compared with what one process computes, row by row: all but `rows` should be 0."""
    from tests.chaos.driver import TARGET, make_pass, row_ids

    work = make_pass(folder)
    output = work.outputs[TARGET].folder
    torn = len({path.name for path in output.iterdir()} - {path.name for path in part_files(output)})
    tables = []
    for path in part_files(output):
        try:
            tables.append(pq.read_table(path, page_checksum_verification=True))
        except (OSError, pa.ArrowException):
            torn += 1
    found = pa.concat_tables(tables)
    actor = work.actor.__mro__[1](**work.arguments, threads=1)
    wanted = actor.compute(actor.prepare(pq.read_table(folder / "corpus.parquet")), lambda: None)[0][TARGET]
    own, alone = _by_key(found), _by_key(wanted)
    counts = Counter(key for key, _ in own)
    expected = dict(alone)
    wrong = sum(
        token != expected[key][0] or bool((vector.float() - expected[key][1].float()).abs().max() > 5e-3)
        for key, (token, vector) in own
        if key in expected
    )
    if not torn:
        audit(output, work.blocks, ["row_id"], row_ids, "row_id", ["side", "position"])
    return {
        "rows": found.num_rows,
        "lost": len(expected.keys() - counts.keys()),
        "duplicated": found.num_rows - len(counts),
        "foreign": len(counts.keys() - expected.keys()),
        "torn": torn,
        "wrong": wrong,
    }


def _by_key(table: pa.Table) -> list[tuple[tuple[int, int], tuple[int, torch.Tensor]]]:
    columns = [table.column(name).to_pylist() for name in ("row_id", "position", "token_id")]
    x_ND = vectors(table, "float16")
    return [((row, place), (token, x_ND[i])) for i, (row, place, token) in enumerate(zip(*columns, strict=True))]


def nothing_amiss(rows: int) -> dict[str, int]:
    return {"rows": rows, "lost": 0, "duplicated": 0, "foreign": 0, "torn": 0, "wrong": 0}


@pytest.mark.skipif("SARM_CHAOS" in os.environ, reason="the short form, of `make test`: the next one holds it")
@pytest.mark.usefixtures("private_cluster")
def test_a_killed_actor_and_a_killed_driver_lose_nothing(tmp_path):
    disturb(tmp_path, ["actor", "driver"], num_texts=60, seed=1, rerun=False)
    assert differences(tmp_path) == nothing_amiss(60 * SENTENCES)


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
@pytest.mark.usefixtures("private_cluster")
def test_many_kills_lose_nothing(tmp_path):
    seed = int(os.environ["SARM_CHAOS"] or 1)
    kills = ["raylet"] * 3 + ["actor"] * 3 + ["frozen"] * 2 + ["driver"] * 3
    random.Random(seed).shuffle(kills)
    print(f"\nseed {seed}: {' '.join(kills)}", flush=True)
    outcome = disturb(tmp_path, kills, num_texts=900, seed=seed, rerun=True)
    found = differences(tmp_path)
    out = ROOT / "outputs" / "bench" / "extraction_chaos.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(outcome | found, indent=2))
    table = {name: value for name, value in (outcome | found).items() if name != "kills"}
    print("\n".join(f"{name:<16}{value}" for name, value in table.items()) + f"\nwritten to {out}", flush=True)
    assert found == nothing_amiss(900 * SENTENCES)
    assert outcome["rerun_seconds"] < 10
