"""Integrated gradients of a reward by edited features, against a dense reference in float64, under a linear head and under one with kinks."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from transformers import LlamaConfig, LlamaModel

from sarm.audit.codes import AuditCodes
from sarm.audit.patching import term_figures
from sarm.data.formats.attached_folder import Attached
from sarm.nn.architectures import build_sae
from sarm.nn.splice import LatentEdit, Splice
from sarm.passes.attached_model import AttachedModel
from sarm.passes.path_attribution import FEWEST, TOLERANCE, path_places, path_terms
from sarm.passes.reward_gradients import Conversations, effects
from sarm.passes.reward_heads import _Layers

D_IN, D_SAE, K, LAYER = 24, 40, 6, 1
LENGTHS = (9, 6, 12)
EDITED = list(range(0, D_SAE, 3))


class Head(nn.Module):
    def __init__(self, *shapes: tuple[int, int]):
        super().__init__()
        # The first bias puts the kinks near the activations, as training does.
        maps = [(2.0 * torch.randn(shape), 0.1 * torch.randn(shape[0])) for shape in shapes]
        self.layers = _Layers(maps)

    def forward(self, x_BD: torch.Tensor, _: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers(x_BD).squeeze(-1)


def made(kind: str, *, standardises: bool = True) -> tuple[Any, Conversations]:
    """A model with a random dictionary, and conversations of several lengths; `kind` is the head's: linear, or with a ReLU between two maps."""
    torch.manual_seed(3)
    config = LlamaConfig(hidden_size=D_IN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, initializer_range=0.4)  # fmt: skip
    body = LlamaModel(config).eval().requires_grad_(requires_grad=False)
    head = Head((1, D_IN)) if kind == "linear" else Head((6, D_IN), (1, 6))
    head.requires_grad_(requires_grad=False)
    sae = build_sae("topk", D_IN, D_SAE, K).requires_grad_(requires_grad=False)
    for weight in (sae.W_enc, sae.W_dec):
        nn.init.normal_(weight)
    sae.standardises = standardises
    ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)))
    attached = Attached(sae=sae, weight=torch.zeros(D_SAE), layer=LAYER, classifier=Path("none"), identity="", head="", provenance={})  # fmt: skip
    return AttachedModel(body, head, attached), Conversations(ids, torch.tensor(LENGTHS) - 1)


