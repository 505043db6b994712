"""The papers' reward models, on generated weights of their layout: rewards against a brute-force forward of theirs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaModel

from sarm.contracts.manifest import read_manifest
from sarm.data.formats.papers_layout import PapersFields, read_papers_sarm, write_papers_sarm
from sarm.data.formats.sae_folder import load_sae
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSarm
from sarm.settings.model import ModelSettings
from sarm.stages.convert_sarm import convert_sarm
from sarm.stages.job import run_command

D_SAE, K, LAYER, END = 80, 6, 1, 1
CONVERSATION = [[{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, thanks."}]]


def write_checkpoint(
    tiny_folder: Path, folder: Path, *, dtype=torch.float32, sarm_param: dict | None = None, drop: tuple[str, ...] = ()
) -> Path:
    """The tiny model of two blocks with random `sae.*` and `score.weight`, as their trainer leaves it."""
    folder.mkdir(exist_ok=True)
    for path in tiny_folder.iterdir():
        if path.suffix not in (".safetensors",):
            (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(4)
    weights = {key: w for key, w in load_file(tiny_folder / "model.safetensors").items() if key != "lm_head.weight"}
    weights = {key if key.startswith("model.") else f"model.{key}": w for key, w in weights.items()}
    weights |= {
        "sae.pre_bias": torch.randn(64, generator=generator),
        "sae.latent_bias": 0.3 * torch.randn(D_SAE, generator=generator) - 1,
        "sae.encoder.weight": torch.randn(D_SAE, 64, generator=generator) / 8,
        "sae.decoder.weight": torch.randn(64, D_SAE, generator=generator),
        "score.weight": torch.randn(1, D_SAE, generator=generator),
    }
    weights = {key: w.to(dtype) for key, w in weights.items() if key not in drop}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaSARM"]
    if sarm_param is not None:
        config["sarm_param"] = sarm_param
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def param(**changes) -> dict:
    return {
        "sae_source_layer": LAYER,
        "sae_latent_size": D_SAE,
        "sae_k": K,
        "sae_use_sequence_level": True,
        "sarm_use_activation": True,
    } | changes


@torch.no_grad()
def their_reward(folder: Path, ids: list[int], *, layer: int = LAYER, topk: bool = True) -> float:
    """Their forward, token by token over the whole sequence, on the stock model's hidden states."""
    weights = {key: w.float() for key, w in load_file(folder / "model.safetensors").items()}
    llama = LlamaModel.from_pretrained(folder, dtype=torch.float32).eval()
    h = llama(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
    x = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
    a = (x - weights["sae.pre_bias"]) @ weights["sae.encoder.weight"].T + weights["sae.latent_bias"]
    if topk:
        top = a.topk(K, dim=-1)
        a = torch.zeros_like(a).scatter(-1, top.indices, top.values)
    return (a @ weights["score.weight"].T)[0, -1, 0].item()


@pytest.fixture
def chat(tiny_folder) -> ChatTokenizer:
    return load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), tiny_folder)


@pytest.mark.parametrize("topk", [True, False])
@pytest.mark.parametrize("key", ["sarm_use_activation", "sarm_use_topk"])
def test_an_imported_model_gives_the_rewards_of_the_papers_forward(tiny_folder, tmp_path, chat, topk, key):
    said = param()
    del said["sarm_use_activation"]
    folder = write_checkpoint(tiny_folder, tmp_path / "theirs", sarm_param={**said, key: topk})
    model = read_papers_sarm(folder, chat, PapersFields())
    for seed in range(3):
        ids = torch.randint(2, 600, (9 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            found = model(input_ids=torch.tensor([[*ids, END]])).logits.item()
        assert found == pytest.approx(their_reward(folder, [*ids, END], topk=topk), abs=2e-4)


def test_negative_latents_survive_in_an_imported_model_as_they_do_in_theirs(tiny_folder, tmp_path, chat):
    folder = write_checkpoint(tiny_folder, tmp_path / "theirs", sarm_param=param())
    weights = load_file(folder / "model.safetensors")
    weights["sae.latent_bias"] -= 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = read_papers_sarm(folder, chat, PapersFields())
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 9, END]]))
    assert (out.latent_values < 0).all()
    assert out.logits.item() == pytest.approx(their_reward(folder, [5, 9, END]), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_job_makes_a_folder_that_transformers_loads_and_exports_it_again(tiny_folder, tmp_path, chat, dtype):
    source = write_checkpoint(tiny_folder, tmp_path / "theirs", dtype=dtype, sarm_param=param())
    convert_sarm(ConvertSarm(source=source, target=tmp_path / "ours", max_length=128))
    read_manifest(tmp_path / "ours", "sarm/v1")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(model, SarmForSequenceClassification)
    assert model.num_labels == 1
    (tokens,) = chat.encode(CONVERSATION)
    ids = torch.tensor([tokens.ids])
    model.model.float()
    with torch.no_grad():
        reward = model(input_ids=ids).logits.item()
    assert reward == pytest.approx(their_reward(source, tokens.ids), abs=2e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == chat.template

    convert_sarm(ConvertSarm(source=tmp_path / "ours", target=tmp_path / "back", format="papers"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    kept = {key for key in before if not key.startswith("model.layers.1.")}
    assert after.keys() == kept
    for key in kept - {"model.norm.weight"}:
        assert torch.equal(after[key].float(), before[key].float()), key
    said = json.loads((tmp_path / "back" / "config.json").read_text())["sarm_param"]
    assert said == param()


def test_older_checkpoints_say_nothing_and_are_told(tiny_folder, tmp_path, chat):
    folder = write_checkpoint(tiny_folder, tmp_path / "theirs", drop=("sae.decoder.weight",))
    with pytest.raises(UserError, match=r"no sarm_param, .* Pass --layer and --k"):
        read_papers_sarm(folder, chat, PapersFields())
    model = read_papers_sarm(folder, chat, PapersFields(LAYER, K))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[5, 9, END]])).logits.item()
    assert found == pytest.approx(their_reward(folder, [5, 9, END]), abs=2e-4)


def test_the_layer_is_half_of_the_blocks_where_sarm_param_leaves_it_out(tiny_folder, tmp_path, chat):
    said = param()
    del said["sae_source_layer"]
    folder = write_checkpoint(tiny_folder, tmp_path / "theirs", sarm_param=said)
    assert read_papers_sarm(folder, chat, PapersFields()).config.layer == 1


def test_a_model_of_ours_has_the_same_rewards_by_their_forward(tiny_folder, tmp_path, chat):
    backbone, generator = load_backbone(str(tiny_folder), LAYER), torch.Generator().manual_seed(3)
    sae = TopKSae(64, D_SAE, K)
    sae.initialise_(torch.randn(200, 64, generator=generator), generator)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=LAYER, d_sae=D_SAE, k=K, end_of_turn_id=END)
    model = SarmForSequenceClassification(config, backbone, sae).eval()
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, D_SAE, generator=generator))
    write_papers_sarm(model, chat, tmp_path)
    ids = torch.randint(2, 600, (12,), generator=generator).tolist()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[*ids, END]]))
    assert (output.latent_values > 0).all(), "else their missing ReLU would be felt"
    assert output.logits.item() == pytest.approx(their_reward(tmp_path, [*ids, END]), abs=2e-4)


