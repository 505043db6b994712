"""The tutorials run. `make test-tutorials` runs all cells, in Jupyter's kernel, and what they show has to be what they print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tutorials import (
    FOLDER,
    KEPT_ON,
    NAMES,
    SLOW,
    VARIES,
    code_of,
    differences,
    environment,
    faults,
    has_tag,
    printed,
    processor,
    read,
)

IN_FULL = os.environ.get("SARM_TUTORIALS", "")


@pytest.fixture(scope="module")
def work(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the first tutorial makes: the finished run stands in for it."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "outputs").mkdir()
    (folder / "outputs" / "tiny").symlink_to(finished)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_cells_of_a_tutorial_run_and_print_where_they_printed(name: str, work: Path) -> None:
    command = [sys.executable, "-m", "tests.tutorials", str(work), "--plainly", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(work), timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    now = json.loads(done.stdout.splitlines()[-1])
    cells = code_of(read(name))
    assert [text is None for text in now] == [has_tag(cell, SLOW) for cell in cells]
    assert faults(name, now, compares=False) == []


@pytest.mark.skipif(not IN_FULL, reason="make test-tutorials sets up Jupyter's kernel, and trains")
def test_all_cells_of_all_tutorials_run_in_a_kernel_and_print_what_they_show(tmp_path: Path, ray_logs: Path) -> None:
    told = {**environment(tmp_path), "RAY_TMPDIR": str(ray_logs)}
    command = [sys.executable, "-m", "tests.tutorials", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=told, timeout=5400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{name}: as it was kept" for name in NAMES]


def test_every_tutorial_is_listed_and_shows_real_output() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        for cell in code_of(read(name)):
            says = re.search(r"print\(|^!|\.show\(", "".join(cell["source"]), re.MULTILINE)
            assert has_tag(cell, SLOW) or bool(printed(cell)) == bool(says), "".join(cell["source"])
            assert {output["output_type"] for output in cell["outputs"]} <= {"stream"}, name
            assert "/tmp/" not in printed(cell), name


def test_outputs_differ_by_a_word_or_a_figure_and_not_by_a_rounding_or_a_column() -> None:
    assert differences("reward   +0.498\n", "reward +0.4981") == []
    assert differences("a −1.50 b", "a −1.51 b") == []
    assert differences("reward +0.498", "reward -0.498")
    assert differences("reward +0.5", "rewards +0.5")
    assert differences("120 pairs", "119 pairs") == []
    assert differences("120 pairs", "110 pairs")
    assert differences("one\ntwo", "one")


def test_elsewhere_cells_have_to_print_where_they_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = code_of(read(NAMES[0]))
    kept = [printed(cell) for cell in cells]
    assert faults(NAMES[0], list(kept)) == []
    place = next(i for i, text in enumerate(kept) if text.strip() and not has_tag(cells[i], VARIES))
    others = [f"something else\n{text}" if i == place else text for i, text in enumerate(kept)]
    monkeypatch.setattr("tests.tutorials.processor", lambda: read(NAMES[0])["metadata"][KEPT_ON])
    assert faults(NAMES[0], others)
    assert faults(NAMES[0], others, compares=False) == []
    monkeypatch.setattr("tests.tutorials.processor", lambda: "another one")
    assert faults(NAMES[0], others) == []
    assert faults(NAMES[0], ["" if i == place else text for i, text in enumerate(kept)])


def test_every_notebook_says_where_it_was_run() -> None:
    assert all(read(name)["metadata"][KEPT_ON].strip() for name in NAMES)
    assert processor().strip()
