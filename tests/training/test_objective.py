"""Every term of the objective and every switch, against brute force in float64 on a real tiny model."""

import copy
from dataclasses import replace

import pytest
import torch

from sarm.data.tokens.groups import PairOfGroup, PromptGroup
from sarm.nn.architectures import build_sae
from sarm.nn.dense import DenseSae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError
from sarm.settings.reward import RewardSettings
from sarm.stages.reward_models import encoder_of
from sarm.training.objective import Objective, objective_of
from sarm.training.reward import _backward, parameter_groups
from sarm.training.reward_batches import deal
from sarm.training.reward_engine import LocalEngine

D_SAE, K, END = 96, 8, 1
MARGINS = [0.5, None, -0.25]


@pytest.fixture(scope="module")
def group() -> PromptGroup:
    """One prompt, three answers, three pairs of which two have a margin."""
    from sarm.data.tokens.chat import Tokens

    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, 600, (6,), generator=generator).tolist()
    answers = [[*prompt, *torch.randint(2, 600, (n,), generator=generator).tolist(), END] for n in (3, 7, 5)]
    pairs = [
        PairOfGroup(f"pair{n}", c, r, margin, None)
        for n, ((c, r), margin) in enumerate(zip([(0, 1), (1, 2), (2, 0)], MARGINS, strict=True))
    ]
    return PromptGroup("prompt", ["a", "b", "c"], [Tokens(ids, 0) for ids in answers], pairs)


@pytest.fixture(scope="module")
def untrained(tiny_folder):
    """Two blocks, a random SAE and a random head."""
    backbone = load_backbone(str(tiny_folder), 2)
    generator = torch.Generator().manual_seed(5)
    sae = TopKSae(64, D_SAE, K)
    sae.initialise_(torch.randn(200, 64, generator=generator), generator)
    with torch.no_grad():
        sae.b_enc.copy_(0.05 * torch.randn(D_SAE, generator=generator))
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=D_SAE, k=K, end_of_turn_id=END)
    model = SarmForSequenceClassification(config, backbone, sae)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, D_SAE, generator=generator))
    return model


