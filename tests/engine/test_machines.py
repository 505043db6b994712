"""Machines as people have them: long temporary folders, a home that cannot be written, no network, paths with spaces and letters of any script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hosts.namespaces import why_not

from sarm.data.sources.cache import build_once
from sarm.engine.ray import temporary
from sarm.engine.ray.temporary import short_folder, token_without_home
from sarm.settings.checks import UserError

ROOT = Path(__file__).parents[2]
SOCKET = "session_2026-11-29_17-56-13_171368_4194304/sockets/plasma_store"


@pytest.mark.parametrize("own", ["/tmp", "/scratch/job-1", "/scratch/" + "u" * 15, "/scratch/" + "u" * 20, "/local/" + "x" * 130, "/scratch/" + "ü数" * 8])  # fmt: skip
def test_sockets_have_room_whatever_the_temporary_folder_is(monkeypatch, own):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", own)
    with short_folder() as folder:
        place = f"{own}/ray" if folder is None else folder
        assert len(f"{place}/{SOCKET}".encode()) <= 107
        assert folder is None or Path(folder).is_dir()
    assert folder is None or not Path(folder).exists()
    assert (folder is None) == (len(own.encode()) <= 30)


def test_without_a_short_folder_the_reason_and_the_variable_are_named(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/local/" + "x" * 130)
    monkeypatch.setattr(temporary, "_SHORT", ("/proc/none",))
    with pytest.raises(UserError, match=r"is too long for Ray's sockets.*Set RAY_TMPDIR"), short_folder():
        pass


def alone(*command: str) -> list[str]:
    """The command in a network namespace that has this machine's own addresses and no others."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing of the user's: a home that nobody can write, not even root, a long temporary folder, a cache with a name of two scripts."""
    long = tmp_path / ("job-" + "x" * 90) / ("node-" + "y" * 60)
    long.mkdir(parents=True)
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    home = {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody/.cache", "TMPDIR": str(long)}
    return kept | home | {"SARM_CACHE": str(tmp_path / "mein Speicher 缓存"), "PYTHONPATH": str(ROOT / "platform")}


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        alone(sys.executable, *arguments),
        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces are here")
def test_a_job_on_a_cluster_of_its_own_runs_on_such_a_machine(tmp_path):
    """Text windows, activations of a model that is built on the spot, Ray Data actors and MLflow, all offline."""
    out = tmp_path / "Läufe und mehr 数据" / "first run"
    done = run(tmp_path, "jobs/extract_activations.py", "tiny", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert list(out.glob("activations/*/manifest.json"))
    assert not list((tmp_path / ("job-" + "x" * 90)).rglob("session_*")), "Ray's sockets are elsewhere"


def test_a_home_that_cannot_be_written_leaves_a_token_in_the_environment_alone(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    with token_without_home():
        first = os.environ["RAY_AUTH_TOKEN"]
    assert "RAY_AUTH_TOKEN" not in os.environ
    with token_without_home():
        assert len(first) == len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert os.environ["RAY_AUTH_TOKEN"] != first
    monkeypatch.setenv("HOME", str(tmp_path))
    with token_without_home():
        assert "RAY_AUTH_TOKEN" not in os.environ, "Ray writes its own there"


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch):
    monkeypatch.delenv("SARM_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.raises(UserError, match=r"cannot be written .*Set SARM_CACHE to a folder that can") as refused:
        build_once("anything", lambda folder: None)
    assert "\n" not in str(refused.value)
