"""Interventions that can fail. R responses, N pairs, D d_in, S d_sae, G sets of latents, M latents deleted.

upstream    h' = h -+ sd(h) sum_i z_i d_i at the rewarded token, then standardise, encode and TopK again: competitors enter, so that the
            reward does not move by -+ sum w_i z_i (d_i: row i of W_dec). realised / linear says how much of it is left.
swap        the latents of a set change places between chosen and rejected; the margin moves by -2 sum w_i (z_i(c) - z_i(r))
deletion    (comprehensiveness) latents off, in an order fixed on other pairs; (sufficiency) only they are on (DeYoung et al. 2020)
sentences   the sentence that the features fire most at is cut out of the text, or, as placebo, another one

Under a linear head the swap and deletion of latents are sums of the reward's own terms: exact, no evidence about the backbone. What
makes them tests is the comparison with matched sets, and that order and sets were fixed on pairs of other prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from sarm.audit.codes import AuditCodes
from sarm.audit.steering import BesideControls, against_controls
from sarm.contracts.figures import OPTIONAL, SPREAD
from sarm.evaluate.intervals import Estimate, Interval, estimated, mean_interval
from sarm.evaluate.statistics import pair_credit
from sarm.nn.sae import STANDARDISE_EPS, Codes, Sae

_ROWS_AT_ONCE = 512


@runtime_checkable
class RewardModel(Protocol):
    """What the tests need of a SARM: its encoder, and the head that sums latents into a reward."""

    @property
    def sae(self) -> Sae: ...

    @property
    def score(self) -> Callable[[Codes], Tensor]: ...


@dataclass(frozen=True)
class DirectionFigures:
    """Margins after directions were removed or added upstream of TopK; in reward units, accuracies are shares of pairs."""

    realised_ci95: Interval
    """Of `change.value`, over prompts."""
    linear: float
    """What the head alone would give."""
    realised_share: float | None
    """Realised over linear change; None where the latter is 0."""
    accuracy_before: float
    accuracy_after: float
    change: BesideControls = field(metadata=SPREAD)
    """The mean change of the margin."""


@dataclass(frozen=True)
class UpstreamFigures:
    """Directions of a set, once taken from the residual and once added to it."""

    removed: DirectionFigures
    added: DirectionFigures


@dataclass(frozen=True, kw_only=True)
class SwapFigures:
    """Pairs whose latents changed places: the mean change of the margin, in reward units, and the share of orders that turned."""

    margin_ci95: Interval
    """Of `change.value`, over prompts."""
    change: BesideControls = field(metadata=SPREAD)
    flips: float
    flips_control_median: float


@dataclass(frozen=True)
class DeletionCurve:
    """By number of latents: what they carry of the mean margin, and the accuracy without them and with them alone."""

    margin_share: list[float]
    accuracy_without: list[float]
    accuracy_only: list[float]


@dataclass(frozen=True)
class DeletionFigures:
    """Curves of an order and, on average, of random ones, at `sizes` latents."""

    sizes: list[int]
    accuracy: float
    """With all latents."""
    ordered: DeletionCurve
    random: DeletionCurve
    aopc: BesideControls
    """The mean share of the margin over `sizes`."""


@dataclass(frozen=True)
class SentenceFigures:
    """Changes of the features' reward, in reward units, by cutting a sentence; no estimates without a response to cut."""

    num_responses: int
    own_sentence: Estimate | None = field(default=None, metadata=OPTIONAL)
    placebo: Estimate | None = field(default=None, metadata=OPTIONAL)
    difference: Estimate | None = field(default=None, metadata=OPTIONAL)


