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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

RAY = str(Path(sys.executable).parent / "ray")


class Head(NamedTuple):
    """A running cluster."""

    address: str
    """Of its jobs server."""
    gcs: str
    """Where drivers join it."""
    token: str
    """Made for this cluster: what travels to it must not hold it."""
    temporary: Path
    """Ray's temporary folder."""
    environment: dict[str, str]
    """Of whoever submits jobs to it."""

    def run(self, line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """A line as its user types it, in a shell of theirs that knows the cluster."""
        return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=self.environment | environment, timeout=900, check=False)  # fmt: skip


@contextlib.contextmanager
def running_head(
    folder: Path,
    environment: dict[str, str],
    started_in: Path | None = None,
    num_cpus: int = 4,
    gcs: int = 0,
    more: Sequence[str] = (),
) -> Iterator[Head]:
    """Start a head, whose log and token are in `folder`, and end it by its process group; `gcs` is its port, `more` are flags of `ray start`."""
    token = os.urandom(16).hex()
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    environment = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    dashboard, agent, grpc_agent, client, free = free_ports(5)
    gcs = gcs or free
    with tempfile.TemporaryDirectory(prefix="sarm-ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        command = [
            RAY, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc_agent}",
            f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir={temporary}", *more,
        ]  # fmt: skip
        with (folder / "head.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=started_in or folder, start_new_session=True)  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + 400
            while asked("GET", f"{address}/api/jobs/", token) != 200:
                assert process.poll() is None, (folder / "head.log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "head.log").read_text()[-2000:]
                time.sleep(0.5)
            yield Head(
                address, f"127.0.0.1:{gcs}", token, Path(temporary), environment | {"RAY_API_SERVER_ADDRESS": address}
            )
        finally:
            # Nodes that an autoscaler started are in no group of ours; they name this cluster's folder.
            others = [
                one for one in psutil.process_iter(["cmdline"]) if temporary in " ".join(one.info["cmdline"] or [])
            ]
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=300)
            for one in others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


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


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range that Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
