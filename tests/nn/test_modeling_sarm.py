import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.test_backbone import kinds
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from sarm.data.formats.sarm_folder import load_sarm, save_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.packing import answer_rows, collate
from sarm.nn.backbone import residual_stream
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.sae import Codes, dense, standardise
from sarm.nn.topk import TopKSae
from sarm.settings.model import ModelSettings

D_SAE, K = 48, 6
END, NEWLINE = 1, 201  # end-of-turn token of the tiny tokenizer, and any token that templates may write after it


def build(folder: Path, head: str = "sae", layer: int = 1, end_of_turn_id: int | None = END):
    """A reward model with a random SAE and a random head."""
    backbone = load_backbone(str(folder), layer)
    d_in = backbone.config.hidden_size
    generator = torch.Generator().manual_seed(17)
    sae = None
    if head == "sae":
        sae = TopKSae(d_in, D_SAE, K)
        sae.initialise_(torch.randn(100, d_in, generator=generator), generator)
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=layer,
        d_sae=D_SAE if sae else 0,
        k=K if sae else 0,
        head=head,
        end_of_turn_id=end_of_turn_id,
    )
    model = SarmForSequenceClassification(config, backbone, sae)
    assert model.score.weight.count_nonzero() == 0, "the head starts at zero"
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_folder):
    return build(tiny_folder)


def sequence(seed: int, length: int) -> list[int]:
    """Random tokens that end a turn."""
    return [*torch.randint(2, 600, (length,), generator=torch.Generator().manual_seed(seed)).tolist(), END]


@torch.no_grad()
def reward_alone(model, ids: list[int]) -> float:
    """The reward of one sequence without any padding."""
    return model(input_ids=torch.tensor([ids])).logits.item()


