"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge, that can be cut off one by one. Needs root."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO


def why_not() -> str:
    """Why this machine has no namespaces to give; empty if it has."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"no network namespaces here: {made.stderr.decode().strip()}"


# What runs on a host sees a folder of its own in the place of the one that it would share with the others.
_WITH_OWN_FOLDER = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


class Hosts:
    """Namespaces `NAME1`, `NAME2` ... with addresses `NET.1`, `NET.2` ...; what runs in them ends with `close`.

    Their file system is one, but each has its own `temporary`, of which `root` holds the contents.
    """

    def __init__(self, count: int, temporary: Path, root: Path):
        self._temporary, self._root = temporary, root
        # Names and addresses of this process alone, within what interfaces may be called.
        self._tag = f"s{os.getpid() % 100_000}"
        self._net = f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 250}"
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def address(self, host: int) -> str:
        """Of host 1, 2 ..."""
        return f"{self._net}.{host}"

    def open(self) -> None:
        """Make them; raises CalledProcessError where that is refused."""
        self._temporary.mkdir()
        for host in range(1, self._count + 1):
            self._own(host).mkdir()
        bridge = f"{self._tag}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in range(1, self._count + 1):
            name, cable = self._name(host), self._cable(host)
            _ip("netns", "add", name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", cable, "master", bridge, "up")
            for inside in (
                ("addr", "add", f"{self.address(host)}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
                ("route", "add", "default", "via", f"{self._net}.254"),
            ):
                _ip("-n", name, *inside)

    def command(self, host: int, *command: str) -> list[str]:
        """A command line that runs on a host."""
        mounted = ["sh", "-c", _WITH_OWN_FOLDER, "sh", str(self._own(host)), str(self._temporary)]
        return ["ip", "netns", "exec", self._name(host), *mounted, *command]

    def start(
        self, host: int, command: Sequence[str], log: IO[bytes], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """A process of a host, in a group of its own."""
        process = subprocess.Popen(
            self.command(host, *command), stdout=log, stderr=log, env=environment, start_new_session=True
        )
        self._processes.append(process)
        return process

    @contextlib.contextmanager
    def cut_off(self, host: int) -> Iterator[None]:
        """Nothing reaches the host, and it reaches nobody, while the body runs."""
        _ip("link", "set", self._cable(host), "down")
        try:
            yield
        finally:
            _ip("link", "set", self._cable(host), "up")

    def pids(self, host: int) -> list[int]:
        """All processes on a host."""
        found = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def close(self) -> None:
        """End everything that runs in them, and remove them."""
        for signal_number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 1.0)):
            for host in range(1, self._count + 1):
                for pid in self.pids(host):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal_number)
            time.sleep(seconds)
        for process in self._processes:
            process.wait(timeout=30)
        for host in range(1, self._count + 1):
            subprocess.run(["ip", "netns", "del", self._name(host)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._tag}b"], check=False, capture_output=True)
        self._temporary.rmdir()

    def _own(self, host: int) -> Path:
        return self._root / f"temporary-{host}"

    def _name(self, host: int) -> str:
        return f"{self._tag}n{host}"

    def _cable(self, host: int) -> str:
        return f"{self._tag}v{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def token(folder: Path) -> dict[str, str]:
    """A new cluster token in a file that only its owner reads, as environment variables for every process of the cluster."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex())
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "RAY_USAGE_STATS_ENABLED": "0"}
