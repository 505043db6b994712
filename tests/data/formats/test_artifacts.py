import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nn.every_sae import KINDS, kind_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sarm.data.formats.sae_folder import load_sae, save_sae
from sarm.data.formats.sae_formats import import_sae
from sarm.data.formats.sae_weights import sae_of
from sarm.data.formats.sarm_folder import load_sarm, read_latents, read_sarm, save_sarm
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import CODE_FILES, SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

D_IN, D_SAE, K = 8, 20, 3


@pytest.fixture
def sae() -> TopKSae:
    sae = TopKSae(D_IN, D_SAE, K)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def sae_folder(sae, tmp_path) -> Path:
    save_sae(sae, tmp_path, {"activations": {"layer": 1}})
    return tmp_path


def test_an_sae_comes_back_bit_for_bit(sae, sae_folder):
    found, metadata = load_sae(sae_folder)
    assert (found.d_in, found.d_sae, found.k) == (D_IN, D_SAE, K)
    for name, parameter in sae.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    assert metadata["activations"] == {"layer": 1}
    x = torch.randn(5, D_IN)
    assert torch.equal(found(x).indices, sae(x).indices)


OPTIONS_CHANGED = {"matryoshka": {"prefixes": (6, 12)}, "jumprelu": {"bandwidth": 0.3}}


@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_comes_back_with_its_options_and_thresholds(architecture, tmp_path):
    options = kind_of(architecture) | OPTIONS_CHANGED.get(architecture, {})
    sae = build_sae(d_in=D_IN, d_sae=D_SAE, k=K, **options)
    sample = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    sae.initialise_(sample, torch.Generator().manual_seed(2))
    save_sae(sae, tmp_path, {})
    x = sample * 1.7
    for found in (load_sae(tmp_path)[0], sae_of(import_sae(tmp_path))):
        assert type(found) is type(sae)
        assert (found.k, found.describe()) == (sae.k, sae.describe())
        for name, tensor in sae.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
        assert torch.equal(found.decode(found(x)), sae.decode(sae(x)))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == {"signed_topk": "topk"}.get(sae.exported_as, sae.exported_as)
    if sae.exported_as == "jumprelu":
        # Readers of SAELens' layout know those with thresholds so: pre * (pre > threshold).
        w = load_file(tmp_path / "sae_weights.safetensors")
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        z = pre * (pre > w["threshold"])
        torch.testing.assert_close(z @ w["W_dec"] + w["b_dec"], sae.decode(sae(x)).detach(), rtol=0, atol=1e-5)


def test_the_weights_are_named_and_shaped_as_documented(sae_folder):
    weights = load_file(sae_folder / "sae_weights.safetensors")
    assert {name: (tuple(w.shape), w.dtype) for name, w in weights.items()} == {
        "W_enc": ((D_IN, D_SAE), torch.float32),
        "b_enc": ((D_SAE,), torch.float32),
        "W_dec": ((D_SAE, D_IN), torch.float32),
        "b_dec": ((D_IN,), torch.float32),
    }


def test_dense_algebra_on_the_files_alone_gives_the_same_codes(sae, sae_folder):
    """As a reader with another library would do it."""
    w = load_file(sae_folder / "sae_weights.safetensors")
    k = json.loads((sae_folder / "cfg.json").read_text())["k"]
    x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(0))
    top = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(k)
    torch.testing.assert_close(sae(x).values, top.values, rtol=0, atol=1e-5)


