"""What reward training starts from: baselines that differ from SARM in one thing, and adapters."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.nn.every_sae import KINDS, kind_of

from sarm.contracts.ids import stable_int
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sarm_folder import load_sarm, save_sarm
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PairOfGroup, PromptGroup
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.sae import standardise
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.stages.reward_models import build_model, check_sae, check_width, encoder_of, merge_adapters_
from sarm.stages.variants import variants
from sarm.training.head_start import frozen_sides
from sarm.training.reward import parameter_groups, train_reward
from sarm.training.reward_engine import LocalEngine

MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=128)
IDS = torch.tensor([[5, 9, 300, 2, 1], [7, 7, 12, 40, 1]])


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory) -> Path:
    """An SAE of 96 latents with biases, for the tiny model's first block."""
    generator = torch.Generator().manual_seed(2)
    sae = build_sae("topk", 64, 96, 8)
    sae.initialise_(torch.randn(200, 64, generator=generator), generator)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(96, generator=generator))
        sae.W_enc.mul_(1 + torch.rand(96, generator=generator))
    folder = tmp_path_factory.mktemp("sae")
    save_sae(sae, folder, {"activations": {"d_in": 64, "model": "tiny:llama", "layer": 1}})
    return folder


def build(tiny_folder, chat, sae: Path | None, seed: int = 0, **settings) -> SarmForSequenceClassification:
    return build_model(MODEL, str(tiny_folder), sae, chat, RewardSettings(**settings), seed)


def test_random_directions_differ_in_their_directions_alone(tiny_folder, tiny_chat, sae_folder):
    ours = build(tiny_folder, tiny_chat, sae_folder)
    random, again, other = (build(tiny_folder, tiny_chat, sae_folder, seed, encoder="random") for seed in (0, 0, 1))
    mine, theirs = ours.state_dict(), random.state_dict()
    differing = {name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])}
    assert differing == {"sae.W_enc", "sae.W_dec"}
    torch.testing.assert_close(random.sae.W_enc.norm(dim=0), ours.sae.W_enc.norm(dim=0))
    cosines = torch.nn.functional.cosine_similarity(random.sae.W_enc, ours.sae.W_enc, dim=0)
    assert cosines.abs().mean() < 0.2, "64 dimensions: 0.1 by chance"
    assert random.config.to_dict() == ours.config.to_dict()
    assert torch.equal(random.sae.W_enc, again.sae.W_enc)
    assert not torch.equal(random.sae.W_enc, other.sae.W_enc)