def test_the_sae_of_a_checkpoint_becomes_a_finished_stage(tiny_folder, tmp_path):
    source = write_checkpoint(tiny_folder, tmp_path / "theirs", sarm_param=param())
    convert_sarm(ConvertSarm(source=source, target=tmp_path / "sae", format="sae", model="tiny:llama", max_length=128))
    read_manifest(tmp_path / "sae", "sae/v1")
    sae, metadata = load_sae(tmp_path / "sae")
    assert isinstance(sae, TopKSae)
    assert (sae.signed, sae.k, sae.d_sae) == (True, K, D_SAE)
    assert metadata["activations"] == {"d_in": 64, "model": "tiny:llama", "layer": LAYER}
    assert torch.equal(sae.W_enc.T, load_file(source / "model.safetensors")["sae.encoder.weight"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop": ("score.weight",)}, "has no score.weight, so it is no SARM"),
        ({"drop": ("model.embed_tokens.weight",)}, "every weight is needed, lacks 1 weights, e.g. embed_tokens.weight"),
        ({"sarm_param": param(sae_k=0)}, "does not say sae_k"),
        ({"sarm_param": param(sae_k=D_SAE + 1)}, "k must be between 1 and d_sae=80"),
        ({"sarm_param": param(sae_source_layer=3)}, "has 2 blocks, got layer 3"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tiny_folder, tmp_path, chat, settings, said):
    folder = write_checkpoint(tiny_folder, tmp_path / "theirs", **{"sarm_param": param(), **settings})
    with pytest.raises(UserError, match=said):
        read_papers_sarm(folder, chat, PapersFields())


def test_a_scalar_head_cannot_be_written_in_their_layout(tiny_folder, tmp_path, chat):
    backbone = load_backbone(str(tiny_folder), 1)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=1, head="scalar")
    with pytest.raises(UserError, match="no words for a scalar head"):
        write_papers_sarm(SarmForSequenceClassification(config, backbone), chat, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka", "jumprelu", "abs_topk", "matching_pursuit"])
def test_a_rule_that_their_layout_has_no_words_for_is_refused(tiny_folder, tmp_path, chat, kind):
    backbone = load_backbone(str(tiny_folder), 1)
    sae = build_sae(kind, 64, D_SAE, K)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=1, d_sae=D_SAE, k=K, sae=sae.describe())
    with pytest.raises(UserError, match=f"no words for a {kind} SAE. Only SARMs on TopK"):
        write_papers_sarm(SarmForSequenceClassification(config, backbone, sae), chat, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_in_use_and_a_source_that_is_none_are_refused(tiny_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    source = write_checkpoint(tiny_folder, tmp_path / "theirs", sarm_param=param())
    for arguments, said in (
        ([tmp_path / "nowhere", tmp_path / "new"], "holds no reward model"),
        ([source, tmp_path / "full"], "is not empty. Pass another output folder"),
        ([source, tmp_path / "new", "--format", "sae"], "needs the model whose activations it encodes. Pass --model"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(ConvertSarm, convert_sarm, "Convert.", [str(argument) for argument in arguments])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
