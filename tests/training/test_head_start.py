"""The head's first weights, on real extracted activations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sarm.contracts.ids import stable_int
from sarm.data.store.activations import ActivationStore
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.evaluate.probe import fit_probe
from sarm.nn.backbone import residual_stream
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.sae import standardise
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError
from sarm.training import head_start
from sarm.training.head_start import start_head_


def untrained(folder: Path, chat: ChatTokenizer, sae: TopKSae | None) -> SarmForSequenceClassification:
    backbone = load_backbone(str(folder), 1)
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=1,
        d_sae=sae.d_sae if sae else 0,
        k=sae.k if sae else 0,
        head="sae" if sae else "scalar",
        end_of_turn_id=chat.end_of_turn_id,
        standardise=sae is None or sae.standardises,
    )
    return SarmForSequenceClassification(config, backbone, sae)


@pytest.mark.parametrize("head", ["sae", "scalar", "sae of raw activations"])
def test_the_first_reward_is_the_probe_s_reading_of_what_the_head_sees(
    head: str, extracted: Path, tiny_folder: Path, tiny_chat: ChatTokenizer
) -> None:
    activations = extracted / "activations" / "chat"
    pairs = load_pairs(extracted / "pairs", "train")
    place, h = ActivationStore(activations).read_sides()
    x = h if "raw" in head else standardise(h)
    sae = TopKSae(x.shape[1], 128, 8)
    sae.initialise_(x, torch.Generator().manual_seed(0))
    sae.standardises = "raw" not in head
    model = untrained(tiny_folder, tiny_chat, None if head == "scalar" else sae)
    start_head_(model, activations, pairs, seed=0)
    rows = pairs.select(["pair_id", "prompt_id"]).to_pylist()
    # The order in which pairs reach the solver moves its last digits.
    sides = [[place[stable_int(row["pair_id"]), side] for row in rows] for side in ("chosen", "rejected")]
    probe = fit_probe(*(x[side].numpy() for side in sides), np.array([row["prompt_id"] for row in rows]), 0)
    with torch.no_grad():
        codes = sae(x)
        seen = x if head == "scalar" else sae.decode(codes) - sae.b_dec
        weight = model.score.weight[0]
        found = x @ weight if head == "scalar" else (codes.values * weight[codes.indices]).sum(1)
    wanted = probe.rewards(seen.numpy())
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(found.numpy(), wanted, atol=0.01 * np.std(wanted))


def test_activations_of_other_pairs_are_refused(extracted: Path, tiny_folder: Path, tiny_chat: ChatTokenizer) -> None:
    held_out = load_pairs(extracted / "pairs", "heldout")
    model = untrained(tiny_folder, tiny_chat, None)
    with pytest.raises(UserError, match="head-init zero"):
        start_head_(model, extracted / "activations" / "chat", held_out, seed=0)


def test_a_model_without_stored_activations_is_read_on_the_device_that_others_wait_for(
    extracted: Path, tiny_folder: Path, tiny_chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_pairs(extracted / "pairs", "train")
    model = untrained(tiny_folder, tiny_chat, None)
    model.config.layer = 2
    order: list[object] = []
    monkeypatch.setattr(model.model, "to", order.append)
    monkeypatch.setattr(head_start, "residual_stream", lambda *inputs: order.append("pass") or residual_stream(*inputs))
    start_head_(
        model, extracted / "activations" / "chat", pairs, 0, list(prompt_groups(pairs, tiny_chat)), device="cpu"
    )
    assert order[0] == "cpu"
    assert set(order[1:]) == {"pass"}
    assert model.score.weight.abs().sum() > 0
