"""Starting a reward head at what a linear probe reads from the frozen activations, instead of at zero.

The blocks then begin to learn from a reward that already ranks, instead of from a head that is still growing. N responses, D d_in.
"""

from collections.abc import Hashable, Sequence, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from sarm.contracts.ids import hash_share, stable_int
from sarm.data.store.activations import ActivationStore
from sarm.data.tokens.groups import PromptGroup
from sarm.data.tokens.packing import token_batches
from sarm.evaluate.probe import fit_probe
from sarm.nn.backbone import residual_stream
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.sae import standardise
from sarm.settings.checks import UserError
from sarm.settings.reward import Encoder
from sarm.training.random_encoder import read_through_codes

_BATCH_TOKENS = 4096

# Enough for a linear head; keeps the activations of a large data set in memory.
_MAX_PAIRS = 20_000


def start_head_(
    model: SarmForSequenceClassification,
    activations: Path,
    pairs: pa.Table,
    seed: int,
    groups: Sequence[PromptGroup] = (),
    encoder: Encoder = "pretrained",
    device: torch.device | str = "cpu",
) -> None:
    """Set the head to the logistic probe w_D on the stored activations of these pairs.

    A model of another layer than was stored (the baseline of full depth) is run over `groups`, these pairs' tokens, instead; on `device`,
    where its blocks then stay: other workers wait for this, and a GPU's collectives do not wait for as long as a CPU takes. The probe
    reads what the SAE takes of activations. The papers' random linear map keeps its own start.

    A latent starts at W_dec w_D, what its direction adds to the probe's reward, so that the first reward is the probe's reading of
    x_hat. (A fit on the codes themselves has a coefficient for every latent, often more than there are prompts.) The decoder of a
    matched random encoder was never trained: the probe is read through the one that fits its codes best (`read_through_codes`).

    Raises UserError if the activations are not those of the pairs.
    """
    pairs = pairs.select(["pair_id", "prompt_id"])
    rows = sorted(pairs.to_pylist(), key=lambda row: hash_share(row["pair_id"]))[:_MAX_PAIRS]
    if encoder == "random_linear":
        return
    store = ActivationStore(activations)
    is_stored = store.metadata["layer"] == model.config.layer
    if is_stored:
        place, h_ND = store.read_sides()
    else:
        model.model.to(device)
        place, h_ND = frozen_sides(model, groups, {row["pair_id"] for row in rows})
    sides = [
        tuple(place.get((stable_int(row["pair_id"]), side), -1) for side in ("chosen", "rejected")) for row in rows
    ]
    usable = [i for i, both in enumerate(sides) if min(both) >= 0]
    if not usable:
        raise UserError(
            f"{activations} holds no activation of these pairs. Extract them again, or pass --reward.head-init zero."
        )
    rows_of = standardise if model.config.head == "scalar" else model.sae.rows_of
    chosen_ND, rejected_ND = (rows_of(h_ND[[sides[i][side] for i in usable]]).numpy() for side in (0, 1))
    prompts = np.array([rows[i]["prompt_id"] for i in usable])
    w_D = torch.from_numpy(fit_probe(chosen_ND, rejected_ND, prompts, seed).weight)
    with torch.no_grad():
        if model.config.head == "scalar":
            model.score.weight[0] = w_D
        elif encoder == "random_matched":
            model.score.weight[0] = read_through_codes(
                sae=model.sae, chosen_ND=chosen_ND, rejected_ND=rejected_ND, w_D=w_D, prompts_N=prompts, seed=seed
            )
        else:
            model.score.weight[0] = model.sae.W_dec @ w_D


@torch.no_grad()
def frozen_sides(
    model: SarmForSequenceClassification, groups: Sequence[PromptGroup], pair_ids: Set[str]
) -> tuple[dict[tuple[int, str], int], Float[Tensor, "responses d_in"]]:
    """What `ActivationStore.read_sides` returns, from a pass of the model's own backbone over these pairs' responses."""
    row_tokens = max((len(tokens.ids) for group in groups for tokens in group.tokens), default=1)
    needed = [group for group in groups if any(pair.pair_id in pair_ids for pair in group.pairs)]
    rows = [row for group in needed for row in group.rows(row_tokens)]
    found: dict[Hashable, int] = {}
    parts: list[Tensor] = []
    for batch in token_batches(rows, max(_BATCH_TOKENS, row_tokens), 0):
        inputs = batch.model_inputs(next(model.model.parameters()).device)
        hidden = residual_stream(model.model, inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"])
        found |= {key: len(found) + i for i, key in enumerate(batch.keys)}
        parts.append(hidden[inputs["rewarded_rows"], inputs["rewarded_columns"]].float().cpu())
    place = {
        (stable_int(pair.pair_id), side): found[group.prompt_id, number]
        for group in needed
        for pair in group.pairs
        for side, number in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return place, torch.cat(parts) if parts else torch.empty(0, model.model.config.hidden_size)
