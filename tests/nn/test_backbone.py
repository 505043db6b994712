import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nn.family_options import NUM_LAYERS, OPTIONS, VOCABULARY, WINDOW
from tests.nn.routing import agree, routes_of, undisturbed
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from sarm.data.tokens.packing import answer_rows, collate
from sarm.nn.backbone import FAMILIES, residual_stream, residuals_at
from sarm.nn.pretrained import load_backbone, read_config

LENGTH = 13
families = pytest.mark.parametrize("family", FAMILIES)
# One of every way in which the backbone treats a family; what depends on that way alone is tried with these.
kinds = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2", "phi", "llama4_text", "qwen3_5_text"])
layers = pytest.mark.parametrize("layer", [1, 2, NUM_LAYERS])


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def whole_model(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def residual_of_whole(folder, ids: Tensor, layer: int) -> Tensor:
    """What the untruncated model has after block `layer`, caught at the block itself: never normalised."""
    model = whole_model(folder)
    caught = []

    def catch(_module, _inputs, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    model.model.layers[layer - 1].register_forward_hook(catch)
    model(input_ids=ids, use_cache=False)
    return caught[0]


@torch.no_grad()
def residual_alone(model, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return residual_stream(model, ids, positions, torch.zeros_like(ids))


@families
@pytest.mark.parametrize("layer", [1, 2])
def test_the_residual_stream_is_hidden_states_of_the_whole_model(family, layer, family_folder):
    folder, ids = family_folder(family), random_ids(1, 2, LENGTH)
    with torch.no_grad():
        wanted = whole_model(folder)(ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
    found = residual_alone(load_backbone(str(folder), layer), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@kinds
@layers
def test_the_residual_stream_is_what_leaves_the_block_before_any_final_norm(family, layer, family_folder):
    folder, ids = family_folder(family), random_ids(2, 2, LENGTH)
    found = residual_alone(load_backbone(str(folder), layer), ids)
    torch.testing.assert_close(found, residual_of_whole(folder, ids, layer), rtol=1e-5, atol=1e-5)


@kinds
def test_the_last_hidden_state_of_the_library_is_normalised_so_it_is_not_used(family, family_folder):
    folder, ids = family_folder(family), random_ids(3, 1, LENGTH)
    with torch.no_grad():
        normalised = whole_model(folder)(ids, output_hidden_states=True, use_cache=False).hidden_states[NUM_LAYERS]
    assert (residual_alone(load_backbone(str(folder), NUM_LAYERS), ids) - normalised).abs().max() > 0.1


@kinds
@layers
def test_only_the_kept_blocks_are_loaded(family, layer, family_folder):
    model = load_backbone(str(family_folder(family)), layer)
    assert len(model.layers) == model.config.num_hidden_layers == layer
    numbers = {int(name.split(".")[1]) for name, _ in model.named_parameters() if name.startswith("layers.")}
    assert numbers == set(range(layer))
    assert not any("lm_head" in name or name.startswith("norm.") for name, _ in model.named_parameters())


@families
@pytest.mark.parametrize("layer", [NUM_LAYERS])
def test_several_answers_in_one_row_equal_one_by_one(family, layer, family_folder):
    model = load_backbone(str(family_folder(family)), layer)
    prompt = random_ids(4, 7).tolist()
    answers = {n: prompt + random_ids(5 + n, 3 + 2 * n).tolist() for n in range(4)}
    other = {9: random_ids(20, 15).tolist(), 10: random_ids(21, 12).tolist()}
    rows = answer_rows(list(answers.items()), 64)
    assert len(rows) == 1, "the answers share a row"
    batch = collate([*rows, *(row for one in other.items() for row in answer_rows([one], 64))], pad_id=2)
    assert len(batch.input_ids) == 1, "all three prompts share a line"
    with torch.no_grad():
        hidden = residual_stream(model, batch.input_ids, batch.position_ids, batch.segment_ids)
    assert sorted(batch.keys) == [0, 1, 2, 3, 9, 10]
    for key, row, column in zip(batch.keys, batch.rows, batch.columns, strict=True):
        wanted = residual_alone(model, torch.tensor([(answers | other)[key]]))[0, -1]
        torch.testing.assert_close(hidden[row, column], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name, own in OPTIONS.items() if own.get("sliding_window")])
def test_the_sliding_window_is_felt(family, family_folder):
    """A token outside the window of the only block changes nothing, one inside does."""
    model = load_backbone(str(family_folder(family)), 1)
    ids = random_ids(6, 1, LENGTH)
    last = residual_alone(model, ids)[0, -1]
    for distance, is_seen in ((WINDOW - 1, True), (WINDOW, False)):
        changed = ids.clone()
        changed[0, -1 - distance] = (changed[0, -1 - distance] + 1) % VOCABULARY
        assert bool((residual_alone(model, changed)[0, -1] != last).any()) == is_seen


@kinds
def test_padding_is_finite_and_changes_nothing(family, family_folder):
    model = load_backbone(str(family_folder(family)), 2)
    ids = random_ids(7, 1, 5)
    padded = torch.cat([torch.full((1, 6), 2), ids, torch.full((1, 4), 2)], dim=1)
    segments = torch.tensor([[-1] * 6 + [0] * 5 + [-1] * 4])
    positions = torch.tensor([[0] * 6 + list(range(5)) + [0] * 4])
    with torch.no_grad():
        found = residual_stream(model, padded, positions, segments)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 6:11], residual_alone(model, ids), rtol=1e-5, atol=1e-5)


@families
def test_bfloat16_loads_and_runs(family, family_folder):
    """As float32 within rounding; of models with experts, every token whose choice of them rounding has not changed, its own or a seen one's."""
    has_experts = bool({"num_experts_per_tok", "moe_k"} & OPTIONS[family].keys())
    folder, ids = family_folder(family), random_ids(8, 20 if has_experts else 1, LENGTH)
    model = load_backbone(str(folder), 2, torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype != torch.bfloat16}
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).eval()
    by_library = [name for name, p in whole.named_parameters() if p.dtype != torch.bfloat16]
    # Decays, and what shifts a router's scores.
    assert all(any(name.endswith(own) for name in by_library) for own in kept), (kept, by_library)
    with routes_of(model) as routes:
        found = residual_alone(model, ids)
    assert found.dtype == torch.bfloat16
    # A state gathers rounding along the row: against the library's own blocks in the same dtype.
    other = whole if FAMILIES[family].alone else load_backbone(str(folder), 2)
    with torch.no_grad(), routes_of(other) as other_routes:
        wanted = (
            other(ids, output_hidden_states=True, use_cache=False).hidden_states[2].float()
            if FAMILIES[family].alone
            else residual_alone(other, ids)
        )
    likeness = torch.nn.functional.cosine_similarity(found.float(), wanted, dim=-1)
    if not has_experts:
        assert likeness.min() > 0.99
        return
    same = agree(routes, other_routes[: len(routes)], len(ids))
    # At most 8.1 % of tokens, in PhiMoE, whose gate is cut off at a threshold; 4.6 % elsewhere.
    assert (~same).float().mean() < 0.1
    assert likeness[undisturbed(same)].min() > 0.99


@kinds
def test_the_same_seedless_load_twice_is_the_same_model(family, family_folder):
    first, second = (load_backbone(str(family_folder(family)), 1) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def copy_without(folder, target, unwanted):
    """The model with the weights that `unwanted` names left out of its file."""
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if not unwanted(name)}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_of_a_kept_block_is_an_error(family_folder, tmp_path):
    copy_without(family_folder("llama"), tmp_path, lambda name: "layers.1.mlp.up_proj" in name)
    with pytest.raises(
        ValueError,
        match=r"of whose first 2 blocks every weight is needed, lacks 1 weights, e\.g\. layers\.1\.mlp\.up_proj",
    ):
        load_backbone(str(tmp_path), 2)


def test_weights_that_are_not_needed_may_be_missing(family_folder, tmp_path):
    folder, ids = family_folder("llama"), random_ids(9, 1, LENGTH)
    copy_without(
        folder, tmp_path, lambda name: ".layers.2." in name or "lm_head" in name or name.endswith("model.norm.weight")
    )
    torch.testing.assert_close(
        residual_alone(load_backbone(str(tmp_path), 2), ids),
        residual_alone(load_backbone(str(folder), 2), ids),
        rtol=0,
        atol=0,
    )


def test_a_layer_beyond_the_model_is_refused(family_folder):
    folder = str(family_folder("llama"))
    with pytest.raises(ValueError, match=r"layer 4 is beyond .* which has 3 blocks\. Pass --model\.layer"):
        read_config(folder, 4)


def test_an_unknown_family_is_refused(tmp_path):
    GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a gpt2 model, supported are llama, mistral.*Pass --model\.name"):
        load_backbone(str(tmp_path), 1)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model folder .*nowhere\. Pass --model\.name"):
        load_backbone(str(tmp_path / "nowhere"), 1)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model_type": "no-such-family"})])
def test_a_folder_without_a_readable_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="cannot read the model"):
        load_backbone(str(tmp_path), 1)