def test_the_config_says_topk_in_saelens_layout(sae_folder):
    config = json.loads((sae_folder / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", D_IN, D_SAE, K)
    assert (config["apply_b_dec_to_input"], config["normalize_activations"]) == (True, "none")
    # Its reader drops the metadata of files of a layout before 6.
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6


def test_an_encoder_in_either_memory_layout_is_saved_alike(sae, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_sae(sae, tmp_path / "a", {})
    sae.W_enc.data = sae.W_enc.data.contiguous()
    save_sae(sae, tmp_path / "b", {})
    name = "sae_weights.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_refused(sae_folder, name):
    (sae_folder / name).unlink()
    with pytest.raises(UserError, match="is not a readable SAE"):
        load_sae(sae_folder)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_breaks_off_is_refused(sae_folder, name, share):
    content = (sae_folder / name).read_bytes()
    (sae_folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is not a readable SAE"):
        load_sae(sae_folder)


@pytest.mark.parametrize("change", [{"d_sae": 21}, {"d_in": 9}])
def test_weights_of_another_shape_than_the_config_says_are_refused(sae_folder, change):
    config = json.loads((sae_folder / "cfg.json").read_text())
    (sae_folder / "cfg.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=rf"holds shapes .*cfg\.json says .*{next(iter(change.values()))}"):
        load_sae(sae_folder)


def test_missing_and_surplus_weights_are_refused(sae_folder):
    path = sae_folder / "sae_weights.safetensors"
    weights = load_file(path)
    for wrong in ({**weights, "threshold": torch.zeros(D_SAE)}, {k: w for k, w in weights.items() if k != "b_enc"}):
        save_file(wrong, path)
        with pytest.raises(UserError, match="holds shapes"):
            load_sae(sae_folder)


def test_an_sae_of_another_architecture_is_refused(sae_folder):
    config = json.loads((sae_folder / "cfg.json").read_text())
    (sae_folder / "cfg.json").write_text(json.dumps({**config, "architecture": "gated", "metadata": {}}))
    with pytest.raises(
        UserError,
        match="holds a gated SAE, expected one of topk, batch_topk, matryoshka, jumprelu, abs_topk, matching_pursuit",
    ):
        load_sae(sae_folder)


@pytest.mark.parametrize("content", ['{"architecture": "topk", "d_in": 8, "d_sae": 20}', "[]", '{"architecture": "topk", "d_in": 8, "d_sae": 20, "k": 21}'])  # fmt: skip
def test_a_config_that_describes_no_sae_is_refused(sae_folder, content):
    (sae_folder / "cfg.json").write_text(content)
    with pytest.raises(UserError):
        load_sae(sae_folder)


def build(tiny_folder: Path, head: str = "sae", architecture: str = "topk") -> SarmForSequenceClassification:
    backbone = load_backbone(str(tiny_folder), 1)
    generator = torch.Generator().manual_seed(3)
    sae = build_sae(**kind_of(architecture), d_in=64, d_sae=D_SAE, k=K) if head == "sae" else None
    if sae:
        sae.initialise_(torch.randn(50, 64, generator=generator), generator)
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=1,
        d_sae=D_SAE if sae else 0,
        k=K if sae else 0,
        sae=sae.describe() if sae else None,
        head=head,
        end_of_turn_id=1,
        provenance={"model": "tiny:llama"},
    )
    model = SarmForSequenceClassification(config, backbone, sae).eval()
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return model


def fresh_chat(tiny_folder: Path) -> ChatTokenizer:
    return load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=40), tiny_folder)


@pytest.fixture
def sarm_folder(tiny_folder, tmp_path) -> Path:
    save_sarm(build(tiny_folder), fresh_chat(tiny_folder), tmp_path)
    return tmp_path


IDS = torch.tensor([[5, 9, 300, 2, 1], [7, 7, 12, 40, 1]])


@pytest.mark.parametrize(("head", "architecture"), [*(("sae", kind) for kind in KINDS), ("scalar", "topk")])
def test_a_reward_model_comes_back_bit_for_bit(tiny_folder, tmp_path, head, architecture):
    model = build(tiny_folder, head, architecture)
    save_sarm(model, fresh_chat(tiny_folder), tmp_path)
    found = load_sarm(tmp_path)
    assert not found.training
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-6)
    assert found.config.provenance == {"model": "tiny:llama"}


@pytest.mark.parametrize("architecture", KINDS)
def test_who_reads_the_latents_of_a_reward_model_finds_one_meaning_in_each(tiny_folder, tmp_path, architecture):
    save_sarm(build(tiny_folder, "sae", architecture), fresh_chat(tiny_folder), tmp_path)
    stored, read = load_sarm(tmp_path), read_sarm(tmp_path)
    weight_S, W_dec_SD = read_latents(tmp_path, "score.weight", "sae.W_dec")
    with torch.no_grad():
        before, after = stored(input_ids=IDS), read(input_ids=IDS)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    assert (after.latent_values >= 0).all()
    assert torch.equal(torch.from_numpy(weight_S), read.score.weight[0])
    assert torch.equal(torch.from_numpy(W_dec_SD), read.sae.W_dec)
    is_negative = before.latent_values < 0
    assert is_negative.any() == (architecture == "abs_topk")
    latents = before.latent_indices + is_negative * stored.config.d_sae
    assert torch.equal(after.latent_indices.sort().values, latents.sort().values)
    assert read.config.d_sae == len(weight_S) == (2 if architecture == "abs_topk" else 1) * stored.config.d_sae


_REWARDS = """
import json, sys
sys.modules["sarm"] = None
import torch
from transformers import AutoModelForSequenceClassification
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids).logits.flatten().tolist()))
"""


def test_a_reward_model_on_every_architecture_loads_without_the_package(tiny_folder, tmp_path):
    models = {kind: build(tiny_folder, "sae", kind) for kind in KINDS}
    for kind, model in models.items():
        save_sarm(model, fresh_chat(tiny_folder), tmp_path / kind)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _REWARDS, json.dumps(IDS.tolist()), *(str(tmp_path / kind) for kind in KINDS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for line, (kind, model) in zip(done.stdout.splitlines(), models.items(), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=IDS).logits.flatten().tolist()
        assert json.loads(line) == pytest.approx(wanted, abs=1e-6), kind


def test_loading_in_bfloat16_casts_the_backbone_alone(sarm_folder):
    found = load_sarm(sarm_folder, torch.bfloat16)
    dtypes = {name.split(".")[0]: p.dtype for name, p in found.named_parameters()}
    assert dtypes == {"model": torch.bfloat16, "sae": torch.float32, "score": torch.float32}


def test_the_folder_has_its_own_tokenizer_that_truncates_at_the_beginning(tiny_folder, sarm_folder):
    found = AutoTokenizer.from_pretrained(sarm_folder)
    chat = fresh_chat(tiny_folder)
    assert found.chat_template == chat.template
    assert found.truncation_side == "left"
    assert found.model_max_length == 40
    assert ChatTokenizer(found, max_length=40).template_hash == chat.template_hash
    assert ChatTokenizer(found, max_length=40).tokenizer_hash == chat.tokenizer_hash


def test_the_folder_carries_the_code_that_it_needs_and_says_so(sarm_folder):
    assert {path.name for path in sarm_folder.glob("*.py")} == set(CODE_FILES)
    assert json.loads((sarm_folder / "config.json").read_text())["auto_map"].keys() == {
        "AutoConfig",
        "AutoModelForSequenceClassification",
    }


def test_a_folder_without_a_model_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no reward model"):
            load_sarm(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_torn_file_is_refused(sarm_folder, name, share):
    content = (sarm_folder / name).read_bytes()
    (sarm_folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is not a readable reward model"):
        load_sarm(sarm_folder)


def test_a_model_in_shards_is_read_by_its_index(sarm_folder):
    whole = load_sarm(sarm_folder)
    latents = read_latents(sarm_folder, "score.weight", "sae.W_dec")
    (sarm_folder / "model.safetensors").unlink()
    whole.save_pretrained(sarm_folder, max_shard_size="100KB")
    shards = sorted(sarm_folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = load_sarm(sarm_folder)
    for name, weight in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    for wanted, again in zip(latents, read_latents(sarm_folder, "score.weight", "sae.W_dec"), strict=True):
        assert (wanted == again).all()
    shards[0].unlink()
    with pytest.raises(UserError, match=rf"names {shards[0].name}, which is not there"):
        load_sarm(sarm_folder)


def test_a_second_file_with_a_tensor_of_the_same_name_is_refused(sarm_folder):
    save_file({"score.weight": torch.zeros(1, 5)}, sarm_folder / "older.safetensors")
    for read in (load_sarm, lambda folder: read_latents(folder, "score.weight")):
        with pytest.raises(UserError, match=r"holds score\.weight twice, in model\.safetensors and older\.safetensors"):
            read(sarm_folder)


@pytest.mark.parametrize("kind", ["SARM", "SAE"])
def test_weights_of_whole_numbers_are_refused(kind, request):
    """Quantised ones, whose scales nobody here takes."""
    is_sae = kind == "SAE"
    folder = request.getfixturevalue("sae_folder" if is_sae else "sarm_folder")
    path = folder / ("sae_weights.safetensors" if is_sae else "model.safetensors")
    name, weights = ("W_enc" if is_sae else "score.weight"), load_file(path)
    save_file({**weights, name: weights[name].round().to(torch.int8)}, path)
    with pytest.raises(UserError, match=rf"holds whole numbers in {name} \(torch\.int8\): it was quantised"):
        (load_sae if is_sae else load_sarm)(folder)


def test_transformers_draws_no_weight_of_a_folder_at_random(sarm_folder):
    path = sarm_folder / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "score.weight"}, path, metadata={"format": "pt"})
    for loader in (SarmForSequenceClassification, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. score\.weight"):
            loader.from_pretrained(sarm_folder)


def test_missing_weights_file_is_refused(sarm_folder):
    (sarm_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not a readable reward model"):
        load_sarm(sarm_folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda w: w | {"sae.extra": torch.zeros(2)}, "sae.extra"),
        (lambda w: {k: v for k, v in w.items() if k != "score.weight"}, "score.weight"),
        (lambda w: w | {"score.weight": torch.zeros(1, D_SAE + 1)}, "score.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(sarm_folder, change, name):
    path = sarm_folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"1 weights differ, first {name}"):
        load_sarm(sarm_folder)


def test_a_plain_language_model_is_not_a_reward_model(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "llama")
    with pytest.raises(UserError, match="not a readable reward model: its model type is llama"):
        load_sarm(tmp_path / "llama")