class Dense:
    """One conversation in float64: codes by their definition, the edited pass, and each latent's slope along the path by autograd."""

    def __init__(self, model: Any, ids: list[int], factor: float, *, rewarded_alone: bool):
        self.body, self.head = copy.deepcopy(model.body).double(), copy.deepcopy(model.head).double()
        self.ids, sae = torch.tensor([ids]), model.sae
        with torch.no_grad():
            h_LD = self.body(self.ids, output_hidden_states=True).hidden_states[LAYER][0]
        unit_L1 = h_LD.std(-1, keepdim=True) + 1e-6 if sae.standardises else torch.ones_like(h_LD[:, :1])
        x_LD = (h_LD - h_LD.mean(-1, keepdim=True)) / unit_L1 if sae.standardises else h_LD
        pre_LS = (x_LD - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
        kept = pre_LS.topk(K, dim=-1)
        z_LS = torch.zeros_like(pre_LS).scatter(-1, kept.indices, kept.values.clamp_min(0))
        self.steps_LE = (factor - 1) * unit_L1 * z_LS[:, EDITED]
        if rewarded_alone:
            self.steps_LE[:-1] = 0
        self.directions_ED = sae.W_dec.double()[EDITED]

    def reward(self, scale_E: torch.Tensor) -> torch.Tensor:
        """The reward with each latent's step taken so far."""
        change_LD = (scale_E * self.steps_LE) @ self.directions_ED

        def add(_block: Any, _inputs: Any, output: Any) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            return hidden + change_LD if isinstance(output, torch.Tensor) else (hidden + change_LD, *output[1:])

        handle = self.body.layers[LAYER - 1].register_forward_hook(add)
        try:
            return self.head(self.body(self.ids).last_hidden_state[0, -1:])[0]
        finally:
            handle.remove()

    @property
    def effect(self) -> float:
        with torch.no_grad():
            return float(self.reward(torch.ones(len(EDITED))) - self.reward(torch.zeros(len(EDITED))))

    def terms(self, num: int) -> torch.Tensor:
        total_E = torch.zeros(len(EDITED), dtype=torch.float64)
        for place, weight in path_places(num):
            scale_E = torch.full((len(EDITED),), place, dtype=torch.float64, requires_grad=True)
            (slope_E,) = torch.autograd.grad(self.reward(scale_E), scale_E)
            total_E += weight * slope_E
        return total_E


def splice_of(model: Any, factor: float) -> Splice:
    return Splice(model.sae, LAYER, [LatentEdit(latent, "scale", factor) for latent in EDITED])


@pytest.mark.parametrize(("kind", "standardises", "rewarded_alone"), [("linear", True, False), ("linear", False, True), ("kinked", True, False), ("kinked", False, True)])  # fmt: skip
def test_terms_are_those_of_a_dense_reference_and_add_up_to_the_effect_by_patching(kind, standardises, rewarded_alone):
    model, batch = made(kind, standardises=standardises)
    places_BL = batch.is_rewarded if rewarded_alone else batch.is_token
    found = path_terms(model, batch, splice_of(model, 0.0), places_BL)
    patched = effects(model, batch, [(splice_of(model, 0.0), places_BL)]).patched[:, 0]
    assert found.effect.tolist() == pytest.approx(patched.tolist(), abs=1e-4)
    largest = float(found.effect.abs().max())
    assert largest > 0.1
    assert (found.residual.abs() <= TOLERANCE * torch.maximum(found.effect.abs(), found.effect.abs().mean())).all()
    for row, length in enumerate(LENGTHS):
        dense = Dense(model, batch.input_ids[row, :length].tolist(), 0.0, rewarded_alone=rewarded_alone)
        assert float(found.effect[row]) == pytest.approx(dense.effect, abs=2e-4 * max(1.0, largest))
        wanted_E = dense.terms(int(found.places[row]))
        # A place that lies next to a kink may fall on its other side in float32.
        tolerance = 1e-3 if kind == "linear" else 2 * TOLERANCE
        assert found.terms[row].tolist() == pytest.approx(wanted_E.tolist(), abs=tolerance * max(1.0, largest))


def test_places_are_doubled_until_the_terms_are_complete_and_what_is_missed_without_that_is_the_residual():
    smooth, batch = made("linear")
    found = path_terms(smooth, batch, splice_of(smooth, 0.0), batch.is_token)
    assert found.places.max() <= 4 * FEWEST, "a smooth reward takes few"
    kinked, batch = made("kinked")
    few = path_terms(kinked, batch, splice_of(kinked, 0.0), batch.is_token, fewest=2, most=2)
    many = path_terms(kinked, batch, splice_of(kinked, 0.0), batch.is_token, fewest=2)
    assert few.residual.abs().max() > TOLERANCE * few.effect.abs().mean()
    assert few.places.tolist() == [2] * len(LENGTHS), "what does not add up keeps its residual"
    assert many.places.max() > 2
    assert many.residual.abs().max() < few.residual.abs().max()


def test_an_edit_that_changes_nothing_has_no_terms():
    model, batch = made("kinked")
    found = path_terms(model, batch, splice_of(model, 1.0), batch.is_token)
    assert not found.terms.any()
    assert not found.effect.any()
    assert found.places.tolist() == [FEWEST] * len(LENGTHS)


def test_figures_of_terms_are_those_of_their_definition():
    chosen, rejected = np.array([0, 2]), np.array([1, 3])
    z, none = sparse.csr_array((4, 2)), np.array(["", ""])
    target = AuditCodes(
        weight=np.ones(2), reward=np.zeros(4), tokens=np.ones(4), z=z, sentence=z, ends=np.ones(4, dtype=np.int64),
        residual=np.zeros((4, 2)), pair_ids=np.array(["a", "b"]), prompts=np.array(["p", "q"]), roles=none, subsets=none,
        chosen=chosen, rejected=rejected, required=np.zeros(2),
    )  # fmt: skip
    terms_RE = np.array([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0]])
    patched_R = terms_RE.sum(axis=1) + np.array([0.0, 0.01, 0.0, -1.0])
    found = term_figures(target, [7, 9], patched_R, terms_RE, np.array([16.0, 32.0, 16.0, 512.0]), 0.05)
    assert found.latents == [7, 9]
    assert found.terms == pytest.approx([(1.0 - 0.0 + 2.0 + 1.0) / 2, (2.0 - 1.0) / 2])
    size = np.abs(patched_R).mean()
    assert found.patched == pytest.approx((patched_R[0] - patched_R[1] + patched_R[2] - patched_R[3]) / 2)
    assert found.residual == pytest.approx(1.01 / 4 / size)
    assert found.residual_largest == pytest.approx(1.0 / size)
    assert (found.within_tolerance, found.places) == (0.75, 512)
