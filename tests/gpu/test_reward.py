"""Reward training on the card: every ZeRO stage in both dtypes, with and without checkpointing, beside the plain loop; its peak memory."""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.gpu.cards import ON_CORES

from sarm.data.sources.prepare import prepare_pairs
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.budget import USABLE_SHARE, Device, Size, pass_gb, training_budget, training_gb
from sarm.settings.data import DataSettings
from sarm.settings.reward import RewardSettings
from sarm.stages.train_reward_worker import reward_moments
from sarm.training.reward import parameter_groups, train_reward
from sarm.training.reward_engine import LocalEngine

pytestmark = pytest.mark.gpu
REWARD = RewardSettings(lr=3e-4, head_lr=5e-3, epochs=2, batch_pairs=16, batch_tokens=512)
WAYS = list(itertools.product((0, 1, 2, 3), ("float32", "bfloat16"), (False, True)))
# Llama-3.1-8B's widths; as many blocks as the card holds in training.
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, tiny_chat: ChatTokenizer) -> list[PromptGroup]:
    folder = tmp_path_factory.mktemp("pairs")
    prepare_pairs(DataSettings(pairs=("tiny:pairs",)), folder)
    return list(prompt_groups(load_pairs(folder, "train"), tiny_chat))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, as DeepSpeed wants one."""
    store = tmp_path_factory.mktemp("group") / "store"
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo" if ON_CORES else "nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def fresh(tiny_folder: Path, chat: ChatTokenizer) -> SarmForSequenceClassification:
    backbone = load_backbone(str(tiny_folder), 1)
    torch.manual_seed(0)
    sae = TopKSae(64, 96, 6)
    for weight in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=1, d_sae=96, k=6, end_of_turn_id=chat.end_of_turn_id)
    return SarmForSequenceClassification(config, backbone, sae).train()


class Bfloat16Engine(LocalEngine):
    """The plain loop with its products in bfloat16."""

    def __call__(self, **inputs: object) -> object:
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().__call__(**inputs)


def losses_of(engine: object, groups: list[PromptGroup], reward: RewardSettings, pad_id: int) -> torch.Tensor:
    losses: list[float] = []
    train_reward(engine, groups, reward, 0, 128, pad_id, lambda _, metrics: losses.append(metrics["loss"]))  # type: ignore[arg-type]
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tiny_chat: ChatTokenizer, groups: list[PromptGroup], card: torch.device) -> dict[str, torch.Tensor]:  # fmt: skip
    """Losses of the plain loop on the card, by dtype."""
    found = {}
    for dtype, engine_type in {"float32": LocalEngine, "bfloat16": Bfloat16Engine}.items():
        model = fresh(tiny_folder, tiny_chat).to(card)  # type: ignore[arg-type]
        engine = engine_type(model, parameter_groups(model, REWARD), REWARD.max_grad_norm)
        found[dtype] = losses_of(engine, groups, REWARD, tiny_chat.pad_id)
    return found


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("stage", "dtype", "checkpointing"), WAYS)
def test_every_way_to_train_is_the_plain_loop(
    stage: int,
    dtype: str,
    checkpointing: bool,
    plain: dict[str, torch.Tensor],
    tiny_folder: Path,
    tiny_chat: ChatTokenizer,
    groups: list[PromptGroup],
    card: torch.device,
) -> None:
    reward = replace(REWARD, zero_stage=stage, precision=dtype, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    model = fresh(tiny_folder, tiny_chat)
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = ZeroEngine(model, parameter_groups(model, reward), reward, card)
    found = losses_of(engine, groups, reward, tiny_chat.pad_id)
    assert len(found) >= 10
    if dtype == "float32":
        torch.testing.assert_close(found, plain[dtype], rtol=0, atol=1e-4)
    else:
        rounding = (plain["bfloat16"] - plain["float32"]).abs().max()
        assert (found - plain[dtype]).abs().max() <= 2 * rounding


@pytest.mark.usefixtures("one_process")
def test_an_8b_shaped_model_takes_the_memory_that_a_dry_run_says_and_gives_it_back_before_it_is_written(
    tiny_folder: Path, tiny_chat: ChatTokenizer, groups: list[PromptGroup], card: torch.device
) -> None:
    from transformers import AutoModel

    backbone_config = load_backbone(str(tiny_folder), 1).config
    if not ON_CORES:
        backbone_config.update({**WIDE, "head_dim": 128})
    d_in, d_ff = backbone_config.hidden_size, backbone_config.intermediate_size
    memory = 8.0 if ON_CORES else torch.cuda.get_device_properties(card).total_memory / 1e9
    keys = d_in * backbone_config.num_key_value_heads // backbone_config.num_attention_heads
    a_block = 2 * d_in * (d_in + keys) + 3 * d_in * d_ff
    embedding = backbone_config.vocab_size * d_in

    def size(depth: int) -> Size:
        return Size(depth * a_block + embedding, d_in, d_ff, depth)

    fitting = [n for n in range(1, 17) if training_gb(size(n), "bfloat16", 4096, 1, 0, checkpointing=True) < USABLE_SHARE * memory]  # fmt: skip
    depth = 1 if ON_CORES else fitting[-1]
    budget = training_budget(Device(memory), size(depth), 1, 4096, batch_tokens=4096, checkpointing=True)
    backbone_config.num_hidden_layers = depth
    if getattr(backbone_config, "layer_types", None):
        backbone_config.layer_types = backbone_config.layer_types[:1] * depth
    with torch.device(card):
        backbone = AutoModel.from_config(backbone_config, attn_implementation="sdpa")
    config = SarmConfig(backbone=backbone_config.to_dict(), layer=depth, head="scalar", end_of_turn_id=tiny_chat.end_of_turn_id)  # fmt: skip
    model = SarmForSequenceClassification(config, backbone, None).train()
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    reward = replace(REWARD, epochs=1, batch_pairs=96, batch_tokens=4096, zero_stage=budget.zero_stage, precision="bfloat16", gradient_checkpointing=True)  # fmt: skip
    engine = ZeroEngine(model, parameter_groups(model, reward), reward, card)
    if not ON_CORES:
        torch.cuda.reset_peak_memory_stats(card)
    losses = losses_of(engine, groups, reward, tiny_chat.pad_id)
    assert losses.isfinite().all()
    if not ON_CORES:
        peak = torch.cuda.max_memory_allocated(card) / 1e9
        assert peak == pytest.approx(budget.gb, rel=0.1)
    whole = engine.whole_state()
    engine.free_()
    if not ON_CORES:
        assert torch.cuda.memory_allocated(card) / 1e9 < 0.02 * budget.gb, "what training held is given back"
        torch.cuda.reset_peak_memory_stats(card)
    # As the stage writes it: a model of its own in float32, whose rewards' moments are measured.
    with torch.device(card):
        written = SarmForSequenceClassification(config, AutoModel.from_config(backbone_config, attn_implementation="sdpa"), None)  # fmt: skip
    written.load_state_dict({**written.state_dict(), **whole})
    moments = reward_moments(written.eval(), groups, 4096, 128, tiny_chat.pad_id, card)
    assert all(math.isfinite(value) for value in moments)
    if not ON_CORES:
        held = 4 * sum(parameter.numel() for parameter in written.parameters()) / 1e9
        assert torch.cuda.max_memory_allocated(card) / 1e9 < min(budget.gb, held + pass_gb(size(depth)._replace(weights=0), "float32", 4096) + 1)  # fmt: skip


@pytest.mark.skipif(ON_CORES, reason="memory of a machine is not counted by tensors")
def test_a_frozen_pass_takes_the_memory_that_a_dry_run_says(card: torch.device) -> None:
    from transformers import LlamaConfig, LlamaModel

    depth, tokens = 4, 16384
    config = LlamaConfig(**WIDE, num_hidden_layers=depth, vocab_size=128256, dtype="bfloat16")
    with torch.device(card):
        model = LlamaModel(config).to(torch.bfloat16).eval()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(card)
    with torch.inference_mode():
        model(torch.zeros(4, tokens // 4, dtype=torch.long, device=card), use_cache=False)
    size = Size(depth * 218_103_808 + 128256 * 4096, 4096, 14336, depth)
    assert torch.cuda.max_memory_allocated(card) / 1e9 == pytest.approx(pass_gb(size, "bfloat16", tokens), rel=0.1)
