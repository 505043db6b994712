"""SAEs and activations at the edge, without a cluster: the job that converts SAEs, and what SAE training refuses to start on."""

import json
from pathlib import Path

import pytest
import torch
from tests.data.formats.foreign_saes import KINDS, OLD, saelens_file
from tests.data.store.activation_stores import numbered, table_of, write_store

from sarm.contracts.folders import SAE_FOLDER
from sarm.contracts.manifest import StageFolder, read_manifest
from sarm.data.formats.sae_folder import load_sae, save_sae
from sarm.data.store.activations import ActivationStore
from sarm.nn.architectures import build_sae
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae
from sarm.settings.model import ModelSettings
from sarm.settings.sae import SaeSettings
from sarm.stages.convert_sae import convert_sae
from sarm.stages.job import run_command
from sarm.stages.reward_models import check_sae
from sarm.stages.train_sae import check_activations


@pytest.fixture
def sae_stage(tmp_path) -> Path:
    """A finished SAE stage."""
    sae = build_sae("topk", 64, 96, 4)
    sae.initialise_(torch.randn(100, 64), torch.Generator().manual_seed(0))
    folder = StageFolder(tmp_path / "sae", SAE_FOLDER, {})
    folder.claim()
    save_sae(sae, folder.folder, {"activations": {"d_in": 64, "layer": 2, "model": "tiny:llama"}})
    folder.finish({"figures": {}})
    return folder.folder


