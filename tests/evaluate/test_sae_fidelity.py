"""The reward fidelity of dictionaries whose reconstruction is known, on real extracted activations."""

from pathlib import Path

import torch

from sarm.data.store.activations import ActivationStore
from sarm.evaluate.reward_fidelity import chat_reward_fidelity
from sarm.nn.sae import standardise
from sarm.nn.topk import TopKSae

SHARE = 0.2


def test_a_dictionary_that_loses_nothing_keeps_the_reward_and_one_that_loses_all_does_not(extracted: Path) -> None:
    chat = ActivationStore(extracted / "activations" / "chat")
    x = standardise(chat.read()[1])
    d_in = x.shape[1]
    # Every vector is the sum of its positive and its negative parts.
    whole = TopKSae(d_in, 2 * d_in, 2 * d_in)
    empty = TopKSae(d_in, 2 * d_in, 1)
    with torch.no_grad():
        whole.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]).T)
        whole.W_dec.copy_(whole.W_enc.T)
        empty.W_enc.zero_()
        empty.W_dec.zero_()
        empty.b_dec.copy_(x.mean(0))
    kept, lost = (chat_reward_fidelity(sae, chat, SHARE, 0) for sae in (whole, empty))
    assert kept is not None
    assert kept > 1 - 1e-6
    assert lost is not None
    assert lost < 0.1


def test_without_enough_prompts_there_is_no_figure(extracted: Path) -> None:
    chat = ActivationStore(extracted / "activations" / "chat")
    assert chat_reward_fidelity(TopKSae(64, 128, 4), chat, 1.0, 0) is None
