"""Jobs through `ray job submit`, from a working directory, on a cluster started for it, which asks for a token as those of cluster/ do."""

import contextlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
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
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    home = tmp_path_factory.mktemp("home")
    return {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "SARM_RESULTS", "MLFLOW_TRACKING_URI")},
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": path, "HOME": str(home),
    }  # fmt: skip


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of this repository."""
    folder = tmp_path_factory.mktemp("clone") / "sarm"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, with_token: dict[str, str], clone: Path) -> Iterator[str]:
    """Address of the jobs server of a one-node cluster, started in a checkout, and ended by its process group."""
    gcs, dashboard, agent, grpc_agent, client = free_ports(5)
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc_agent}",
        f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir={TEMPORARY}",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(
            command, cwd=clone, stdout=out, stderr=subprocess.STDOUT, env=with_token, start_new_session=True
        )
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
    for stage in ("sarm", "evaluation", "contexts", "features"):
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


def in_shell(line: str, address: str, with_token: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A line as its user types it, in a shell of theirs that knows the cluster."""
    environment = {**with_token, "RAY_API_SERVER_ADDRESS": address}
    return subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, env=environment, timeout=900, check=False
    )


def place_of(said: str) -> Path:
    """Where a job says that its results are, the same at its start and its end."""
    (place,) = set(re.findall(r"^results  (\S+) on", said, flags=re.M))
    # The checkout's own outputs are what `make ui` opens by itself.
    is_default = Path(place).parts[-2] == "outputs"
    command = "make ui" if is_default else f"make ui OUTPUTS={Path(place).parent}"
    assert said.count(f"mlflow   {command}\n") == 2, said[-2000:]
    return Path(place)


def test_the_readme_s_line_from_a_clean_clone_leaves_its_model_in_the_home_folder(
    cluster: str, with_token: dict[str, str], clone: Path
) -> None:
    (line,) = re.findall(r"^(ray job submit .*runtime_env.*)$", (clone / "README.md").read_text(), flags=re.M)
    assert line.endswith("-- python jobs/train_sarm.py demo")
    # Only shorter: the preset for tests.
    line = line.removesuffix("demo") + "tiny"
    done = in_shell(line, cluster, with_token, clone)
    assert done.returncode == 0, done.stdout[-4000:]
    place = place_of(done.stdout)
    assert place == Path(with_token["HOME"]) / "sarm-outputs" / "tiny"
    assert load_file(place / "sarm" / "model.safetensors")
    assert (place.parent / "mlflow.db").exists()
    assert not list(TEMPORARY.rglob("mlflow.db")), "nothing is left in Ray's temporary folder"
    assert not (clone / "outputs").exists()
    started = time.monotonic()
    again = in_shell(line, cluster, with_token, clone)
    print(f"the second time: {time.monotonic() - started:.1f} s")
    assert again.returncode == 0, again.stdout[-4000:]
    assert f"train_sarm: already done, {place / 'sarm'}" in again.stdout


