"""How much a linear reward changes when the dictionary stands in for the activations."""

import numpy as np
import torch

from sarm.data.store.activations import ActivationStore
from sarm.data.store.shuffled_rows import is_heldout
from sarm.evaluate.probe import fit_probe
from sarm.nn.losses import reward_fidelity
from sarm.nn.sae import Sae, standardise

_ROWS_AT_ONCE = 1024


def chat_reward_fidelity(sae: Sae, chat: ActivationStore, heldout_share: float, seed: int) -> float | None:
    """`reward_fidelity` of a logistic probe at the chat ends of held-out prompts; the probe is fitted on the other prompts' pairs.

    None if there are fewer than 3 of these, or no two held-out rewards differ.
    """
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
    weight_D = torch.from_numpy(fit_probe(chosen_ND, rejected_ND, prompts[train[:, 0]], seed).weight)
    x_ND = standardise(h_ND[test])
    device = sae.b_dec.device
    with torch.no_grad():
        parts = [sae.decode(sae(x.to(device))).cpu() for x in x_ND.split(_ROWS_AT_ONCE)]
    return reward_fidelity(x_ND, torch.cat(parts), weight_D) if parts else None
