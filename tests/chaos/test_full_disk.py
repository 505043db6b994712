"""A pipeline on a disk that fills, twice: one line each time, nothing that looks finished and is not, and with room it ends as any other."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.trainings import is_same_model

from sarm.contracts.manifest import MANIFEST, parse_manifest, verify_files

pytestmark = pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
# Of about 2 MB in all: the first fills while activations are written, the second while something learns from them.
_KILOBYTES = (150, 650)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a few kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = _mount(folder, f"size={_KILOBYTES[0]}k")
    if mounted.returncode:
        pytest.skip(f"no disks can be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stages(out: Path) -> set[str]:
    """The folders that look finished."""
    return {path.parent.relative_to(out).as_posix() for path in out.rglob(MANIFEST)}


def test_a_disk_that_fills_tears_nothing(finished: Path, disk: Path, run_job, tmp_path: Path) -> None:
    out = disk / "tiny"
    arguments = ("tiny", "--out", out, "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db")
    reached = []
    for kilobytes in _KILOBYTES:
        assert _mount(disk, f"remount,size={kilobytes}k").returncode == 0
        done = run_job("pipeline", *arguments)
        assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
        assert "No space left on device" in done.stderr.splitlines()[-1], done.stderr[-2000:]
        reached.append(stages(out))
        for stage in reached[-1]:
            verify_files(out / stage, parse_manifest((out / stage / MANIFEST).read_bytes()))
        print(f"{kilobytes} kB, {shutil.disk_usage(disk).free} bytes free: {sorted(reached[-1])}")
    assert reached[0] < reached[1] < stages(finished)
    assert _mount(disk, "remount,size=64m").returncode == 0
    for job in ("train_sae", "train_sarm"):
        done = run_job(job, *arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert is_same_model(finished, out)