def test_the_short_form_writes_to_the_checkout_that_the_head_was_started_in(
    cluster: str, with_token: dict[str, str], clone: Path, tmp_path: Path
) -> None:
    done = in_shell("ray job submit -- python jobs/prepare_data.py tiny", cluster, with_token, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert place_of(done.stdout) == clone / "outputs" / "tiny"
    assert (clone / "outputs" / "tiny" / "pairs" / "manifest.json").exists()
    shutil.rmtree(clone / "outputs")


def until(what: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_whose_client_is_killed_goes_on(cluster: str, with_token: dict[str, str], clone: Path) -> None:
    out = Path(with_token["HOME"]) / "sarm-outputs" / "alone"
    line = [RAY, "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
    client = subprocess.Popen(
        [*line, "--", "python", "jobs/prepare_data.py", "tiny", "--out", "outputs/alone"],
        cwd=clone, env={**with_token, "RAY_API_SERVER_ADDRESS": cluster}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert client.stdout is not None
    assert any("submitted successfully" in said for said in client.stdout)
    client.kill()
    client.wait()
    until((out / "pairs" / "manifest.json").exists)


def drivers(word: str) -> list[psutil.Process]:
    """The processes that do a job's work, not those that watch over them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            line, parent = process.info["cmdline"] or [], process.parent()
            if word in line and "python" in line[0] and parent is not None and word in parent.cmdline():
                found.append(process)
    return found


def test_a_job_whose_driver_is_killed_is_started_again(cluster: str, with_token: dict[str, str], clone: Path) -> None:
    line = "ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py tiny --out outputs/killed"
    killed: list[int] = []

    def kill() -> None:
        until(lambda: drivers("outputs/killed"))
        for process in drivers("outputs/killed"):
            process.kill()
            killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    done = in_shell(line, cluster, with_token, clone)
    thread.join()
    assert done.returncode == 0, done.stdout[-4000:]
    assert killed
    assert "supervisor: killed by SIGKILL; starting again" in done.stdout
    assert (Path(with_token["HOME"]) / "sarm-outputs" / "killed" / "pairs" / "manifest.json").exists()


def test_ray_job_stop_lets_a_training_save_its_state_and_say_what_goes_on(
    cluster: str, with_token: dict[str, str], clone: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(finished, out)
    for stage in ("sarm", "scalar_head", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)
    address = f"--address {cluster}"
    work = f"jobs/train_sarm.py tiny --out {out} --reward.epochs 300 --cpus-per-worker 1"
    line = f"ray job submit {address} --working-dir . --runtime-env cluster/runtime_env.yaml"
    assert in_shell(f"{line} --no-wait --submission-id stopped -- python {work}", cluster, with_token, clone).returncode == 0  # fmt: skip
    logs = f"ray job logs {address} stopped"
    until(lambda: " step " in in_shell(logs, cluster, with_token, clone).stdout)
    in_shell(f"ray job stop {address} stopped", cluster, with_token, clone)
    said = in_shell(logs, cluster, with_token, clone).stdout
    assert f"this command goes on: ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python {work}" in said  # fmt: skip
    assert re.search(r"stopped after step \d+: it was asked to; its state is saved", said)
    assert "Traceback" not in said
    assert list(out.rglob("step-*/manifest.json"))


@pytest.fixture
def stranger() -> Iterator[Callable[[str], str]]:
    """Servers that answer every request with a text; called with it, gives the address."""
    servers = []

    def serve(text: str) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


def test_what_cannot_be_submitted_is_one_line(
    cluster: str, with_token: dict[str, str], clone: Path, tmp_path: Path, stranger: Callable[[str], str]
) -> None:
    (free,) = free_ports(1)
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 32)
    version = f"this project Ray {ray.__version__}"
    cases = [
        (f"http://127.0.0.1:{free}", {}, "no Ray cluster answers at"),
        (cluster, {"RAY_AUTH_TOKEN_PATH": str(wrong)}, "does not accept the token"),
        (cluster, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "this process has no token"),
        (stranger('{"ray_version": "2.9.0"}'), {}, f"runs Ray 2.9.0, and {version}"),
        (stranger("hello"), {}, "is no Ray dashboard"),
    ]
    for address, environment, said in cases:
        line = f"python jobs/prepare_data.py tiny --submit {address}"
        done = in_shell(line, cluster, {**with_token, **environment}, clone)
        assert done.returncode == 2, (said, done.stderr)
        assert said in done.stderr
        assert done.stdout + done.stderr.strip().partition("\n")[2] == "", "one line"


def test_submit_says_where_results_go_and_what_the_cluster_refuses(
    cluster: str, with_token: dict[str, str], clone: Path
) -> None:
    line = f"python jobs/prepare_data.py tiny --submit {cluster}"
    done = in_shell(line, cluster, with_token, clone)
    assert done.returncode == 0, done.stderr
    assert f"\nresults  {with_token['HOME']}/sarm-outputs/tiny on " in done.stdout
    done = in_shell(f"{line} --out /proc/here", cluster, with_token, clone)
    assert done.returncode == 2
    # Above it Ray may say that the package is there already.
    assert done.stderr.strip().splitlines()[-1].startswith("error: /proc"), done.stderr


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
