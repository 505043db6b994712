"""A cluster of one node that asks for a token, started in a folder as a user starts it there."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_head(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Start a head in `folder`; yields the environment of whoever submits jobs to it, and ends it by its process group."""
    token = os.urandom(16).hex()
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    asked = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    gcs, dashboard, agent, grpc_agent, client = _free_ports(5)
    with tempfile.TemporaryDirectory(prefix="sarm-ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc_agent}",
            f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir={temporary}",
        ]  # fmt: skip
        with (folder / "head.log").open("w") as log:
            head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment | asked, cwd=folder, start_new_session=True)  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + 90
            while not _answers(address, token):
                assert head.poll() is None, (folder / "head.log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "head.log").read_text()[-2000:]
                time.sleep(0.5)
            yield {**asked, "RAY_API_SERVER_ADDRESS": address}
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(timeout=60)


def _answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
