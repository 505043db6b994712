"""Jobs through `ray job submit`, from a working directory, on a cluster started for it, which asks for a token as those of cluster/ do."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")
# New each time: this file travels to the cluster, where nothing may hold it.
TOKEN = os.urandom(16).hex()
TEMPORARY = Path(f"/tmp/sarm-ray-{os.getpid()}")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range that Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def with_token(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of who may use the cluster."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, with_token: dict[str, str]) -> Iterator[str]:
    """Address of the jobs server of a one-node cluster, ended by its process group."""
    gcs, dashboard, agent, grpc_agent, client = free_ports(5)
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc_agent}",
        f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir={TEMPORARY}",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=with_token, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while asked("GET", f"{address}/api/jobs/", TOKEN) != 200:
            assert head.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def asked(method: str, url: str, token: str | None) -> int:
    """Status of a request, 0 where nobody answers."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    data = b"{}" if method in ("POST", "PUT") else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def submit(cluster: str, with_token: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as the README writes it, with this Python."""
    line = [
        RAY,
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        ".",
        "--runtime-env",
        "cluster/runtime_env.yaml",
    ]
    return subprocess.run(
        [*line, "--", *command], cwd=ROOT, capture_output=True, text=True, env=with_token, timeout=280, check=False
    )


def test_driver_and_workers_import_the_package_that_travelled(
    cluster: str, with_token: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "where.py"
    script.write_text(
        "import ray, sarm\n"
        "ray.init()\n"
        "print('at', sarm.__file__, ray.get(ray.remote(lambda: __import__('sarm').__file__).remote()))\n"
    )
    done = submit(cluster, with_token, sys.executable, str(script))
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    assert line.count("working_dir_files") == 2, line


def test_a_submitted_job_trains_on_the_cluster(
    cluster: str, with_token: dict[str, str], finished: Path, tmp_path: Path, mlflow_db: Path
) -> None:
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    out = tmp_path / "submitted"
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation"):
        shutil.rmtree(out / stage)
    done = submit(
        cluster, with_token, sys.executable, "jobs/train_sarm.py", "tiny", "--out", str(out), "--cpus-per-worker", "1",
        "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    weights = "model.safetensors"
    alone, submitted = (load_file(folder / "sarm" / weights) for folder in (finished, out))
    assert alone.keys() == submitted.keys()
    assert all(torch.equal(alone[name], submitted[name]) for name in alone), "the same seed, the same weights"


def mutating_endpoints() -> list[tuple[str, str]]:
    """Every route of the dashboard's head that changes something, as Ray's own source declares them."""
    folder = Path(ray.__file__).parent / "dashboard"
    found = []
    for path in sorted(folder.rglob("*.py")):
        if "agent" in path.name or "/tests/" in str(path):
            continue
        declared = re.findall(r"routes\.(post|put|delete|patch)\(\s*\"([^\"]+)\"", path.read_text())
        found += [(method.upper(), re.sub(r"\{\w+\}", "gcs", route)) for method, route in declared]
    return sorted(set(found))


def test_no_endpoint_that_changes_something_answers_without_the_token(cluster: str) -> None:
    endpoints = mutating_endpoints()
    assert {("POST", "/api/jobs/"), ("POST", "/api/jobs/gcs/stop"), ("DELETE", "/api/jobs/gcs")} <= set(endpoints)
    # Where a browser hands in the token it has; it answers 401 to none and 403 to a wrong one as well.
    for method, route in endpoints:
        assert asked(method, cluster + route, None) == 401, (method, route)
        assert asked(method, cluster + route, "wrong") == 403, (method, route)
    assert asked("GET", f"{cluster}/api/jobs/", None) == 401
    assert asked("GET", f"{cluster}/api/jobs/", "wrong") == 403
    assert asked("POST", f"{cluster}/api/jobs/", TOKEN) not in (0, 401, 403), "the right one is let in"
    leaked = [path for path in TEMPORARY.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert leaked == []
