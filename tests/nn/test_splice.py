"""Features edited inside a forward pass: the change against its definition in float64, exact when nothing is edited, in every kind of block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.every_sae import DEFINITIONS, KINDS, kind_of, pre_acts
from tests.nn.family_options import COMMON, D_IN, NUM_LAYERS, OPTIONS, VOCABULARY
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig

from sarm.nn import splice as module
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae
from sarm.nn.splice import Editing, LatentEdit, Splice, blocks_of, edited
from sarm.nn.thresholds import ThresholdSae

D_SAE, K = 40, 6
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3", "mixtral", "phi", "glm4", "qwen3_next")
EDITS = [LatentEdit(3), LatentEdit(17, "scale", 2.5), LatentEdit(29, "clamp", 1.5)]


def random_sae(kind: str, *, standardises: bool = True, seed: int = 5) -> Sae:
    sae = build_sae(d_in=D_IN, d_sae=D_SAE, k=K, **kind_of(kind))
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(300, D_IN, generator=generator)
    sae.initialise_(sample, generator)
    with torch.no_grad():
        sae.b_dec.add_(0.1 * torch.randn(D_IN, generator=generator))
        if isinstance(sae, ThresholdSae):
            sae.threshold.copy_(0.3 + torch.rand(D_SAE, generator=generator))
    sae.standardises = standardises
    return sae


def codes_by_definition(sae: Sae, x: Tensor) -> Tensor:
    """Dense codes [N, S] out of training."""
    if isinstance(sae, ThresholdSae):
        pre = pre_acts(sae, x)
        return pre * (pre > sae.threshold)
    return DEFINITIONS[sae.architecture](sae, x)[0]


@torch.no_grad()
def change_by_definition(sae: Sae, h: Tensor, edits: list[LatentEdit]) -> Tensor:
    """h' - h in float64: both reconstructions whole, brought back to the residual's units with the token's own mean and deviation."""
    sae = sae.double()
    h = h.double()
    mean = h.mean(-1, keepdim=True) if sae.standardises else torch.zeros(len(h), 1, dtype=h.dtype)
    deviation = (h - h.mean(-1, keepdim=True)).square().sum(-1, keepdim=True).div(h.shape[-1] - 1).sqrt() + 1e-6
    deviation = deviation if sae.standardises else torch.ones_like(deviation)
    z = codes_by_definition(sae, (h - mean) / deviation)
    after = z.clone()
    for edit in edits:
        after[:, edit.latent] = {"suppress": 0 * z[:, edit.latent], "scale": edit.value * z[:, edit.latent], "clamp": torch.full_like(z[:, edit.latent], edit.value)}[edit.kind]  # fmt: skip
    raw = [(codes @ sae.W_dec + sae.b_dec) * deviation + mean for codes in (z, after)]
    return raw[1] - raw[0]


