"""A SARM that was imported says neither its model nor how it was trained: it is read with what it brings."""

from types import SimpleNamespace

import pytest
from tests.stages.random_sarm import random_sarm

from sarm.contracts.folders import SARM_FOLDER
from sarm.contracts.manifest import StageFolder, read_manifest
from sarm.settings.conversion import ConvertSarm
from sarm.settings.extraction import ExtractionSettings
from sarm.stages.convert_sarm import convert_sarm
from sarm.stages.evaluate import reader_of
from sarm.stages.report import _facts


@pytest.fixture
def imported(tmp_path, tiny_folder, tiny_chat):
    source = random_sarm(tmp_path / "source", tiny_folder, tiny_chat)
    convert_sarm(ConvertSarm(source=source, target=tmp_path / "sarm", format="sarm"))
    return tmp_path / "sarm"


def test_an_imported_sarm_is_scored_with_its_own_tokenizer_and_length(imported):
    reader = reader_of(imported, ExtractionSettings(batch_tokens=512))
    assert (reader.settings.name, reader.settings.max_length, reader.tokenizer) == (str(imported), 128, None)
    assert reader.chat.template_hash == reader.model.config.provenance["template"]


def test_a_report_of_an_imported_sarm_says_where_it_is_from(imported, tmp_path):
    manifests = {"sarm": read_manifest(imported, SARM_FOLDER)}
    manifests |= {
        name: SimpleNamespace(config={"d_sae": 96, "k": 6, "heldout_share": 0.1}) for name in ("sae", "pairs")
    }
    facts = _facts(manifests, {"sarm": {}})
    assert facts["model"] == str(tmp_path / "source")
    assert facts["training pairs"] is None


def test_a_trained_sarm_is_scored_as_its_manifest_says(tmp_path, tiny_folder):
    folder = StageFolder(
        tmp_path / "sarm", SARM_FOLDER, {"name": str(tiny_folder), "dtype": "bfloat16", "max_length": 64}
    )
    folder.write(lambda: None)
    reader = reader_of(tmp_path / "sarm", ExtractionSettings())
    assert (reader.dtype, reader.settings.max_length, str(reader.tokenizer)) == ("bfloat16", 64, str(tiny_folder))
