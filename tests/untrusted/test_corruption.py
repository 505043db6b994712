"""Damaged artifacts are noticed before they are used: the short form of `tests/bench/bench_corruption.py`."""

import shutil
from pathlib import Path

import pytest
from tests.untrusted.corruption import ARTIFACTS, KINDS, damage
from tests.untrusted.small_run import STATES

from sarm.contracts.manifest import read_manifest, verify_files
from sarm.data.store.checkpoints import Checkpoints
from sarm.settings.checks import UserError


def test_no_random_damage_goes_unnoticed_and_the_state_before_is_used(small_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    assert not any(artifact.is_refused(run / artifact.folder) for artifact in ARTIFACTS), "what is whole is used"
    tried, missed = damage(run, 2 * len(ARTIFACTS) * len(KINDS), seed=1)
    assert missed == []
    assert set(tried.values()) == {2}
    assert not any(artifact.is_refused(run / artifact.folder) for artifact in ARTIFACTS), "and is whole again"
    assert Checkpoints(run / "training" / "sarm", STATES).latest().step == 2


def test_a_manifest_that_says_something_else_is_not_believed(small_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run / "pairs", tmp_path / "pairs"))
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    (rows,) = [line for line in text.splitlines() if '"rows":' in line]
    manifest.write_text(text.replace(rows, rows.replace(":", ": 1", 1).replace(" 1 ", " 1")))
    with pytest.raises(UserError, match="has changed since it was written"):
        read_manifest(folder, "pairs/v1")


def test_data_that_no_stage_wrote_is_not_read(small_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run / "pairs", tmp_path / "pairs"))
    found = read_manifest(folder, "pairs/v1")
    (folder / "notes.txt").write_text("mine")
    verify_files(folder, found)
    shutil.copyfile(folder / "part-00000.parquet", folder / "part-00001.parquet")
    with pytest.raises(UserError, match=r"part-00001\.parquet is not of this folder"):
        verify_files(folder, found)
