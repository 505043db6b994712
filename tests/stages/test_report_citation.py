"""What a report's citation names, read from finished folders."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from sarm import __version__
from sarm.contracts.folders import CORPUS_FOLDER, EVALUATION_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SARM_FOLDER, Folders
from sarm.contracts.manifest import Manifest, StageFolder, read_manifest, sha256_of
from sarm.stages.report_citation import citation_of

COMMAND = "sarm pipeline demo --out here"
_MADE = {
    "corpus": (CORPUS_FOLDER, {"texts": ["hf:o/texts", "own.txt"]}),
    "pairs": (PAIRS_FOLDER, {"pairs": ["hf:o/pairs"]}),
    "sae": (SAE_FOLDER, {"seed": 3}),
    "sarm": (SARM_FOLDER, {"seed": 3}),
    "evaluation": (EVALUATION_FOLDER, {}),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for name, (schema, config) in _MADE.items():
        folder = StageFolder(tmp_path / "run" / name, schema, config)
        folder.claim()
        if name == "evaluation":
            folder.note(command=COMMAND)
        folder.finish({})
    return tmp_path / "run"


def manifests_of(out: Path) -> dict[str, Manifest]:
    return {name: read_manifest(out / name, schema) for name, (schema, _) in _MADE.items() if (out / name).exists()}


def test_a_citation_names_the_run_its_code_its_data_and_the_command_that_made_it(out: Path) -> None:
    manifests = manifests_of(out)
    cited = citation_of("run", Folders(out), manifests)
    assert (cited.date, cited.version, cited.seed, cited.command) == (manifests["evaluation"].created[:10], __version__, 3, COMMAND)  # fmt: skip
    assert cited.sources == {"preferences": "hf:o/pairs", "texts": "hf:o/texts, own.txt"}
    names = {"model": "sarm", "dictionary": "sae", "preferences": "pairs", "texts": "corpus"}
    assert cited.manifests == {told: sha256_of(out / name / "manifest.json") for told, name in names.items()}


def test_a_moved_run_another_command_and_another_day_change_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cited = citation_of("run", Folders(out), manifests_of(out))
    moved = out.rename(out.with_name("moved"))
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", "demo", "--redo-from", "feature_pages"])
    assert citation_of("run", Folders(moved), manifests_of(moved)) == cited


def test_what_a_run_does_not_have_is_left_out(out: Path) -> None:
    """A dictionary from elsewhere has no texts, code outside of a checkout no commit, an evaluation of before no command."""
    shutil.rmtree(out / "corpus")
    for name in ("sarm", "sae", "pairs", "evaluation"):
        (out / name / "stage.json").write_text(json.dumps({"notes": {}}))
        content = json.loads((out / name / "manifest.json").read_text())
        content.pop("checksum")
        (out / name / "manifest.json").write_text(json.dumps({**content, "git_commit": "unknown"}))
    rows = citation_of("run", Folders(out), manifests_of(out)).rows()
    assert not {"code", "texts", "command", "texts: manifest (SHA-256)"} & rows.keys()