@torch.inference_mode()
def upstream_rewards(
    model: RewardModel,
    residual_RD: Float[Tensor, "responses d_in"],
    z_RE: Float[Tensor, "responses edited"],
    latents: Int64[NDArray[np.int64], " edited"],
    sign: float,
) -> Float[np.ndarray, " responses"]:
    """Rewards after sum_i z_i d_i was added to (`sign` 1) or taken from (-1) the residual, through TopK again."""
    decoder_ED = model.sae.W_dec[torch.from_numpy(latents)]
    rewards = []
    for start in range(0, len(residual_RD), _ROWS_AT_ONCE):
        h_BD = residual_RD[start : start + _ROWS_AT_ONCE]
        # One unit of what the SAE takes, in those of the residual.
        unit_B1 = (
            h_BD.std(dim=1, keepdim=True) + STANDARDISE_EPS if model.sae.standardises else torch.ones(len(h_BD), 1)
        )
        moved_BD = h_BD + sign * unit_B1 * (z_RE[start : start + _ROWS_AT_ONCE] @ decoder_ED)
        rewards.append(model.score(model.sae(model.sae.rows_of(moved_BD))).squeeze(-1))
    return torch.cat(rewards).double().numpy()


def upstream(
    model: RewardModel,
    codes: AuditCodes,
    selected: Int64[NDArray[np.int64], " edited"],
    control_sets_GE: Int64[NDArray[np.int64], "sets edited"],
) -> UpstreamFigures:
    """Margins of these pairs after each set's directions are removed, and added once more, beside matched sets."""
    rows = codes.responses
    place = {int(row): i for i, row in enumerate(rows)}
    chosen, rejected = (np.array([place[int(i)] for i in side]) for side in (codes.chosen, codes.rejected))
    residual_RD = torch.from_numpy(codes.residual[rows].copy())
    reward_R = codes.reward[rows]

    def margin_change(
        latents: Int64[NDArray[np.int64], " edited"], sign: float
    ) -> Float64[NDArray[np.float64], " pairs"]:
        z_RE = torch.from_numpy(codes.z[rows][:, latents].toarray()).float()
        change_R = (
            upstream_rewards(model=model, residual_RD=residual_RD, z_RE=z_RE, latents=latents, sign=sign) - reward_R
        )
        change_N: NDArray[np.float64] = change_R[chosen] - change_R[rejected]
        return change_N

    def moved(sign: float) -> DirectionFigures:
        realised_N = margin_change(selected, sign)
        linear_N = sign * (codes.difference[:, selected] @ codes.weight[selected])
        controls = np.array([margin_change(latents, sign).mean() for latents in control_sets_GE])
        linear = float(linear_N.mean())
        before_N = codes.margins
        return DirectionFigures(
            realised_ci95=mean_interval(realised_N, codes.prompts),
            linear=linear,
            realised_share=float(realised_N.mean() / linear) if abs(linear) > 1e-9 else None,
            accuracy_before=float(pair_credit(before_N).mean()),
            accuracy_after=float(pair_credit(before_N + realised_N).mean()),
            change=against_controls(float(realised_N.mean()), controls),
        )

    return UpstreamFigures(removed=moved(-1.0), added=moved(1.0))


def swap(
    codes: AuditCodes,
    selected: Int64[NDArray[np.int64], " edited"],
    control_sets_GE: Int64[NDArray[np.int64], "sets edited"],
) -> SwapFigures:
    """Margins and orders of the pairs after a set's latents change places between chosen and rejected."""
    before_N = codes.margins

    def changed(latents: Int64[NDArray[np.int64], " edited"]) -> Float64[NDArray[np.float64], " pairs"]:
        change_N: NDArray[np.float64] = -2 * (codes.difference[:, latents] @ codes.weight[latents])
        return change_N

    own_N = changed(selected)
    controls = [changed(latents) for latents in control_sets_GE]
    flips = [float((np.sign(before_N + one) != np.sign(before_N)).mean()) for one in [own_N, *controls]]
    return SwapFigures(
        margin_ci95=mean_interval(own_N, codes.prompts),
        change=against_controls(float(own_N.mean()), np.array([one.mean() for one in controls])),
        flips=flips[0],
        flips_control_median=float(np.median(flips[1:])),
    )


