"""From a batch's residual stream to rewards and their latents, as vLLM lays it out; vLLM itself is not needed.

T tokens of all conversations of a batch, one behind the other; N conversations; D d_in; L tokens of the longest; K active latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sarm.data.formats.vllm_layout import ServedSarm
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.answer_places import Places, find_places
from sarm.nn.architectures import build_sae
from sarm.nn.heads import SparseLinear
from sarm.settings.checks import UserError


class Pooled(NamedTuple):
    """Rewards in the folder's scale and raw ones; NaN for an answer that was cut off, where such are refused. Latents with their values."""

    rewards: Float[Tensor, " conversations"]
    raw: Float[Tensor, " conversations"]
    cut_off: Bool[Tensor, " conversations"]
    unopened: Bool[Tensor, " conversations"]
    unscored: Bool[Tensor, " conversations"]
    latents: Int[Tensor, "conversations k"]
    values: Float[Tensor, "conversations k"]
    contributions: Float[Tensor, "conversations k"]


_FIGURES = ("rewards", "raw", "cut_off", "unopened", "unscored")
_BY_LATENT = ("latents", "values", "contributions")


class RewardHead(nn.Module):
    """SAE and head of a SARM, in float32, over the residual stream of whole conversations."""

    def __init__(self, served: ServedSarm, d_in: int):
        super().__init__()
        self.served = served
        self.sae = build_sae(d_in=d_in, d_sae=served.d_sae, k=served.k, **served.sae)
        self.sae.standardises = served.standardise
        self.score = SparseLinear(served.d_sae)
        # vLLM makes modules where the default dtype is the backbone's.
        self.float()

    def forward(self, hidden_TD: Float[Tensor, "tokens d_in"], ids: Sequence[Tensor], lengths: Sequence[int]) -> Pooled:
        """`ids` are the token ids of each conversation, on the CPU; `lengths` how many rows of `hidden_TD` each has."""
        places = places_of(ids, self.served)
        starts_N = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        h_ND = hidden_TD[(starts_N + places.columns).to(hidden_TD.device)]
        codes = self.sae(self.sae.rows_of(h_ND))
        raw_N = self.score(codes).squeeze(-1)
        cut_off_N, unopened_N, unscored_N = (
            flag.to(raw_N.device) for flag in (places.cut_off, places.unopened, places.unscored)
        )
        fixed = self.served.penalty if self.served.on_cut_off == "penalise" else float("nan")
        raw_N = raw_N.masked_fill(cut_off_N, fixed)
        is_standardised = self.served.scale == "standardised"
        rewards_N = (raw_N - self.served.reward_mean) / self.served.reward_std if is_standardised else raw_N
        # What pays for a fixed reward is no latent.
        values_NK = codes.values.masked_fill(cut_off_N[:, None], 0.0)
        return Pooled(
            rewards=rewards_N,
            raw=raw_N,
            cut_off=cut_off_N,
            unopened=unopened_N,
            unscored=unscored_N,
            latents=codes.indices,
            values=values_NK,
            contributions=values_NK * self.score.weight[0, codes.indices],
        )


def places_of(ids: Sequence[Tensor], served: ServedSarm) -> Places:
    """Where each conversation is rewarded, as everywhere (`find_places`). Nothing is closed: the tokens are what they are."""
    longest = max(len(one) for one in ids)
    ids_NL = torch.zeros(len(ids), longest, dtype=torch.long)
    mask_NL = torch.zeros_like(ids_NL)
    for row, one in enumerate(ids):
        ids_NL[row, : len(one)], mask_NL[row, : len(one)] = one.long(), 1
    return find_places(ids_NL, mask_NL, served.answer_place, served.end_of_turn_id)


def packed(pooled: Pooled) -> Float[Tensor, "conversations fields"]:
    """All of it in one row a conversation, in float64, which holds every id of a latent: vLLM carries one tensor for each."""
    figures = [getattr(pooled, name)[:, None] for name in _FIGURES]
    return torch.cat([one.double() for one in (*figures, *(getattr(pooled, name) for name in _BY_LATENT))], 1)


def explanation_of(row_F: Float[Tensor, " fields"]) -> dict[str, Any]:
    """What is answered for a packed row: the latents that are active, the largest contributions first."""
    reward, raw, *flags = row_F[: len(_FIGURES)].tolist()
    latents, values, contributions = row_F[len(_FIGURES) :].reshape(len(_BY_LATENT), -1).tolist()
    active = [one for one in zip(latents, values, contributions, strict=True) if one[1] != 0]
    active.sort(key=lambda one: -abs(one[2]))
    return {
        "reward": reward,
        "raw_reward": raw,
        **{name: bool(flag) for name, flag in zip(_FIGURES[2:], flags, strict=True)},
        "latents": [int(latent) for latent, _, _ in active],
        "values": [value for _, value, _ in active],
        "contributions": [contribution for _, _, contribution in active],
    }


def ids_asked_for(data: Any, chat: ChatTokenizer, served: ServedSarm) -> list[list[int]]:
    """Token ids of what a request asks to be explained: `conversations`, lists of messages, or `input_ids`, lists of ids.

    Where `finish` says "length" for a conversation, its answer was cut off, so it is left without an end of turn.
    Raises UserError for any other request, and for an answer that was cut off where such are refused.
    """
    if not isinstance(data, Mapping) or len({"conversations", "input_ids"} & data.keys()) != 1 or data.keys() - {"conversations", "input_ids", "finish"}:  # fmt: skip
        raise UserError('data must be an object with "conversations", lists of messages, and "finish" if some were cut off; or with "input_ids", lists of token ids.')  # fmt: skip
    name = "conversations" if "conversations" in data else "input_ids"
    asked = data[name]
    if not isinstance(asked, list) or not asked or not all(isinstance(one, list) and one for one in asked):
        raise UserError(f"data.{name} must be a list of lists with something in each.")
    if name == "input_ids":
        if "finish" in data:
            raise UserError("data.finish is not said of ids, which show it themselves.")
        if not all(type(one) is int and one >= 0 for own in asked for one in own):
            raise UserError("data.input_ids must hold whole numbers from 0.")
        found = [list(own) for own in asked]
    else:
        finish = data.get("finish", ["stop"] * len(asked))
        if not isinstance(finish, list) or len(finish) != len(asked) or not all(how in ("stop", "length") for how in finish):  # fmt: skip
            raise UserError('data.finish must be "stop" or "length" for each conversation.')
        for place, own in enumerate(asked):
            if not isinstance(own[-1], Mapping) or own[-1].get("role") != "assistant":
                raise UserError(f"conversation {place} does not end with the assistant's turn, which is what is rewarded.")  # fmt: skip
        found = [
            tokens.ids[:-1] if how == "length" else tokens.ids
            for tokens, how in zip(chat.encode(asked), finish, strict=True)
        ]
    if served.on_cut_off == "refuse":
        cut_off = places_of([torch.tensor(own) for own in found], served).cut_off
        if cut_off.any():
            raise UserError(f"conversations {cut_off.nonzero().flatten().tolist()} have no end of turn behind the answer's opening: the answer was cut off, and this model refuses such.")  # fmt: skip
    return found
