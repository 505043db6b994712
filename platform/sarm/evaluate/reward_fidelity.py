"""How much a linear reward changes when the dictionary stands in for the activations."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from sarm.data.store.activations import ActivationStore
from sarm.data.store.looked_groups import is_heldout
from sarm.evaluate.probe import fit_probe
from sarm.nn.losses import reward_fidelity
from sarm.nn.sae import Sae, standardise

_ROWS_AT_ONCE = 1024


class ChatProbe(NamedTuple):
    """A probe of the pairs that SAE training does not hold out, and the held-out rows, standardised."""

    weight: Float[torch.Tensor, " d_in"]
    heldout: Float[torch.Tensor, "rows d_in"]


def chat_probe(chat: ActivationStore, heldout_share: float, seed: int) -> ChatProbe | None:
    """A logistic probe of the rewarded tokens in `activations/chat`; None if pairs of fewer than 3 prompts are left."""
    table, h_ND = chat.read(["row_id", "doc_id", "side"])
    places: dict[int, dict[str, int]] = {}
    for i, (pair, side) in enumerate(zip(table["row_id"].to_pylist(), table["side"].to_pylist(), strict=True)):
        places.setdefault(pair, {})[side] = i
    prompts = np.array(table["doc_id"].to_pylist())
    held_out = np.array([is_heldout(prompt, heldout_share) for prompt in prompts])
    usable = h_ND.isfinite().all(1).numpy() & (h_ND.std(1) > 0).numpy()
    sides = [(both["chosen"], both["rejected"]) for both in places.values() if both.keys() >= {"chosen", "rejected"}]
    pairs = np.array([both for both in sides if usable[list(both)].all()], dtype=np.int64).reshape(-1, 2)
    train = pairs[~held_out[pairs[:, 0]]]
    test = pairs[held_out[pairs[:, 0]]].ravel()
    if len(np.unique(prompts[train[:, 0]])) < 3:
        return None
    chosen_ND, rejected_ND = (standardise(h_ND[train[:, side]]).numpy() for side in (0, 1))
    probe = fit_probe(chosen_ND, rejected_ND, prompts[train[:, 0]], seed)
    return ChatProbe(torch.from_numpy(probe.weight), standardise(h_ND[test]))


def chat_reward_fidelity(sae: Sae, chat: ActivationStore, heldout_share: float, seed: int) -> float | None:
    """`reward_fidelity` of a logistic probe at the chat ends of held-out prompts; the probe is fitted on the other prompts' pairs.

    None if there are fewer than 3 of these, or no two held-out rewards differ.
    """
    probe = chat_probe(chat, heldout_share, seed)
    if probe is None:
        return None
    device = sae.b_dec.device
    with torch.no_grad():
        parts = [sae.decode(sae(x.to(device))).cpu() for x in probe.heldout.split(_ROWS_AT_ONCE)]
    return reward_fidelity(probe.heldout, torch.cat(parts), probe.weight) if parts else None