def deletion_curves(
    codes: AuditCodes,
    order: Int64[NDArray[np.int64], " ordered"],
    random_orders: Sequence[Int64[NDArray[np.int64], " shuffled"]],
    sizes: Sequence[int],
) -> DeletionFigures:
    """What the first m latents of an order carry, beside random orders: their share of the mean margin, and two accuracies.

    Under a linear head the share that is lost without them (comprehensiveness) is the share that they keep alone (sufficiency), so
    there is one column of it; accuracies without them and with them alone do differ. AOPC is the mean share over `sizes`.
    """
    whole = float(codes.margins.mean())

    def curve(latents: Int64[NDArray[np.int64], " ordered"]) -> DeletionCurve:
        terms_NM = (codes.difference[:, latents] * codes.weight[latents]).toarray().cumsum(axis=1)
        kept_MN = [terms_NM[:, min(m, len(latents)) - 1] for m in sizes]
        return DeletionCurve(
            margin_share=[float(kept.mean() / whole) if whole else 0.0 for kept in kept_MN],
            accuracy_without=[float(pair_credit(codes.margins - kept).mean()) for kept in kept_MN],
            accuracy_only=[float(pair_credit(kept).mean()) for kept in kept_MN],
        )

    own, controls = curve(order), [curve(latents) for latents in random_orders]
    aopc = [float(np.mean(one.margin_share)) for one in [own, *controls]]
    return DeletionFigures(
        sizes=list(sizes),
        accuracy=float(pair_credit(codes.margins).mean()),
        ordered=own,
        random=DeletionCurve(
            margin_share=np.mean([one.margin_share for one in controls], axis=0).tolist(),
            accuracy_without=np.mean([one.accuracy_without for one in controls], axis=0).tolist(),
            accuracy_only=np.mean([one.accuracy_only for one in controls], axis=0).tolist(),
        ),
        aopc=against_controls(aopc[0], np.array(aopc[1:])),
    )


def contribution_order(codes: AuditCodes) -> Int64[NDArray[np.int64], " ordered"]:
    """Latents by the size of their mean contribution to the margin of these pairs, largest first; silent ones left out."""
    mean_S = np.asarray(codes.difference.mean(axis=0)).ravel() * codes.weight
    order = np.argsort(-np.abs(mean_S), kind="stable")
    ordered: NDArray[np.int64] = order[np.abs(mean_S[order]) > 0]
    return ordered


def sentence_edits(
    texts: Sequence[str],
    fired: Sequence[Sequence[float]],
    ends_of: Callable[[str], list[int]],
    rng: np.random.Generator,
) -> list[tuple[str, str] | None]:
    """For each text, it without the sentence that the features fire most at, and without another random one (the placebo).

    `fired` is the features' sum at each sentence end. None where a text has fewer than two sentences, its ends and sums do not
    agree in number, or the features fire nowhere or everywhere alike.
    """
    edited: list[tuple[str, str] | None] = []
    for text, sums in zip(texts, fired, strict=True):
        ends = ends_of(text)
        if len(ends) < 2 or len(ends) != len(sums) or max(sums) <= min(sums):
            edited.append(None)
            continue
        top = int(np.argmax(sums))
        other = int(rng.choice([i for i in range(len(ends)) if i != top]))
        without = [_without(text, ends, i) for i in (top, other)]
        edited.append((without[0], without[1]) if all(part.strip() for part in without) and without[0] != without[1] else None)  # fmt: skip
    return edited


def _without(text: str, ends: Sequence[int], i: int) -> str:
    start = ends[i - 1] + 1 if i else 0
    return text[:start].rstrip() + text[ends[i] + 1 :] if i else text[ends[i] + 1 :].lstrip()


def deletion_effect(change_D2: Float[np.ndarray, "deletions 2"], prompts: Sequence[str]) -> SentenceFigures:
    """Mean change of the features' reward by cutting their own sentence, the placebo, and the difference, with intervals over prompts."""
    # One block, so that its columns lie in memory as before they are summed: their means depend on it in the last bit.
    columns_D3 = np.column_stack([change_D2, change_D2[:, 0] - change_D2[:, 1]])
    own, placebo, difference = (estimated(column, np.array(prompts)) for column in columns_D3.T)
    return SentenceFigures(len(columns_D3), own_sentence=own, placebo=placebo, difference=difference)