def test_the_random_linear_map_is_the_papers_looser_variant(tiny_folder, tiny_chat, sae_folder):
    """reward = w . (W h + b): raw activations, a bias, no TopK, a normal head; encoder and blocks learn."""
    model = build(tiny_folder, tiny_chat, sae_folder, encoder="random_linear", train_sae=True)
    with torch.no_grad():
        model.sae.b_enc.normal_()
        h = model.model(input_ids=IDS, use_cache=False).last_hidden_state[:, -1]
        wanted = (h @ model.sae.W_enc + model.sae.b_enc) @ model.score.weight.T
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=1e-4)
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.sae.W_enc.std().item() == pytest.approx(0.02, rel=0.1)
    parameter_groups(model, RewardSettings(encoder="random_linear", train_sae=True))
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("sae")} == {
        "sae.W_enc", "sae.b_enc", "sae.b_dec"
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"encoder": "random_linear", "train_sae": True}, {"topk": False}, {"encoder": "random"}]
)
def test_every_baseline_is_saved_and_read_back(tiny_folder, tiny_chat, sae_folder, tmp_path, settings):
    model = build(tiny_folder, tiny_chat, sae_folder, **settings).eval()
    torch.nn.init.normal_(model.score.weight)
    save_sarm(model, load_chat_tokenizer(MODEL, tiny_folder), tmp_path)
    with torch.no_grad():
        assert torch.equal(load_sarm(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_job_trains_the_baselines_it_is_asked_for(tiny_folder, sae_folder, tmp_path):
    all_of_them = ("scalar", "scalar_full", "random_encoder", "random_directions", "random_linear", "token_sae")
    reward = RewardSettings(baselines=all_of_them, token_sae=tmp_path)
    found = {one.folder: one for one in variants(MODEL, reward, sae_folder)}
    assert list(found) == [
        "sarm", "scalar_head", "scalar_head_full", "sarm_random_encoder", "sarm_random_directions", "sarm_random_linear",
        "sarm_token_sae",
    ]  # fmt: skip
    assert found["sarm"] == found["scalar_head"]._replace(stage="train SARM", folder="sarm", sae=sae_folder)
    assert found["scalar_head_full"].model == replace(MODEL, layer=2), "both blocks"
    assert found["sarm_random_encoder"].reward == replace(reward, encoder="random_matched")
    assert found["sarm_random_directions"].reward == replace(reward, encoder="random")
    assert found["sarm_token_sae"].sae == tmp_path
    assert [one.folder for one in variants(MODEL, RewardSettings(), sae_folder)] == ["sarm", "scalar_head"]


def test_an_sae_of_another_layer_model_or_width_is_refused(tiny_folder, sae_folder, tmp_path):
    with pytest.raises(UserError, match="was trained on layer 1, asked for 2"):
        check_sae(sae_folder, replace(MODEL, layer=2))
    with pytest.raises(UserError, match="was trained on model tiny:llama, asked for demo:smollm2"):
        check_sae(sae_folder, replace(MODEL, name="demo:smollm2"))
    narrow = build_sae("topk", 6, 24, 4)
    narrow.initialise_(torch.randn(50, 6), torch.Generator().manual_seed(0))
    save_sae(narrow, tmp_path, {"activations": {"d_in": 6, "model": "tiny:llama", "layer": 1}})
    check_width(sae_folder, MODEL)
    with pytest.raises(UserError, match="takes activations of width 6, tiny:llama has 64"):
        check_width(tmp_path, MODEL)


def groups_of(chat: ChatTokenizer) -> list[PromptGroup]:
    prompt = [{"role": "user", "content": "How do I get home?"}]
    tokens = chat.encode_responses(prompt, ["By bus.", "Walk along the river until the bridge.", "No."])
    pairs = [PairOfGroup("a", 0, 1, None, None), PairOfGroup("b", 1, 2, None, None)]
    return [PromptGroup("p", ["", "", ""], tokens, pairs)]


def test_activations_of_a_model_that_has_none_stored_are_its_own(tiny_folder, tiny_chat):
    model, groups = build(tiny_folder, tiny_chat, None), groups_of(tiny_chat)
    place, h_ND = frozen_sides(model, groups, {"a", "b"})
    torch.nn.init.normal_(model.score.weight)
    for pair in groups[0].pairs:
        for side, number in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            x = standardise(h_ND[place[stable_int(pair.pair_id), side]][None])
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([groups[0].tokens[number].ids])).logits
                torch.testing.assert_close(x @ model.score.weight.T, alone, rtol=0, atol=1e-4)


def test_adapters_without_their_library_are_refused_with_what_to_do(sae_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sarm.stages.variants.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft. Run pip install 'sarm\[lora\]'"):
        variants(MODEL, RewardSettings(lora_rank=4), sae_folder)


def test_adapters_start_at_nothing_learn_alone_and_merge_into_the_weights(tiny_folder, tiny_chat, sae_folder, tmp_path):
    plain = build(tiny_folder, tiny_chat, sae_folder)
    config = RewardSettings(lora_rank=4, lr=1e-2, head_lr=1e-2, batch_pairs=2, epochs=6)
    model = build(tiny_folder, tiny_chat, sae_folder, lora_rank=4)
    for one in (plain, model):
        torch.nn.init.constant_(one.score.weight, 0.1)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    engine = LocalEngine(model, parameter_groups(model, config), 1.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name or name == "score.weight" for name in trained)
    groups = groups_of(tiny_chat)
    train_reward(engine, groups, config, 0, 256, 1, lambda step, metrics: None)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        merged = merge_adapters_(model)
        torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
        assert not torch.allclose(before, plain(input_ids=IDS).logits, atol=1e-3)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    save_sarm(merged, load_chat_tokenizer(MODEL, tiny_folder), tmp_path)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(load_sarm(tmp_path)(input_ids=IDS).logits, merged.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["pretrained", "random", "random_linear"])
def test_every_architecture_can_be_drawn_anew_and_be_made_linear(kind, encoder):
    sae = build_sae(**kind_of(kind), d_in=6, d_sae=24, k=4)
    sae.initialise_(torch.randn(50, 6), torch.Generator().manual_seed(0))
    lengths, before = sae.W_enc.norm(dim=0).detach(), sae.W_enc.detach().clone()
    dense = encoder_of(copy.deepcopy(sae), RewardSettings(encoder=encoder, topk=False), 0)
    x = torch.randn(3, 6)
    wanted = (x - dense.b_dec) @ dense.W_enc + dense.b_enc
    torch.testing.assert_close(dense(x).values, wanted)
    drawn = encoder_of(sae, RewardSettings(encoder=encoder), 1)
    assert torch.equal(drawn.W_enc, before) == (encoder == "pretrained")
    if encoder == "random":
        torch.testing.assert_close(drawn.W_enc.norm(dim=0), lengths)