def activations(num: int = 200, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 + 20 * torch.rand(num, 1, generator=generator)
    return scale * torch.randn(num, D_IN, generator=generator) + torch.randn(num, 1, generator=generator)


@pytest.mark.parametrize("edits", [EDITS, EDITS[:1], EDITS[:2]], ids=["clamped", "suppressed", "scaled"])
@pytest.mark.parametrize("standardises", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_the_difference_of_two_reconstructions_in_the_residual_s_units(kind, standardises, edits):
    h = activations()
    h = h if standardises else h / h.std()
    expected = change_by_definition(random_sae(kind, standardises=standardises), h, edits)
    found = Splice(random_sae(kind, standardises=standardises), 1, edits).change(h)
    assert float(expected.abs().max()) > 0.1
    assert float((found - expected).abs().max()) < 2e-5 * float(h.abs().max())
    wide = Splice(random_sae(kind, standardises=standardises).double(), 1, edits).change(h.double())
    assert torch.allclose(wide, expected, atol=1e-12 * float(h.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_long_batches_are_edited_in_parts_without_a_difference(kind, monkeypatch):
    whole = Splice(random_sae(kind), 1, EDITS).change(activations())
    monkeypatch.setattr(module, "_PRE_AT_ONCE", 7 * D_SAE)
    assert torch.allclose(Splice(random_sae(kind), 1, EDITS).change(activations()), whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_one_and_silent_latents_change_no_bit(kind):
    h = activations()
    sae = random_sae(kind)
    z = codes_by_definition(random_sae(kind).double(), sae.rows_of(h).double())
    assert not Splice(sae, 1, [LatentEdit(latent, "scale", 1.0) for latent in range(D_SAE)]).change(h).any()
    silent = (z == 0).all(1).nonzero().flatten().tolist()
    rows = (z[:, 3] == 0).nonzero().flatten()
    assert len(rows), "latent 3 fires everywhere"
    assert not Splice(sae, 1, [LatentEdit(3)]).change(h[rows]).any(), silent


def random_model(family: str, **options: Any) -> Any:
    torch.manual_seed(11)
    if family == "bert":
        return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=VOCABULARY, hidden_size=D_IN, intermediate_size=48, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_labels=1, initializer_range=0.2)).eval()  # fmt: skip
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS[family], **options})
    return AutoModel.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    return lambda family: made.setdefault(family, random_model(family))


IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def outputs_of(model: Any) -> list[Tensor]:
    """What each block gives, and the last hidden state or the logits."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _b, _i, out: outputs.append(out if isinstance(out, Tensor) else out[0]))
        for block in blocks_of(model)
    ]
    found = model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return [*outputs, found["logits"] if "logits" in found else found["last_hidden_state"]]


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_a_pass_with_nothing_edited_is_the_plain_one_to_the_bit(family, model_of):
    model = model_of(family)
    plain = outputs_of(model)
    ones = [LatentEdit(latent, "scale", 1.0) for latent in range(D_SAE)]
    for edits in ([], ones):
        splices = [Splice(random_sae("topk"), 1, edits), Splice(random_sae("jumprelu"), NUM_LAYERS, edits)]
        with edited(model, splices):
            found = outputs_of(model)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), edits
    assert all(torch.equal(a, b) for a, b in zip(plain, outputs_of(model), strict=True)), "hooks were left behind"


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_an_edit_changes_its_block_s_output_by_its_definition_and_what_follows_and_nothing_before(family, model_of):
    model = model_of(family)
    plain = outputs_of(model)
    with edited(model, [Splice(random_sae("topk"), 2, EDITS)]):
        found = outputs_of(model)
    h = plain[1].reshape(-1, D_IN)
    expected = h + change_by_definition(random_sae("topk"), h, EDITS)
    assert torch.equal(found[0], plain[0])
    assert torch.allclose(found[1].reshape(-1, D_IN).double(), expected, atol=1e-5 * float(h.abs().max()))
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    assert not torch.allclose(found[-1], plain[-1], atol=1e-3)


def test_edits_at_two_layers_are_what_the_rest_of_the_model_makes_of_them(model_of):
    """The blocks of a Llama run by hand: the second edit sees what the first has changed."""
    model = model_of("llama")
    splices = [Splice(random_sae("topk"), 1, EDITS), Splice(random_sae("batch_topk"), 3, EDITS[:2])]
    with torch.no_grad(), edited(model, splices):
        found = model(input_ids=IDS).last_hidden_state
    with torch.no_grad():
        h = model.embed_tokens(IDS)
        positions = torch.arange(IDS.shape[1])[None]
        angles = model.rotary_emb(h, positions)
        mask = torch.full((1, 1, IDS.shape[1], IDS.shape[1]), float("-inf")).triu(1)
        for number, block in enumerate(model.layers, start=1):
            out = block(h, attention_mask=mask, position_embeddings=angles, position_ids=positions)
            h = out if isinstance(out, Tensor) else out[0]
            for layer, kind, edits in ((1, "topk", EDITS), (3, "batch_topk", EDITS[:2])):
                if number == layer:
                    flat = h.reshape(-1, D_IN)
                    h = (flat + change_by_definition(random_sae(kind), flat, edits)).to(h.dtype).view_as(h)
        expected = model.norm(h)
    assert torch.allclose(found, expected, atol=1e-4)


def test_chosen_places_alone_are_edited(model_of):
    model = model_of("llama")
    plain = outputs_of(model)
    places = torch.zeros_like(IDS, dtype=torch.bool)
    places[0, 7] = places[1, 4:9] = True
    with edited(model, [Splice(random_sae("topk"), 2, EDITS)], places):
        found = outputs_of(model)
    moved = (found[1] != plain[1]).any(-1)
    assert torch.equal(moved, places)
    # No token looks ahead.
    assert torch.equal(found[-1][0, :7], plain[-1][0, :7])
    assert not torch.equal(found[-1][0, 7:], plain[-1][0, 7:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_models_in_sixteen_bits_keep_their_type_and_their_bits(family):
    model = random_model(family).to(torch.bfloat16)
    plain = outputs_of(model)
    silent = LatentEdit(0, "scale", 1.0)
    with edited(model, [Splice(random_sae("topk"), 2, [silent])]):
        assert all(torch.equal(a, b) for a, b in zip(plain, outputs_of(model), strict=True))
    with edited(model, [Splice(random_sae("topk"), 2, EDITS)]):
        found = outputs_of(model)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    h = plain[1].reshape(-1, D_IN).float()
    expected = h + change_by_definition(random_sae("topk"), h, EDITS).float()
    # One rounding to 16 bits, and no more.
    assert torch.allclose(found[1].reshape(-1, D_IN).float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "edits", "d_in", "said"),
    [
        (0, EDITS, D_IN, "layer 0 is none of the model, which has 3 blocks"),
        (4, EDITS, D_IN, "layer 4 is none of the model, which has 3 blocks"),
        (1, EDITS, D_IN + 1, f"takes activations of width {D_IN + 1}, the model has {D_IN}"),
        (1, [LatentEdit(D_SAE)], D_IN, f"latent {D_SAE} is none of the SAE's {D_SAE}"),
        (1, [LatentEdit(-1)], D_IN, "latent -1 is none of the SAE's"),
        (1, [LatentEdit(2), LatentEdit(2)], D_IN, "latent 2 is edited twice"),
        (1, [LatentEdit(2, "clamp", float("nan"))], D_IN, "expected a finite number"),
        (1, [LatentEdit(2, "boost", 1.0)], D_IN, "must be one of suppress, scale, clamp"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(layer, edits, d_in, said, model_of):
    with pytest.raises(ValueError, match=said) as error:
        Editing(model_of("llama"), [Splice(build_sae("topk", d_in, D_SAE, K), layer, edits)])
    assert "\n" not in str(error.value)


def test_one_layer_is_edited_by_one_dictionary(model_of):
    with pytest.raises(ValueError, match="layer 2 is edited twice"):
        Editing(model_of("llama"), [Splice(random_sae("topk"), 2, EDITS)] * 2)


def test_a_model_without_blocks_is_refused():
    class Flat(torch.nn.Module):
        config = BertConfig(num_hidden_layers=3)

    with pytest.raises(ValueError, match="has no list of 3 blocks"):
        blocks_of(Flat())