def test_an_exported_model_of_a_family_that_is_not_listed_is_read_with_one_mask_for_all_blocks(
    family_folder, monkeypatch
):
    folder, ids = family_folder("llama"), random_ids(9, 2, LENGTH)
    wanted = residual_alone(load_backbone(str(folder), 2), ids)
    model = load_backbone(str(folder), 2)
    unlisted = {name: family for name, family in FAMILIES.items() if name != "llama"}
    monkeypatch.setattr("sarm.nn.backbone.FAMILIES", unlisted)
    torch.testing.assert_close(residual_alone(model, ids), wanted, rtol=0, atol=0)


@kinds
@torch.no_grad()
def test_activations_of_several_layers_from_one_pass_are_those_of_each(family, family_folder):
    """At wanted places of packed rows, as extraction takes them; behind the last block without the norm that follows it."""
    prompt = random_ids(4, 7).tolist()
    answers = {n: prompt + random_ids(5 + n, 3 + 2 * n).tolist() for n in range(3)}
    batch = collate(answer_rows(list(answers.items()), 64), pad_id=2)
    whole = load_backbone(str(family_folder(family)), NUM_LAYERS)
    found = residuals_at(
        whole, [1, 2, NUM_LAYERS], batch.rows, batch.columns, batch.input_ids, batch.position_ids, batch.segment_ids
    )
    for layer, taken in zip([1, 2, NUM_LAYERS], found, strict=True):
        cut = load_backbone(str(family_folder(family)), layer)
        for key, activation in zip(batch.keys, taken, strict=True):
            wanted = residual_alone(cut, torch.tensor([answers[key]]))[0, -1]
            torch.testing.assert_close(activation, wanted, rtol=1e-5, atol=1e-5)
