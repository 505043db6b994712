"""Rewards of shared and joined rows are those of one sequence at a time; what the SAE costs does not grow with the sequence."""

from typing import Any

import pytest
import torch
from tests.nn.test_backbone import kinds
from torch.utils._python_dispatch import TorchDispatchMode

from sarm.data.tokens.packing import answer_rows, token_batches
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae

D_SAE, K, END = 211, 6, 2
# In bfloat16 a product's rounding depends on the shape of its matrices: eight bits of mantissa, some ten roundings deep.
BFLOAT16_SHARE = 0.03


def build(
    folder, layer: int = 2, head: str = "sae", dtype: torch.dtype = torch.float32
) -> SarmForSequenceClassification:
    backbone, generator = load_backbone(str(folder), layer), torch.Generator().manual_seed(17)
    d_in = backbone.config.hidden_size
    sae = TopKSae(d_in, D_SAE, K) if head == "sae" else None
    if sae:
        sae.initialise_(torch.randn(100, d_in, generator=generator), generator)
    sizes = {"d_sae": D_SAE, "k": K} if sae else {}
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=layer, head=head, end_of_turn_id=END, **sizes)
    model = SarmForSequenceClassification(config, backbone, sae).eval()
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    model.model.to(dtype)
    return model


def conversations(num_prompts: int, num_answers: int) -> dict[Any, list[int]]:
    """Token ids by (prompt, answer); lengths differ, some answers begin alike."""
    generator = torch.Generator().manual_seed(num_answers)
    found = {}
    for prompt in range(num_prompts):
        length = int(torch.randint(1, 25, (1,), generator=generator))
        shared = torch.randint(3, 97, (length,), generator=generator).tolist()
        for answer in range(num_answers):
            tail = torch.randint(3, 97, (1 + (5 * answer + 3 * prompt) % 17,), generator=generator).tolist()
            found[prompt, answer] = [*shared, *([50, 51] if answer % 2 else []), *tail, END]
    return found


@torch.no_grad()
def packed(model, sequences: dict[Any, list[int]], row_tokens: int, batch_tokens: int) -> dict[Any, float]:
    prompts = sorted({prompt for prompt, _ in sequences})
    rows = [
        row
        for prompt in prompts
        for row in answer_rows([(key, ids) for key, ids in sequences.items() if key[0] == prompt], row_tokens)
    ]
    found: dict[Any, float] = {}
    for batch in token_batches(rows, batch_tokens, pad_id=0):
        found |= dict(zip(batch.keys, model(**batch.model_inputs()).logits.squeeze(-1).tolist(), strict=True))
    return found


@torch.no_grad()
def alone(model, sequences: dict[Any, list[int]]) -> dict[Any, float]:
    return {key: model(input_ids=torch.tensor([ids])).logits.item() for key, ids in sequences.items()}


@pytest.mark.parametrize("head", ["sae", "scalar"])
@pytest.mark.parametrize("num_answers", [2, 4, 9])
@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [(400, 400), (60, 400), (60, 60), (1, 200)])
def test_k_answers_and_joined_prompts_get_the_rewards_of_single_sequences(
    family_folder, head, num_answers, row_tokens, batch_tokens
):
    model, sequences = build(family_folder("llama"), head=head), conversations(5, num_answers)
    wanted = alone(model, sequences)
    assert packed(model, sequences, row_tokens, batch_tokens) == pytest.approx(wanted, abs=2e-5)


@kinds
def test_every_kind_of_family_keeps_answers_apart(family_folder, family):
    """With windows, soft caps and masks by kind of layer."""
    model, sequences = build(family_folder(family), layer=3), conversations(4, 3)
    assert packed(model, sequences, 200, 400) == pytest.approx(alone(model, sequences), abs=1e-4)


def test_in_bfloat16_they_agree_to_its_rounding(family_folder):
    model, sequences = build(family_folder("llama"), head="scalar", dtype=torch.bfloat16), conversations(5, 4)
    wanted = alone(model, sequences)
    found = packed(model, sequences, 200, 400)
    spread = float(torch.tensor(list(wanted.values())).std())
    errors = torch.tensor([found[key] - wanted[key] for key in wanted])
    assert float(errors.square().mean().sqrt()) < BFLOAT16_SHARE * spread
    assert float(errors.abs().max()) > 0, "else nothing was rounded and the bound says nothing"


class LargestOfSae(TorchDispatchMode):
    """The most elements of any tensor with an axis of `D_SAE`, whichever operation made it, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        made = operation(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and D_SAE in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("recon", [False, True])
def test_what_the_sae_costs_does_not_grow_with_the_sequence(family_folder, recon):
    largest = {}
    for length in (8, 120):
        model = build(family_folder("llama"))
        ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))
        with LargestOfSae() as watch:
            output = model(input_ids=ids, reconstruct=recon)
            loss = output.logits.sum() + (output.reconstruction_loss.sum() if recon else 0.0)
            loss.backward()
        largest[length] = watch.elements
    d_in = model.sae.d_in
    assert largest[8] == largest[120] == D_SAE * d_in, "no more than the encoder itself"
