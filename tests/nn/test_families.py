"""Every family of language models as a backbone: a training step, an exported SARM without this package, published checkpoints' own layouts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compatibility import assert_listed
from tests.nn.family_options import COMMON, D_IN, NAMES, NUM_LAYERS, OPTIONS, VOCABULARY
from tests.nn.test_backbone import families, random_ids, residual_alone
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, GptOssConfig, LlamaConfig

from sarm.nn.backbone import FAMILIES, REFUSED
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone, load_language_model, longest_row, read_config, read_depth
from sarm.nn.topk import TopKSae

D_SAE, K, END = 48, 6, 2
IDS = [*random_ids(3, 9).tolist(), END]
# Checkpoints whose language model is one of several parts: how transformers names them, and the family of that part.
WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14, "out_hidden_size": D_IN, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "global_head_dim": 8}  # fmt: skip


def sarm_of(folder: Path) -> SarmForSequenceClassification:
    backbone = load_backbone(str(folder), 2)
    generator = torch.Generator().manual_seed(17)
    sae = TopKSae(D_IN, D_SAE, K)
    sae.initialise_(torch.randn(100, D_IN, generator=generator), generator)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=D_SAE, k=K, end_of_turn_id=END)
    model = SarmForSequenceClassification(config, backbone, sae)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return model.eval()


@families
def test_a_step_of_training_reaches_every_block_and_lowers_the_loss(family, family_folder):
    model = sarm_of(family_folder(family))
    ids = torch.tensor([IDS, [*random_ids(4, 9).tolist(), END]])

    def loss() -> Tensor:
        chosen, rejected = model(input_ids=ids).logits.squeeze(-1)
        return -torch.nn.functional.logsigmoid(chosen - rejected)

    before = loss()
    before.backward()
    for layer in range(2):
        grads = [p.grad for name, p in model.model.named_parameters() if name.startswith(f"layers.{layer}.")]
        assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in trained]).norm()
    at = [p.detach().clone() for p in trained]

    @torch.no_grad()
    def after(length: float) -> Tensor:
        for parameter, start in zip(trained, at, strict=True):
            parameter.copy_(start - length * parameter.grad / norm)
        return loss()

    # Where a latent is about to fire, the loss jumps: a step that is too long may pass that place.
    assert any(after(length) < before for length in (1e-3, 1e-4, 1e-5, 1e-6))


def test_exported_models_of_all_families_give_the_same_rewards_without_this_package(family_folder, tmp_path):
    wanted = {}
    for family in FAMILIES:
        model = sarm_of(family_folder(family))
        model.save_pretrained(tmp_path / family)
        with torch.no_grad():
            wanted[family] = model(input_ids=torch.tensor([IDS])).logits.item()
        loaded = SarmForSequenceClassification.from_pretrained(tmp_path / family)
        assert loaded(input_ids=torch.tensor([IDS])).logits.item() == pytest.approx(wanted[family], abs=1e-5)
    code = (
        "import sys, torch; sys.modules['sarm'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "for folder in sys.argv[2:]:\n"
        "    model = Auto.from_pretrained(folder, trust_remote_code=True)\n"
        "    print(repr(model(input_ids=torch.tensor([[int(i) for i in sys.argv[1].split()]])).logits.item()))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, " ".join(map(str, IDS)), *(str(tmp_path / family) for family in wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(wanted, map(float, done.stdout.split()[-len(wanted) :]), strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)


def wrapped(kind: str, folder: Path) -> torch.nn.Module:
    """A small model of several parts, saved as its class saves it."""
    text = {**COMMON, **OPTIONS[WRAPPERS[kind]], "model_type": WRAPPERS[kind]}
    vision = {**_VISION, **({"model_type": "pixtral"} if kind == "mistral3" else {})}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    torch.manual_seed(5)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("layout", ["as saved today", "as published"])
def test_the_language_model_of_a_checkpoint_with_more_parts_is_taken(kind, layout, tmp_path):
    model = wrapped(kind, tmp_path)
    if layout == "as published":
        # Gemma 3, Mistral 3 and Llama 4 are on the hub with this prefix.
        path = tmp_path / "model.safetensors"
        save_file({key.replace("model.language_model.", "language_model.model."): t for key, t in load_file(path).items()}, path, {"format": "pt"})  # fmt: skip
    ids = random_ids(1, 2, 13)
    with torch.no_grad():
        # Llama 4 keeps its head inside of that part.
        part = model.language_model.model if kind == "llama4" else model.model.language_model
        wanted = part(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert read_depth(str(tmp_path)) == NUM_LAYERS
    for layer in (1, 2):
        found = residual_alone(load_backbone(str(tmp_path), layer), ids)
        torch.testing.assert_close(found, wanted[layer], rtol=1e-5, atol=1e-5)


def test_gpt_oss_is_read_from_the_four_bits_that_it_is_published_in(tmp_path):
    """By the definition of MXFP4: blocks of 32 numbers of four bits, two a byte with the lower half first, and a power of two for each."""
    options = {**COMMON, **OPTIONS["gpt_oss"], "intermediate_size": 32}
    torch.manual_seed(3)
    model = AutoModel.from_config(GptOssConfig(**options))
    (tmp_path / "plain").mkdir()
    model.save_pretrained(tmp_path / "packed")
    weights = load_file(tmp_path / "packed" / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = {}
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = weights[key].shape
        halves = torch.randint(0, 16, (experts, columns, rows // 32, 16, 2))
        scales = torch.randint(124, 127, (experts, columns, rows // 32))
        packed[f"{key}_blocks"] = (halves[..., 0] + 16 * halves[..., 1]).to(torch.uint8)
        packed[f"{key}_scales"] = scales.to(torch.uint8)
        dense = values[halves].reshape(experts, columns, rows // 32, 32) * torch.exp2(scales - 127.0)[..., None]
        weights[key] = dense.reshape(experts, columns, rows).transpose(1, 2).contiguous()
    save_file(weights, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "plain")
    save_file({key: t for key, t in weights.items() if f"{key}_blocks" not in packed} | packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})  # fmt: skip
    config = model.config
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}  # fmt: skip
    config.save_pretrained(tmp_path / "packed")
    plain, found = (residual_alone(load_backbone(str(tmp_path / one), 2), torch.tensor([IDS])) for one in ("plain", "packed"))  # fmt: skip
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.02)


def test_eight_bit_weights_are_read_as_the_numbers_that_they_stand_for(family_folder, tmp_path):
    """As Ministral 3 and DeepSeek V3 are published: numbers of eight bits, and a scale for each block of them."""
    source = family_folder("llama")
    weights = load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if "_proj." not in key:
            packed[key] = weight
            continue
        scale = weight.abs().max() / 448
        packed[key] = (weight / scale).to(torch.float8_e4m3fn)
        packed[f"{key}_scale_inv"] = scale.reshape(1, 1)
        weights[key] = packed[key].float() * scale
    (tmp_path / "plain").mkdir()
    plain = with_config(tmp_path / "plain", family_folder)
    save_file(weights, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    eight = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "packed").mkdir()
    name = with_config(tmp_path / "packed", family_folder, quantization_config=eight)
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    wanted, found = (residual_alone(load_backbone(one, 2), torch.tensor([IDS])) for one in (plain, name))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def with_config(folder: Path, family_folder: Callable[[str], Path], **fields: Any) -> str:
    config = LlamaConfig.from_pretrained(family_folder("llama"))
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return str(folder)


def test_weights_quantised_in_ways_that_are_not_read_are_refused(family_folder, tmp_path):
    name = with_config(tmp_path, family_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError, match=r"are quantised by gptq, and only mxfp4 and fp8 are read.*--model\.name"
    ) as error:
        load_backbone(name, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_right_is_refused_with_the_reason(kind, tmp_path):
    code = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}} if kind == "internlm2" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **code}))
    with pytest.raises(ValueError, match=f"is a {kind} model, {REFUSED[kind]}") as error:
        read_config(str(tmp_path), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize(("shared", "per_layer"), [(0, 0), (1, 0), (0, 6), (1, 6), (2, 6), (3, 6)])
def test_what_each_block_of_gemma_4_takes_from_elsewhere_is_that_of_the_whole_model(
    shared, per_layer, shards, tmp_path
):
    """Embeddings of its own, and keys of earlier blocks: cut before or behind a block, the others are as they were."""
    own = {"hidden_size_per_layer_input": per_layer, "num_kv_shared_layers": shared, "num_hidden_layers": 5}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma4_text", **{**COMMON, **OPTIONS["gemma4_text"], **own, "layer_types": kinds})
    torch.manual_seed(3)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "shards" else "1GB")
    ids = random_ids(1, 2, 13)
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer in (1, 2, 3, 4):
        cut = load_backbone(str(tmp_path), layer)
        # Some ten units in the last place of values of up to ten.
        torch.testing.assert_close(residual_alone(cut, ids), wanted[layer], rtol=5e-5, atol=5e-5)
        if per_layer:
            assert cut.embed_tokens_per_layer.weight.shape == (VOCABULARY, layer * per_layer)


def test_a_block_of_gemma_3n_gives_copies_of_the_stream_and_not_the_stream():
    """Why it is refused: four of them, which a model mixes before each block and only its end makes one of."""
    own = {"head_dim": 8, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 6, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 3, "intermediate_size": [48] * 3}  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model("gemma3n_text", **{**COMMON, **own})).eval()
    with torch.no_grad():
        found = model(random_ids(1, 2, 7), output_hidden_states=True, use_cache=False).hidden_states
    assert [tuple(one.shape) for one in found] == [(4, 2, 7, D_IN)] * (NUM_LAYERS + 1)


def test_keys_of_earlier_blocks_that_the_library_cannot_compute_are_refused(tmp_path):
    own = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1}
    AutoConfig.for_model("gemma4_text", **{**COMMON, **OPTIONS["gemma4_text"], **own}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"takes the keys of earlier layers at layer 3 .*Pass --model\.layer 2 or lower"):  # fmt: skip
        read_config(str(tmp_path), 3)


def test_embeddings_of_layers_that_are_too_few_or_of_other_tokens_are_refused(tmp_path):
    config = AutoConfig.for_model("gemma4_text", **{**COMMON, **OPTIONS["gemma4_text"]})
    AutoModel.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    (key,) = [name for name in weights if "embed_tokens_per_layer" in name]
    for wrong in (weights[key][:, :5], weights[key][:-1]):
        save_file({**weights, key: wrong.contiguous()}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"another shape.*embed_tokens_per_layer\.weight"):
            load_backbone(str(tmp_path), 1)
    save_file({name: t for name, t in weights.items() if name != key}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. embed_tokens_per_layer"):
        load_backbone(str(tmp_path), 1)


def test_rows_beyond_which_angles_depend_on_the_batch_are_known():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    options = {**COMMON, "max_position_embeddings": 128}
    assert longest_row(AutoConfig.for_model("phi3", **options, original_max_position_embeddings=64, rope_parameters=rope)) == 64  # fmt: skip
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert longest_row(AutoConfig.for_model("llama", **options, rope_parameters=dynamic)) == 128
    assert longest_row(AutoConfig.for_model("llama", **options)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w | {"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, "no place for, e.g. .*layers.1.self_attn.q_norm"),
        (lambda w: {k: v for k, v in w.items() if "layers.0.mlp.up_proj" not in k}, "lacks 1 weights, e.g. layers.0.mlp.up_proj"),
        (lambda w: w | {"model.embed_tokens.weight": torch.ones(VOCABULARY + 1, D_IN)}, r"another shape.*embed_tokens.weight: \(98, 32\), not \(97, 32\)"),
    ],
)  # fmt: skip
def test_weights_that_are_another_architectures_are_refused_by_name(change, said, family_folder, tmp_path):
    (tmp_path / "config.json").write_text((family_folder("llama") / "config.json").read_text())
    save_file(change(load_file(family_folder("llama") / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=said) as error:
        load_backbone(str(tmp_path), 2)
    assert "\n" not in str(error.value)


def test_a_language_model_without_its_head_is_refused_and_with_a_tied_one_is_not(family_folder, tmp_path):
    source = family_folder("llama")
    save_file({k: v for k, v in load_file(source / "model.safetensors").items() if "lm_head" not in k}, tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    name = with_config(tmp_path, family_folder)
    with pytest.raises(ValueError, match=r"lacks 1 weights, e\.g\. lm_head\.weight"):
        load_language_model(name, 1)
    with_config(tmp_path, family_folder, tie_word_embeddings=True)
    model = load_language_model(name, 1)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_table_of_backbones():
    of_wrappers = {family: f", `{kind}`" for kind, family in WRAPPERS.items()}
    rows = [
        (
            NAMES[family],
            f"`{family}`{of_wrappers.get(family, '')}",
            "read apart" if how.alone else "yes",
            "by kind" if how.mask_per_layer_kind else "its own" if how.alone else "one",
        )
        for family, how in sorted(FAMILIES.items())
    ]
    names = {"gemma3n_text": "Gemma 3n", "internlm2": "InternLM 2, 2.5"}
    refused = [(names[kind], f"`{kind}`", "refused", reason) for kind, reason in REFUSED.items()]
    assert_listed("backbones", ("models", "`model_type`", "answers share their prompt's row", "attention masks"), rows + refused)  # fmt: skip