@torch.no_grad()
def by_hand(model, folder: Path, ids: list[int], layer: int = 1) -> Tensor:
    """sum_i w_i z_i of the last token, from the backbone and dense linear algebra."""
    tokens = torch.tensor([ids])
    backbone = load_backbone(str(folder), layer)
    h = residual_stream(backbone, tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens))[:, -1]
    x = (h - h.mean()) / (h.std() + 1e-6)
    pre = (x - model.sae.b_dec) @ model.sae.W_enc + model.sae.b_enc
    top = pre.topk(K, dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return (z @ model.score.weight.T).squeeze()


@pytest.mark.parametrize("length", [1, 5, 30])
def test_the_reward_is_the_weighted_sum_of_the_active_latents_by_hand(length, model, tiny_folder):
    ids = sequence(length, length)
    assert reward_alone(model, ids) == pytest.approx(by_hand(model, tiny_folder, ids).item(), abs=1e-5)


def test_the_reward_is_the_sum_of_its_attributions(model):
    ids = torch.tensor([sequence(1, 9), sequence(2, 9)])
    with torch.no_grad():
        out = model(input_ids=ids)
    attributions = model.score.weight[0, out.latent_indices] * out.latent_values
    torch.testing.assert_close(attributions.sum(1, keepdim=True), out.logits, rtol=0, atol=1e-5)
    assert out.logits.shape == (2, 1)
    assert out.latent_values.shape == out.latent_indices.shape == (2, K)


# END may stand inside a prompt, where earlier turns end, and is also what pads.
inner = st.lists(st.one_of(st.just(END), st.integers(2, 599)), min_size=0, max_size=12)


@given(
    prompts=st.lists(inner, min_size=1, max_size=5),
    sides=st.lists(st.sampled_from(["left", "right"]), min_size=5, max_size=5),
    newlines=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    extra=st.integers(0, 3),
)
def test_the_reward_does_not_depend_on_padding_batch_or_what_follows_the_end_of_turn(
    model, prompts, sides, newlines, extra
):
    answers = [[*prompt, END] for prompt in prompts]
    written = [ids + [NEWLINE] * count for ids, count in zip(answers, newlines, strict=False)]
    length = max(map(len, written)) + extra
    ids = torch.full((len(written), length), END)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(written):
        start = length - len(tokens) if sides[i] == "left" else 0
        ids[i, start : start + len(tokens)] = torch.tensor(tokens)
        mask[i, start : start + len(tokens)] = 1
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    wanted = torch.tensor([reward_alone(model, tokens) for tokens in answers])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_tokens_before_the_end_of_turn_matter(model):
    assert reward_alone(model, [5, 6, 7, END]) != reward_alone(model, [5, 6, 8, END])


def test_without_an_end_of_turn_the_last_shown_token_is_rewarded(tiny_folder):
    model = build(tiny_folder, end_of_turn_id=None)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.tensor([[9, 9, 1, 4], [3, 1, 4, 9], [4, 1, 5, 6]])
    assert model.rewarded_columns(ids, mask).tolist() == [3, 2, 3]
    model.config.end_of_turn_id = END
    assert model.rewarded_columns(ids, mask).tolist() == [2, 1, 1]
    assert model.rewarded_columns(torch.tensor([[7, 8, 9, END]]), torch.tensor([[1, 1, 1, 0]])).tolist() == [2]


@given(seed=st.integers(0, 100), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_answers_packed_into_one_row_get_the_rewards_of_padded_rows(model, seed, lengths):
    prompt = sequence(seed, 6)
    answers = [(i, prompt + sequence(seed + i + 1, length)) for i, length in enumerate(lengths)]
    batch = collate(answer_rows(answers, 64), pad_id=END)
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits.squeeze(-1)
    found = dict(zip(batch.keys, packed.tolist(), strict=True))
    assert found == pytest.approx({key: reward_alone(model, ids) for key, ids in answers}, abs=1e-5)


def test_a_scalar_head_is_linear_in_the_standardised_activation(tiny_folder):
    model = build(tiny_folder, head="scalar")
    ids = torch.tensor([sequence(1, 8)])
    with torch.no_grad():
        out = model(input_ids=ids)
        h = residual_stream(
            load_backbone(str(tiny_folder), 1), ids, torch.arange(9)[None], torch.zeros_like(ids)
        )[:, -1]  # fmt: skip
        torch.testing.assert_close(out.logits, standardise(h) @ model.score.weight.T, rtol=0, atol=1e-5)
    assert out.latent_values is None
    assert not any("sae" in name for name, _ in model.named_parameters())


def test_an_unknown_head_is_refused(tiny_folder):
    backbone = load_backbone(str(tiny_folder), 1)
    with pytest.raises(ValueError, match="head must be 'sae' or 'scalar', got 'mlp'"):
        SarmForSequenceClassification(SarmConfig(backbone=backbone.config.to_dict(), head="mlp"), backbone)


def test_the_gradient_reaches_the_blocks_through_topk_but_not_a_frozen_sae(tiny_folder):
    # Two blocks: the tiny model embeds its end-of-turn token as zeros, which the first block's queries cannot learn from.
    model = build(tiny_folder, layer=2)
    model.sae.requires_grad_(False)
    out = model(input_ids=torch.tensor([sequence(1, 8)]))
    out.logits.sum().backward()
    blocks = {name: p for name, p in model.named_parameters() if ".layers." in name}
    assert blocks
    assert all(p.grad.abs().sum() > 0 for p in blocks.values())
    assert all(p.grad is None for p in model.sae.parameters())
    active = dense(Codes(out.latent_values.detach(), out.latent_indices), D_SAE)[0] > 0
    assert torch.equal(model.score.weight.grad[0] != 0, active)


@pytest.mark.parametrize("head", ["sae", "scalar"])
@kinds
def test_save_and_load_by_transformers_keeps_rewards(family, head, family_folder, tmp_path):
    model = build(family_folder(family), head, layer=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, SarmForSequenceClassification)
    assert loaded.config.num_labels == loaded.num_labels == 1
    assert loaded.score.weight.count_nonzero() > 0
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_the_config_survives_saving(tiny_folder, tmp_path):
    model = build(tiny_folder)
    model.config.reward_mean, model.config.reward_std, model.config.provenance = 0.5, 2.0, {"model": "tiny:llama"}
    model.save_pretrained(tmp_path)
    found = SarmConfig.from_pretrained(tmp_path)
    for name in ("layer", "d_sae", "k", "head", "end_of_turn_id", "reward_mean", "reward_std", "provenance"):
        assert getattr(found, name) == getattr(model.config, name), name
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["SarmForSequenceClassification"]


def test_loaded_in_bfloat16_the_sae_and_the_head_stay_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.split(".")[0]: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes == {"model": torch.bfloat16, "sae": torch.float32, "score": torch.float32}
    for name in ("sae.W_enc", "sae.b_dec", "score.weight"):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), "not even rounded on the way"
    with torch.no_grad():
        assert loaded(input_ids=torch.tensor([sequence(1, 8)])).logits.dtype == torch.float32


def test_training_it_under_autocast_keeps_the_head_in_float32(model):
    ids = torch.tensor([sequence(1, 8)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids)
    assert (out.logits.dtype, out.latent_values.dtype) == (torch.float32, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("head", ["sae", "scalar"])
def test_score_takes_hidden_states_as_rl_libraries_hand_them_over(head, tiny_folder):
    """As TRL does: the base model's last hidden states, the head at every token, the last shown one's is the reward."""
    model = build(tiny_folder, head, layer=2)
    rows = [sequence(1, 8), sequence(2, 5)]
    ids = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (9 - len(row)) for row in rows])
    base = getattr(model, model.base_model_prefix)
    hidden = base(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
    for own in (model, copy.deepcopy(model)):
        rewards = own.score(hidden)
        assert rewards.shape == (2, 9, 1)
        for row, ids_of_row in enumerate(rows):
            assert rewards[row, len(ids_of_row) - 1].item() == pytest.approx(reward_alone(model, ids_of_row), abs=1e-4)


@pytest.fixture(scope="module")
def saved(model, tiny_folder, tmp_path_factory):
    """A SARM folder as the training stage leaves it."""
    folder = tmp_path_factory.mktemp("sarm")
    save_sarm(
        model, load_chat_tokenizer(ModelSettings(name="tiny:llama", layer=1, max_length=128), tiny_folder), folder
    )
    return folder


IDS = sequence(4, 12)
SCORE = """
import sys
{before}
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]{arguments})
ids = torch.tensor([[int(i) for i in sys.argv[2].split()]])
with torch.no_grad():
    print(repr(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()))
print(type(model).__module__)
"""


def score_elsewhere(saved: Path, cache: Path, before: str, arguments: str) -> tuple[float, str]:
    """(reward, module of the model's class) in a process of its own, started outside the repository."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    code = SCORE.format(before=before, arguments=arguments)
    command = [sys.executable, "-c", code, str(saved), " ".join(map(str, IDS))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cache, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reward, module = done.stdout.split()[-2:]
    return float(reward), module


def test_a_reader_without_this_package_gets_the_same_reward(saved, model, tmp_path):
    reward, module = score_elsewhere(saved, tmp_path, "sys.modules['sarm'] = None", ", trust_remote_code=True")
    assert reward == pytest.approx(reward_alone(model, IDS), abs=1e-5)
    assert module.startswith("transformers_modules.")


def test_a_reader_with_this_package_needs_no_remote_code(saved, model, tmp_path):
    reward, module = score_elsewhere(saved, tmp_path, "import sarm.nn.modeling_sarm", "")
    assert reward == pytest.approx(reward_alone(model, IDS), abs=1e-5)
    assert module == "sarm.nn.modeling_sarm"


def test_the_folder_that_training_leaves_is_read_back_by_the_platform(saved, model):
    assert reward_alone(load_sarm(saved), IDS) == reward_alone(model, IDS)


TOKENIZER_LAST = """
import sys
sys.modules['sarm'] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
if sys.argv[2] == "model first":
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(tokenizer("a").input_ids)
"""


@pytest.mark.parametrize("order", ["model first", "alone, without code"])
def test_the_folders_tokenizer_asks_nothing_and_waits_for_nothing(saved, tmp_path, order):
    """Standard input stays open, as a terminal's does: a question would wait for its answer, and be in the output."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TOKENIZER_LAST, str(saved), order]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as asked:  # fmt: skip
        assert asked.stdout is not None
        assert asked.stderr is not None
        said, errors = asked.stdout.read(), asked.stderr.read()
    assert asked.returncode == 0, errors[-2000:]
    assert "custom code" not in said + errors
    assert said.strip().startswith("[")
