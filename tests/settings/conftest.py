from pathlib import Path

import pytest


@pytest.fixture
def in_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a job that was submitted with a working directory."""
    package = tmp_path / "ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.delenv("SARM_RESULTS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return package
