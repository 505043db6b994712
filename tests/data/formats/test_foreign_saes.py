"""Other libraries' SAE files: each kind against its publisher's formula, places and rules that have no equal, and configs at random."""

import itertools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.compatibility import assert_listed
from tests.data.formats import foreign_saes as foreign
from tests.data.formats.foreign_saes import GEMMA_2, KINDS, LLAMA, NEW, OLD, K, X, back, jump, llama, pre

from sarm.data.formats.sae_formats import import_sae
from sarm.data.formats.sae_place import layer_at
from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, sae_of
from sarm.nn.sae import dense, standardise
from sarm.settings.checks import UserError

D_IN, D_SAE = foreign.D_IN, foreign.D_SAE


def computed(weights: SaeWeights) -> tuple[torch.Tensor, torch.Tensor]:
    sae = sae_of(weights)
    with torch.no_grad():
        codes = sae(standardise(X) if weights.input == STANDARDISED else X)
        return dense(codes, weights.d_sae).double(), sae.decode(codes).double()


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_reconstruction_are_those_of_the_publishers_formula(tmp_path, name):
    kind = KINDS[name]
    weights = import_sae(kind.write(tmp_path / "in"))
    codes, reconstruction = computed(weights)
    torch.testing.assert_close(codes, kind.codes, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(reconstruction, kind.reconstruction, rtol=5e-5, atol=5e-5)
    assert bool((kind.codes != 0).any(dim=1).all()), "rows without a latent would show nothing"
    place = weights.metadata.get("activations", {})
    assert (place.get("model"), place.get("layer")) == (kind.model, kind.layer)
    assert weights.input == (STANDARDISED if "standardised" in kind.rule else RESIDUAL)


def test_no_two_kinds_are_one_by_chance():
    apart = [KINDS[name].codes for name in ("SAELens 6, gated", "sparsify", "AutoEncoder", "AutoEncoderNew", "Gemma Scope", "Llama Scope", "Qwen Scope")]  # fmt: skip
    assert all(not torch.allclose(one, other, atol=1e-2) for one, other in itertools.combinations(apart, 2))


def test_the_page_lists_every_kind():
    rows = [
        [name, kind.library, kind.rule, "yes" if kind.model else "no", "yes" if kind.layer else "no"]
        for name, kind in KINDS.items()
    ]
    assert_listed("sae-files", ["file", "library or files", "rule", "says its model", "says its layer"], rows)


def lens(tmp_path: Path, config: dict, **tensors: torch.Tensor) -> Path:
    return foreign.saelens_file(config, **tensors)(tmp_path / f"lens-{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OLD | {"hook_name": "blocks.5.hook_mlp_out"}, "'blocks.5.hook_mlp_out', and reward models read the residual stream"),
        (OLD | {"hook_name": "blocks.5.attn.hook_z"}, "attention heads"),
        (OLD | {"hook_name": "blocks.0.hook_resid_pre"}, "reward models read the residual stream"),
        (OLD | {"hook_head_index": 2}, "attention head 2"),
        (OLD | {"activation_fn_str": "tanh-relu"}, "activation function tanh-relu"),
        (OLD | {"architecture": "jumprelu", "activation_fn_str": "topk"}, "a jumprelu SAE with the activation function topk"),
        (OLD | {"architecture": "topk", "activation_fn_kwargs": {"k": 3}}, "a topk SAE with the activation function relu"),
        (OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "signed": True}}, "TopK SAE with"),
        (OLD | {"activation_fn_str": "topk"}, "gives k=None"),
        (OLD | {"normalize_activations": True}, "by a factor that is not in the file"),
        (OLD | {"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        (OLD | {"d_sae": 99}, "says {'d_sae': 99}, its weights are 8 x 20"),
        (NEW | {"architecture": "standard", "activation_fn": "topk"}, "says version 6"),
        (NEW | {"architecture": "jumprelu_transcoder", "d_out": 9}, "maps one place of a model to another"),
        (NEW | {"architecture": "temporal"}, "holds a temporal SAE"),
        (NEW | {"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True}, "which only topk and abstopk do"),
        (NEW | {"architecture": "jumprelu"}, "'threshold' is missing"),
        (NEW | {"architecture": "topk", "k": 3, "metadata": {"sae_lens_version": "6.1", "hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}}, "a transcoder from"),
    ],
)  # fmt: skip
def test_saelens_files_without_an_equal_are_refused_with_the_reason(tmp_path, config, said):
    with pytest.raises(UserError) as refused:
        import_sae(lens(tmp_path, config))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_factor_that_the_config_does_not_speak_of_is_refused(tmp_path):
    with pytest.raises(UserError, match="has a scaling factor that is not 1"):
        import_sae(lens(tmp_path, OLD, scaling_factor=foreign.FACTOR))


def changed(path: Path, **fields) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path.parent


@pytest.mark.parametrize("name", ["sparsify", "AutoEncoderTopK", "Gemma Scope", "Gemma Scope 2", "Llama Scope"])
def test_other_places_than_the_residual_stream_are_refused_whatever_the_format(tmp_path, name):
    folder = KINDS[name].write(tmp_path / "in")
    if name == "sparsify":
        folder = folder.rename(folder.with_name("layers.5.mlp"))
    elif name == "AutoEncoderTopK":
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({"trainer": about["trainer"] | {"submodule_name": "mlp_out_layer_5"}})
        )
    elif name == "Gemma Scope":
        folder = Path(shutil.copytree(folder, tmp_path / "gemma-scope-2b-pt-mlp/layer_5/width_16k/average_l0_71"))
    elif name == "Gemma Scope 2":
        changed(folder / "config.json", hf_hook_point_in="model.layers.5.self_attn.o_proj.input")
    else:
        changed(
            folder / "hyperparams.json", hook_point_in="blocks.5.hook_mlp_out", hook_point_out="blocks.5.hook_mlp_out"
        )
    with pytest.raises(UserError, match="reward models read the residual stream after a block"):
        import_sae(folder)


def test_transcoders_and_crosscoders_are_refused_whatever_the_format(tmp_path):
    with pytest.raises(UserError, match="a transcoder"):
        import_sae(foreign.sparsify_folder(transcode=True)(tmp_path / "a"))
    with pytest.raises(UserError, match="from a module's input to its output"):
        import_sae(_in_and_out(tmp_path / "b"))
    with pytest.raises(UserError, match="holds a CrossCoder"):
        import_sae(foreign.dictionary("CrossCoder", foreign.LINEAR)(tmp_path / "c"))
    with pytest.raises(UserError, match=r"a transcoder from model\.layers\.5\.output to model\.layers\.6\.output"):
        import_sae(foreign.gemma_2(GEMMA_2 | {"hf_hook_point_out": "model.layers.6.output"})(tmp_path / "d"))
    folder = foreign.gemma_2(GEMMA_2)(tmp_path / "e")
    tensors = {name.lower(): one for name, one in (foreign.NAMED | {"threshold": foreign.THRESHOLD}).items()}
    save_file(tensors | {"w_dec": torch.randn(D_SAE, 2, D_IN)}, folder / "params.safetensors")
    with pytest.raises(UserError, match="a transcoder or crosscoder"):
        import_sae(folder)
    save_file(tensors | {"affine_skip_connection": torch.eye(D_IN)}, folder / "params.safetensors")
    with pytest.raises(UserError, match="a transcoder or crosscoder"):
        import_sae(folder)
    with pytest.raises(UserError, match=r"a transcoder from blocks\.5"):
        import_sae(llama(LLAMA | {"hook_point_out": "blocks.5.hook_mlp_out"})(tmp_path / "f"))
    with pytest.raises(UserError, match="'act_fn': 'topk'"):
        import_sae(llama(LLAMA | {"act_fn": "topk"})(tmp_path / "g"))


def _in_and_out(folder: Path) -> Path:
    return foreign.dictionary("AutoEncoder", foreign.LINEAR | {"bias": foreign.B_DEC}, io="in_and_out")(folder)


def test_a_name_that_tells_nothing_is_asked_for_and_one_that_contradicts_a_flag_is_refused(tmp_path):
    folder = KINDS["Gemma Scope"].write(tmp_path / "in")
    with pytest.raises(UserError, match="does not say of which Gemma Scope it is"):
        import_sae(Path(shutil.copytree(folder, tmp_path / "mine")))
    qwen = KINDS["Qwen Scope"].write(tmp_path / "qwen")
    with pytest.raises(UserError, match="says k=3, got k=9"):
        import_sae(qwen, k=9)
    alone = Path(shutil.copy(qwen, tmp_path / "layer5.sae.pt"))
    with pytest.raises(UserError, match=r"does not say how many latents are active\. Pass --k"):
        import_sae(alone)
    assert torch.allclose(computed(import_sae(alone, k=K))[0], KINDS["Qwen Scope"].codes, atol=1e-4)
    with pytest.raises(UserError, match="Its rule is not known"):
        import_sae(Path(shutil.copy(qwen, tmp_path / "sae.pt")), k=K)
    goodfire = KINDS["Goodfire"].write(tmp_path / "goodfire")
    with pytest.raises(UserError, match="does not say what is between them"):
        import_sae(Path(shutil.copy(goodfire, tmp_path / "other.pt")))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "unknown.pt")
    with pytest.raises(UserError, match="the names of no known SAE"):
        import_sae(tmp_path / "unknown.pt")


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_breaks_off_is_refused_in_one_line(tmp_path, name):
    path = KINDS[name].write(tmp_path / "in")
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    weights = max(files, key=lambda one: one.stat().st_size)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError) as refused:
        import_sae(path)
    assert "\n" not in str(refused.value)


HOOKS = {
    "blocks.5.hook_resid_post": 6,
    "blocks.5.hook_resid_pre": 5,
    "model.layers.5": 6,
    "model.layers.5.output": 6,
    "model.language_model.layers.5.output": 6,
    "layers.5": 6,
    "transformer.h.5": 6,
    "gpt_neox.layers.5": 6,
    "resid_post_layer_5": 6,
}
OTHER_HOOKS = ["blocks.5.hook_mlp_out", "blocks.5.hook_resid_mid", "blocks.5.attn.hook_z", "model.layers.5.mlp", "hook_embed", "blocks.0.hook_resid_pre", "layers.5.output.0", "blocks.5.hook_resid_post.x"]  # fmt: skip


def test_hooks_of_the_residual_stream_have_their_layer_and_others_none():
    assert {hook: layer_at(hook, "x") for hook in HOOKS} == HOOKS
    for hook in OTHER_HOOKS:
        with pytest.raises(UserError, match="reward models read the residual stream"):
            layer_at(hook, "x")


def optional(name: str, *values: object) -> st.SearchStrategy[dict[str, object]]:
    return st.one_of(st.just({}), *(st.just({name: value}) for value in values))


CONFIGS = st.tuples(
    optional("architecture", "standard", "topk", "jumprelu", "abstopk", "gated", "transcoder", "batchtopk", None, 3),
    optional("activation_fn_str", "relu", "topk", "tanh-relu", None),
    optional("activation_fn", "relu", "topk"),
    optional("activation_fn_kwargs", {}, {"k": 2}, {"k": 4}, {"k": 2, "signed": True}),
    optional("k", 2, 5, 99),
    optional("apply_b_dec_to_input", True, False),
    optional("normalize_activations", "none", None, False, True, "layer_norm", "expected_average_only_in", "constant_norm_rescale"),
    optional("finetuning_scaling_factor", True, False),
    optional("rescale_acts_by_decoder_norm", True, False),
    optional("reshape_activations", "none", "hook_z"),
    optional("hook_name", *HOOKS, *OTHER_HOOKS),
    optional("sae_lens_version", "5.11.0", "6.2.0"),
).map(lambda parts: {key: value for part in parts for key, value in part.items()})  # fmt: skip


def by_the_librarys_rules(config: dict, factor: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstruction as the release computes that would have written such a config; written from its forward pass, not from the reader."""
    is_old = not config.get("sae_lens_version", "").startswith("6")
    kind = config.get("architecture", "standard") or "standard"
    function = (config.get("activation_fn_str") or config.get("activation_fn") or "relu") if is_old else "relu"
    x = standardise(X) if config.get("normalize_activations") == "layer_norm" else X
    values = pre(foreign.B_DEC if config.get("apply_b_dec_to_input", True) else None, x)
    scales = foreign.NORMS if config.get("rescale_acts_by_decoder_norm") else torch.ones(D_SAE).double()
    if function == "topk" or kind in ("topk", "abstopk"):
        kwargs = config.get("activation_fn_kwargs", {}) if is_old else {}
        k = kwargs.get("k", config.get("k"))
        values = values * scales
        chosen = values.abs().topk(k, 1).indices if kind == "abstopk" else values.topk(k, 1).indices
        kept = values if kind == "abstopk" else values.relu()
        codes = torch.zeros_like(values).scatter(1, chosen, kept.gather(1, chosen))
    elif kind == "jumprelu":
        codes = jump(values, foreign.THRESHOLD)
    else:
        assert kind == "standard", kind
        codes = values.relu()
    shown = codes / scales
    return codes, back(shown * foreign.FACTOR.double() if factor else shown)


@settings(max_examples=max(400, settings().max_examples))
@given(CONFIGS, st.booleans())
def test_no_config_is_read_as_another_architecture(config, has_factor):
    tensors = {"threshold": foreign.THRESHOLD} | ({"scaling_factor": foreign.FACTOR} if has_factor else {})
    with tempfile.TemporaryDirectory() as place:
        folder = foreign.saelens_file(config, **tensors)(Path(place) / "sae")
        try:
            weights = import_sae(folder)
        except UserError:
            return
    codes, reconstruction = computed(weights)
    expected, rebuilt = by_the_librarys_rules(config, has_factor)
    torch.testing.assert_close(codes, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reconstruction, rebuilt, rtol=1e-4, atol=1e-4)
    hook = config.get("hook_name")
    assert hook not in OTHER_HOOKS
    assert weights.metadata.get("activations", {}).get("layer") == HOOKS.get(hook)
    if has_factor:
        assert config.get("finetuning_scaling_factor") is True


def test_configs_that_are_right_are_read_and_not_refused(tmp_path):
    """The other side of the property: a reader that refuses all would have it, too."""
    for config in (OLD, OLD | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}, NEW | {"architecture": "abstopk", "k": 2}, NEW | {"architecture": "topk", "k": 2, "normalize_activations": "layer_norm"}):  # fmt: skip
        weights = import_sae(lens(tmp_path, config))
        expected, rebuilt = by_the_librarys_rules({**config, **config.get("metadata", {})}, factor=False)
        torch.testing.assert_close(computed(weights)[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(computed(weights)[1], rebuilt, rtol=1e-4, atol=1e-4)