def convert(*arguments: object) -> None:
    run_command(ConvertSae, convert_sae, "Convert an SAE.", [str(argument) for argument in arguments])


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "pt"])
def test_an_sae_goes_out_and_comes_back_as_a_stage_that_the_next_job_takes(sae_stage, tmp_path, capsys, format):
    convert(sae_stage, tmp_path / "out", "--format", format)
    assert "64 x 96, k 4; takes standardised rows" in capsys.readouterr().out
    convert(tmp_path / "out", tmp_path / "back", "--format", "sarm")
    read_manifest(tmp_path / "back", SAE_FOLDER)
    check_sae(tmp_path / "back", ModelSettings(name="tiny:llama", layer=2))
    before, after = load_sae(sae_stage)[0], load_sae(tmp_path / "back")[0]
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        convert(*arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    return said


def test_a_foreign_sae_takes_residuals_as_they_are_unless_said_otherwise_and_says_whose_they_are(sae_stage, tmp_path, capsys):  # fmt: skip
    convert(sae_stage, tmp_path / "out", "--format", "sparsify")
    (tmp_path / "out" / "origin.json").unlink()
    whose = ("--format", "sarm", "--model", "tiny:llama", "--layer", 2)
    assert "Pass --model and --layer" in refused(capsys, tmp_path / "out", tmp_path / "back", "--format", "sarm")
    assert not (tmp_path / "back").exists(), "nothing half-written"
    convert(tmp_path / "out", tmp_path / "back", *whose)
    assert "64 x 96, k 4; takes residuals as they are" in capsys.readouterr().out
    convert(tmp_path / "out", tmp_path / "other", *whose, "--standardised")
    assert "takes standardised rows" in capsys.readouterr().out
    assert [load_sae(tmp_path / name)[0].standardises for name in ("back", "other")] == [False, True]
    assert read_manifest(tmp_path / "back", SAE_FOLDER).config["d_sae"] == 96
    check_sae(tmp_path / "back", ModelSettings(name="tiny:llama", layer=2))
    with pytest.raises(UserError, match="was trained on layer 2, asked for 1"):
        check_sae(tmp_path / "back", ModelSettings(name="tiny:llama", layer=1))


def test_model_and_layer_come_from_the_file_and_flags_must_agree_with_it(tmp_path, capsys):
    source = KINDS["Gemma Scope"].write(tmp_path / "in")
    to_stage = (source, tmp_path / "out", "--format", "sarm", "--standardised")
    assert "is of layer 6 (blocks.5.hook_resid_post), got --layer 5" in refused(capsys, *to_stage, "--layer", 5)
    other = refused(capsys, *to_stage, "--model", "google/gemma-2-9b")
    assert (
        "is of the model google/gemma-2-2b, got --model google/gemma-2-9b. Pass that model, or --other-model" in other
    )
    narrow = refused(capsys, *to_stage, "--model", "tiny:llama", "--other-model")
    assert "is 8 wide and of layer 6, tiny:llama is 64 wide with 2 blocks" in narrow
    assert not (tmp_path / "out").exists(), "nothing half-written"
    convert(*to_stage)
    check_sae(tmp_path / "out", ModelSettings(name="google/gemma-2-2b", layer=6))
    with pytest.raises(UserError, match="was trained on layer 6, asked for 7"):
        check_sae(tmp_path / "out", ModelSettings(name="google/gemma-2-2b", layer=7))
    convert(source, tmp_path / "tuned", *to_stage[2:], "--model", "google/gemma-2-2b-it", "--other-model")
    check_sae(tmp_path / "tuned", ModelSettings(name="google/gemma-2-2b-it", layer=6))


def test_a_short_name_of_a_model_needs_the_whole_one(tmp_path, capsys):
    source = KINDS["SAELens 5, topk"].write(tmp_path / "in")
    to_stage = (source, tmp_path / "out", "--format", "sarm", "--standardised")
    assert "calls its model gemma-2-2b, which is no Hugging Face id. Pass --model" in refused(capsys, *to_stage)
    convert(*to_stage, "--model", "google/gemma-2-2b", "--layer", 6)
    check_sae(tmp_path / "out", ModelSettings(name="google/gemma-2-2b", layer=6))


def test_an_sae_of_another_hook_becomes_no_stage(tmp_path, capsys):
    source = saelens_file(OLD | {"hook_name": "blocks.5.hook_mlp_out"})(tmp_path / "in")
    to_stage = (source, tmp_path / "out", "--format", "sarm", "--standardised", "--model", "google/gemma-2-2b", "--layer", 6)  # fmt: skip
    assert "'blocks.5.hook_mlp_out', and reward models read the residual stream" in refused(capsys, *to_stage)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_status_2(sae_stage, tmp_path, capsys):
    assert "there is no SAE at" in refused(capsys, tmp_path / "nothing", tmp_path / "out")
    assert "is not empty" in refused(capsys, sae_stage, sae_stage)
    assert "OUT" in refused(capsys, sae_stage)
    assert "--formt" in refused(capsys, sae_stage, tmp_path / "out", "--formt", "pt")
    assert "k must be at least 1, got 0" in refused(capsys, sae_stage, tmp_path / "out", "--k", 0)
    (sae_stage / "sae_weights.safetensors").write_bytes((sae_stage / "sae_weights.safetensors").read_bytes()[:-8])
    assert "has changed" in refused(capsys, sae_stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_config_is_valid_json_for_strict_readers(sae_stage, tmp_path):
    convert(sae_stage, tmp_path / "out")
    json.loads((tmp_path / "out" / "cfg.json").read_text(), parse_constant=pytest.fail)


def stores(tmp_path: Path, **chat: object) -> dict[str, ActivationStore]:
    return {
        "text": ActivationStore(write_store(tmp_path / "text", [table_of(numbered(0, 40))])),
        "chat": ActivationStore(write_store(tmp_path / "chat", [table_of(numbered(0, 40), **chat)])),
    }


@pytest.mark.parametrize("chat", [{"layer": 2}, {"model": "another"}])
def test_activations_of_another_layer_or_model_are_refused(tmp_path, chat):
    with pytest.raises(
        UserError, match=r"chat activations are of .*, text activations of .*Extract both with one --model"
    ):
        check_activations(SaeSettings(batch_size=16), stores(tmp_path, **chat))


def test_fewer_rows_than_a_batch_are_refused(tmp_path):
    check_activations(SaeSettings(batch_size=40), stores(tmp_path))
    with pytest.raises(UserError, match=r"text phase has 40 activations, at least 41 are needed \(one batch\)"):
        check_activations(SaeSettings(batch_size=41), {"text": ActivationStore(tmp_path / "text")})