def gradients(untrained, group, config: RewardSettings) -> dict[str, torch.Tensor]:
    """What one packed step leaves in `grad`, times the number of pairs."""
    model = copy.deepcopy(untrained)
    engine = LocalEngine(model, parameter_groups(model, config), 1.0)
    for micro in deal([group], 1, 256, 1024)[0]:
        _backward(engine, micro, 1.0, END, objective_of(config), last=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(untrained, group, config: RewardSettings) -> dict[str, torch.Tensor]:
    """The same from single sequences through dense algebra and the formulas in float64 beyond the backbone."""
    model = copy.deepcopy(untrained)
    parameter_groups(model, config)

    def encode(x):
        pre = (x - model.sae.b_dec.double()) @ model.sae.W_enc.double() + model.sae.b_enc.double()
        if not config.topk:
            return pre
        top = pre.topk(K)
        return torch.zeros_like(pre).scatter(0, top.indices, top.values.relu())

    rewards, reconstructions = [], []
    for tokens in group.tokens:
        ids = torch.tensor([tokens.ids])
        # Without packing: the library's own causal attention.
        h = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].double()
        x = (h - h.mean()) / (h.std() + 1e-6)
        rewards.append(encode(x) @ model.score.weight[0].double())
        seen = x.detach() if config.recon_detached else x
        x_hat = encode(seen) @ model.sae.W_dec.double() + model.sae.b_dec.double()
        reconstructions.append((x_hat - seen).square().sum() / seen.square().sum())
    total = torch.zeros((), dtype=torch.float64)
    for pair in group.pairs:
        chosen, rejected = rewards[pair.chosen], rewards[pair.rejected]
        wanted = chosen - rejected - (pair.margin or 0.0) * config.use_margin
        s = config.label_smoothing
        total = total - (1 - s) * torch.sigmoid(wanted).log() - s * torch.sigmoid(-wanted).log()
        total = total + config.centre_weight * (chosen + rejected) ** 2
        total = total + config.recon_weight * (reconstructions[pair.chosen] + reconstructions[pair.rejected]) / 2
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "plain": {},
    "without margins": {"use_margin": False},
    "smoothed": {"label_smoothing": 0.2},
    "centred": {"centre_weight": 0.1},
    "sae": {"train_sae": True},
    "papers' mode 2": {"train_sae": True, "recon_weight": 1.0, "recon_detached": False},
    "papers' mode 3": {"train_sae": True, "recon_weight": 0.5},
    "head and sae": {"train_backbone": False, "train_sae": True, "recon_weight": 1.0},
    "without topk": {"topk": False, "train_sae": True, "recon_weight": 0.5, "recon_detached": False},
    "all": {"label_smoothing": 0.1, "centre_weight": 0.01, "train_sae": True, "recon_weight": 2.0, "use_margin": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_steps_gradient_is_that_of_the_formulas_one_sequence_at_a_time(untrained, group, case):
    config = RewardSettings(**CASES[case])
    model = untrained
    if not config.topk:
        model = copy.deepcopy(untrained)
        model.sae = encoder_of(model.sae, config, 0)
    found, wanted = gradients(model, group, config), by_hand(model, group, config)
    assert found.keys() == wanted.keys()
    assert max(g.abs().max() for g in wanted.values()) > 0.01
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=2e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


def trained_parts(untrained, **settings) -> set[str]:
    model = copy.deepcopy(untrained)
    parameter_groups(model, RewardSettings(**settings))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {"blocks" if ".layers." in name else name for name in names}


def test_switches_decide_what_is_trained(untrained):
    sae = {"sae.W_enc", "sae.b_enc", "sae.b_dec"}
    assert trained_parts(untrained) == {"blocks", "score.weight"}
    assert trained_parts(untrained, train_backbone=False) == {"score.weight"}
    assert trained_parts(untrained, train_sae=True) == {"blocks", "score.weight", *sae}
    assert trained_parts(untrained, train_sae=True, recon_weight=1.0) == {"blocks", "score.weight", *sae, "sae.W_dec"}


def test_a_decoder_that_is_the_encoder_too_is_trained_with_it(untrained):
    tied = copy.deepcopy(untrained)
    tied.sae = build_sae("matching_pursuit", 64, D_SAE, K)
    assert trained_parts(tied) == {"blocks", "score.weight"}
    assert trained_parts(tied, train_sae=True) == {"blocks", "score.weight", "sae.W_dec", "sae.b_dec"}


def test_each_part_has_its_own_rate(untrained):
    config = RewardSettings(lr=1e-5, sae_lr=2e-5, head_lr=3e-5, train_sae=True, weight_decay=0.1)
    found = [(group["lr"], group["weight_decay"]) for group in parameter_groups(copy.deepcopy(untrained), config)]
    assert found == [(1e-5, 0.1), (2e-5, 0.0), (3e-5, 0.0)]


def test_a_detached_reconstruction_loss_leaves_the_blocks_alone(untrained, group):
    """Its gradient reaches the SAE, and the blocks' gradient is what it is without it."""
    plain = gradients(untrained, group, RewardSettings(train_sae=True))
    detached = gradients(untrained, group, RewardSettings(train_sae=True, recon_weight=10.0))
    attached = gradients(untrained, group, RewardSettings(train_sae=True, recon_weight=10.0, recon_detached=False))
    blocks = [name for name in plain if ".layers." in name]
    for name in blocks:
        torch.testing.assert_close(detached[name], plain[name], rtol=0, atol=1e-6)
    assert any(not torch.allclose(attached[name], plain[name], atol=1e-3) for name in blocks)
    assert not torch.allclose(detached["sae.W_enc"], plain["sae.W_enc"], atol=1e-3)


def test_the_papers_objective_is_the_default():
    assert objective_of(RewardSettings()) == Objective()
    assert Objective().model_options() == {}


def test_without_topk_the_reward_is_linear_in_the_standardised_activation(untrained):
    sae = encoder_of(copy.deepcopy(untrained.sae), RewardSettings(topk=False), 0)
    assert isinstance(sae, DenseSae)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    one, other, between = (sae(row) for row in (x[:1], x[1:], x.mean(0, keepdim=True)))
    torch.testing.assert_close(between.values, (one.values + other.values) / 2, rtol=0, atol=1e-5)
    assert (one.values < 0).any(), "no ReLU"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recon_weight": 1.0}, "recon_weight must be 0 where nothing learns from it"),
        ({"recon_weight": 1.0, "recon_detached": False, "train_backbone": False}, "recon_weight must be 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"centre_weight": -1.0}, "centre_weight must be at least 0"),
        ({"lora_rank": 4, "train_backbone": False}, "lora_rank must be 0 where the blocks are not trained"),
        ({"baselines": ("token_sae",)}, "token_sae must be given with the token_sae baseline"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        replace(RewardSettings(), **settings)


def test_pairs_that_truncation_made_equal_cost_log_2_and_teach_nothing(untrained, group):
    """A beginning that was cut off may have been all that told two long answers apart."""
    same = group._replace(tokens=[group.tokens[0]] * 2, pairs=[PairOfGroup("pair", 0, 1, None, None)])
    model = copy.deepcopy(untrained)
    engine = LocalEngine(model, parameter_groups(model, RewardSettings()), 1.0)
    (micro,) = deal([same], 1, 256, 1024)[0]
    outcome = _backward(engine, micro, 1.0, END, Objective(), last=True)
    assert float(outcome.losses.sum()) == pytest.approx(0.693147, abs=1e-6)
    assert all(p.grad.abs().max() < 1e-4 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pad_id", [0, END, 599])
def test_the_gradient_does_not_depend_on_the_padding_token(untrained, group, pad_id):
    """A tokenizer without one pads with the end of turn."""
    short = group._replace(prompt_id="short", tokens=[t._replace(ids=t.ids[-3:]) for t in group.tokens])
    found = []
    for pad in (7, pad_id):
        model = copy.deepcopy(untrained)
        engine = LocalEngine(model, parameter_groups(model, RewardSettings()), 1.0)
        (micro,) = deal([group, short], 1, 20, 1024)[0]
        _backward(engine, micro, 1.0, pad, Objective(), last=True)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6)
