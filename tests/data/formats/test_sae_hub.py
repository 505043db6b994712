"""SAEs by name: what is fetched of a repository, with the hub's own library asked and a folder on this machine in its place."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tests.data.formats.foreign_saes import KINDS

from sarm.data.formats.sae_hub import fetch_sae
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae
from sarm.stages.convert_sae import convert_sae


class Hub:
    """Stands in for the hub: copies what the patterns name, as `snapshot_download` does, and remembers what it was asked for."""

    def __init__(self, cache: Path, repository: Path):
        self.cache, self.repository, self.asked = cache, repository, []

    def __call__(self, name: str, *, revision: str, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None) -> str:  # fmt: skip
        self.asked.append((name, revision))
        snapshot = self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0f"
        for path in self.repository.rglob("*"):
            inside = path.relative_to(self.repository).as_posix()
            is_wanted = allow_patterns is None or any(fnmatch.fnmatch(inside, one) for one in allow_patterns)
            if path.is_file() and is_wanted and not any(fnmatch.fnmatch(inside, one) for one in ignore_patterns or ()):
                (snapshot / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / inside)
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    (tmp_path / "repository").mkdir()
    made = Hub(tmp_path / "cache", tmp_path / "repository")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    return made


def named(hub: Hub, kind: str, repository: str) -> Path:
    """A published SAE of this kind in the repository; its name."""
    written = KINDS[kind].write(hub.repository.parent / "written")
    # What the generated file's path says of the repository, the name says here.
    root = next((p for p in written.parents if p.name == "0f"), hub.repository.parent / "written")
    shutil.copytree(root, hub.repository, dirs_exist_ok=True)
    return Path(f"hf:{repository}/{written.relative_to(root).as_posix()}")


@pytest.mark.parametrize(
    ("kind", "repository"),
    [
        ("Gemma Scope", "google/gemma-scope-2b-pt-res"),
        ("sparsify", "EleutherAI/sae-pythia-70m"),
        ("BatchTopKSAE, of a block's input", "someone/dictionaries"),
        ("SAELens 6, gated", "someone/saes"),
    ],
)
def test_a_named_sae_is_the_one_of_its_folder(kind, repository, hub, tmp_path):
    source = named(hub, kind, repository)
    (hub.repository / "layer_9" / "other").mkdir(parents=True)
    (hub.repository / "layer_9" / "other" / "huge.safetensors").write_text("not fetched")
    if source.as_posix() == f"hf:{repository}/.":
        source = Path(f"hf:{repository}")
    convert_sae(ConvertSae(source=source, target=tmp_path / "out"))
    assert (tmp_path / "out" / "cfg.json").exists()
    assert hub.asked == [(repository, "main")]
    assert not list(hub.cache.rglob("huge.safetensors"))


def test_a_revision_is_asked_for(hub):
    (hub.repository / "a").mkdir()
    (hub.repository / "a" / "cfg.json").write_text("{}")
    assert fetch_sae(Path("hf:o/n@v1.2/a")).name == "a"
    assert hub.asked == [("o/n", "v1.2")]


@pytest.mark.parametrize("name", ["hf:", "hf:one", "hf:o/n/../../etc", "hf:o/n@/x"])
def test_a_name_that_is_none_is_refused(name, hub):
    with pytest.raises(UserError, match=r"is no name of an SAE. Pass hf:OWNER/NAME/FOLDER") as error:
        fetch_sae(Path(name))
    assert "\n" not in str(error.value)
    assert hub.asked == []


def test_what_the_hub_lacks_or_refuses_is_said_in_one_line(hub, monkeypatch):
    with pytest.raises(UserError, match="o/n holds no layer_3"):
        fetch_sae(Path("hf:o/n/layer_3"))

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("401\nmany\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched \(OSError: 401\)") as error:
        fetch_sae(Path("hf:o/n/layer_3"))
    assert "\n" not in str(error.value)
