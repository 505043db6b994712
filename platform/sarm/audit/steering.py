"""Editing head weights, in closed form. N pairs, E edited latents, G sets of latents, A strengths.

r' = r + sum_i (w'_i - w_i) z_i with w' = a w (scale), w + a (add), 0 (zero), a (set): linear in the codes, so a sweep of strengths is
one product per set. That rewards move is therefore exact by construction; what can fail is that they move where they should,
and further than under random latents of the same density and weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from numpy.typing import NDArray

from sarm.audit.codes import AuditCodes
from sarm.evaluate.intervals import Estimate, Interval, difference_interval, estimated, share_interval, student
from sarm.evaluate.statistics import cluster_sums, pair_credit
from sarm.settings.checks import UserError


@dataclass(frozen=True)
class Edit:
    """Head weights of some latents before and after."""

    latent: Int64[NDArray[np.int64], " edited"]
    before: Float64[NDArray[np.float64], " edited"]
    after: Float64[NDArray[np.float64], " edited"]

    def as_json(self) -> list[dict[str, Any]]:
        """One record per latent; float32 values survive the round trip exactly."""
        return [
            {"latent": int(i), "before": float(b), "after": float(a)}
            for i, b, a in zip(self.latent, self.before, self.after, strict=True)
        ]

    @staticmethod
    def from_json(records: Sequence[Mapping[str, Any]]) -> "Edit":
        columns = {name: [record[name] for record in records] for name in ("latent", "before", "after")}
        return Edit(
            np.array(columns["latent"], dtype=np.int64), np.array(columns["before"]), np.array(columns["after"])
        )

    def applied(self, weight_S: Float[np.ndarray, " d_sae"]) -> Float[np.ndarray, " d_sae"]:
        """The edited head.

        Raises UserError unless the weights are those that the edit was made for.
        """
        if not np.array_equal(weight_S[self.latent].astype(np.float32), self.before.astype(np.float32)):
            raise UserError(
                "the head's weights are not those that this edit was made for. Pass the SARM that it names."
            )
        edited_S = weight_S.copy()
        edited_S[self.latent] = self.after
        return edited_S

    def undone(self) -> "Edit":
        """The edit back."""
        return Edit(self.latent, self.after, self.before)


@dataclass(frozen=True)
class EditFigures:
    """What an edit does to some pairs, with intervals over prompts.

    Shifts are mean changes of margins and rewards, in reward units. All else are shares of pairs: `accuracy_change` is after minus before,
    `flips` have the other order, the margins of `affected` move at all.
    """

    num_pairs: int
    num_prompts: int
    margin_shift: Estimate
    chosen_shift: Estimate
    rejected_shift: Estimate
    accuracy_before: Estimate
    accuracy_after: Estimate
    accuracy_change: Estimate
    flips: Estimate
    affected: Estimate


@dataclass(frozen=True)
class BesideControls:
    """An effect beside those of matched controls, in the effect's unit."""

    value: float
    control_median: float
    control_95: float
    """Median and 95th percentile of the controls' sizes."""
    control_mean: float
    """Mean of their effects, with signs."""
    ratio: float
    """Size over the controls' median size; infinite where half of the controls do nothing at all."""
    p: float
    """Permutation p-value: how often a control is as large."""


def make_edit(
    kind: str, strength: float, latents: Int64[NDArray[np.int64], " edited"], weight_S: Float[np.ndarray, " d_sae"]
) -> Edit:
    """The edit of `kind` (scale, add, zero, set) at one strength."""
    before = weight_S[latents].astype(np.float64)
    constant, factor = _parts(kind, before)
    # In float32, the head's precision: what is reported is what is saved.
    return Edit(latents, before, (before + constant + strength * factor).astype(np.float32).astype(np.float64))


def steered_rewards(codes: AuditCodes, edit: Edit) -> Float[np.ndarray, " responses"]:
    """Rewards of all responses under the edited head, without running the model."""
    reward_R: Float[np.ndarray, " responses"] = codes.reward + codes.z[:, edit.latent] @ (edit.after - edit.before)
    return reward_R


def _parts(
    kind: str, weight: Float64[NDArray[np.float64], " edited"]
) -> tuple[Float64[NDArray[np.float64], " edited"], Float64[NDArray[np.float64], " edited"]]:
    """(constant, slope): the change of the weights is constant + strength * slope."""
    if kind == "scale":
        return -weight, weight
    if kind == "add":
        return np.zeros_like(weight), np.ones_like(weight)
    if kind == "zero":
        return -weight, np.zeros_like(weight)
    if kind == "set":
        return -weight, np.ones_like(weight)
    raise UserError(f"unknown edit {kind}, known are scale, add, zero, set. Pass --edit.")


class Sweep:
    """Margins and rewards of all pairs under every set of latents at every strength.

    `sets_GE` [G, E]: one edited set a row; `signs_GE`, where given, says on which side each latent is added to (for `add`).
    """

    def __init__(self, codes: AuditCodes, kind: str, strengths: Sequence[float], sets_GE: Int64[NDArray[np.int64], "sets edited"], signs_GE: Float64[NDArray[np.float64], "sets edited"] | None = None):  # fmt: skip
        num_sets, size = sets_GE.shape
        weight_E = codes.weight[sets_GE.ravel()]
        constant_E, slope_E = _parts(kind, weight_E)
        if signs_GE is not None and kind in ("add", "set"):
            slope_E = slope_E * signs_GE.ravel()
        # Only latents in some set take part: a responses x latents block of a few hundred columns.
        used, place_E = np.unique(sets_GE, return_inverse=True)
        group_E = np.repeat(np.arange(num_sets), size)
        mixing = np.zeros((2, len(used), num_sets))
        np.add.at(mixing[0], (place_E.ravel(), group_E), constant_E)
        np.add.at(mixing[1], (place_E.ravel(), group_E), slope_E)
        rows = codes.responses
        z_RU = codes.z[rows][:, used].toarray()
        place_R = np.zeros(codes.z.shape[0], dtype=np.int64)
        place_R[rows] = np.arange(len(rows))
        self._chosen, self._rejected = place_R[codes.chosen], place_R[codes.rejected]
        self.constant_RG, self.slope_RG = z_RU @ mixing[0], z_RU @ mixing[1]
        self.codes, self.strengths = codes, np.array(strengths, dtype=np.float64)

    def shift(self, strength: float) -> Float[np.ndarray, "responses sets"]:
        """Change of the rewards of `codes.responses`."""
        shift_RG: Float[np.ndarray, "responses sets"] = self.constant_RG + strength * self.slope_RG
        return shift_RG

    def margins(self, strength: float) -> Float[np.ndarray, "pairs sets"]:
        """Margins after the edit."""
        shift_RG = self.shift(strength)
        margins_NG: Float[np.ndarray, "pairs sets"] = (
            self.codes.margins[:, None] + shift_RG[self._chosen] - shift_RG[self._rejected]
        )
        return margins_NG

    def pair_slopes(self) -> Float[np.ndarray, " pairs"]:
        """How far each pair's margin moves per unit of strength, under the first set."""
        slopes_N: Float[np.ndarray, " pairs"] = self.slope_RG[self._chosen, 0] - self.slope_RG[self._rejected, 0]
        return slopes_N

    def summary(self) -> dict[str, Float[np.ndarray, "strengths sets"]]:
        """Mean shifts, share of responses affected, flips and accuracy at every strength, for every set.

        `margin` and `chosen`: mean shift of the margin and of the chosen reward, in reward units; `affected`: share of responses
        whose reward moves; `flips`: share of pairs whose order changes; `accuracy` after the edit.
        """
        before_N = self.codes.margins
        names = ("margin", "chosen", "affected", "flips", "accuracy")
        out = {name: np.empty((len(self.strengths), self.slope_RG.shape[1])) for name in names}
        for a, strength in enumerate(self.strengths):
            shift_RG, after_NG = self.shift(strength), self.margins(strength)
            out["margin"][a] = (after_NG - before_N[:, None]).mean(axis=0)
            out["chosen"][a] = shift_RG[self._chosen].mean(axis=0)
            out["affected"][a] = (np.abs(shift_RG) > 1e-9).mean(axis=0)
            out["flips"][a] = (np.sign(after_NG) != np.sign(before_N)[:, None]).mean(axis=0)
            out["accuracy"][a] = pair_credit(after_NG).mean(axis=0)
        return out


def measure_edit(codes: AuditCodes, after_R: Float[np.ndarray, " responses"]) -> EditFigures:
    """What new rewards of all responses do to these pairs, with 95 % intervals over prompts."""
    before_N, after_N = codes.margins, after_R[codes.chosen] - after_R[codes.rejected]
    moved_R = after_R - codes.reward
    is_flipped_N, is_affected_N = np.sign(after_N) != np.sign(before_N), np.abs(after_N - before_N) > 1e-9
    prompts = codes.prompts
    return EditFigures(
        num_pairs=codes.num_pairs,
        num_prompts=len(np.unique(prompts)),
        margin_shift=estimated(after_N - before_N, prompts),
        chosen_shift=estimated(moved_R[codes.chosen], prompts),
        rejected_shift=estimated(moved_R[codes.rejected], prompts),
        accuracy_before=estimated(pair_credit(before_N), prompts, share_interval),
        accuracy_after=estimated(pair_credit(after_N), prompts, share_interval),
        accuracy_change=estimated(pair_credit(after_N) - pair_credit(before_N), prompts, difference_interval),
        flips=estimated(is_flipped_N.astype(np.float64), prompts, share_interval),
        affected=estimated(is_affected_N.astype(np.float64), prompts, share_interval),
    )


def by_subset(codes: AuditCodes, after_R: Float[np.ndarray, " responses"]) -> dict[str, EditFigures]:
    """`measure_edit` of every subset."""
    return {
        name: measure_edit(codes.keep(codes.subsets == name), after_R) for name in sorted(set(codes.subsets.tolist()))
    }


def against_controls(value: float, controls: Float64[NDArray[np.float64], " sets"]) -> BesideControls:
    """An effect beside those of matched controls."""
    size = np.abs(controls)
    median = float(np.median(size))
    return BesideControls(
        value=float(value),
        control_median=median,
        control_95=float(np.quantile(size, 0.95)),
        control_mean=float(controls.mean()),
        ratio=abs(value) / median if median > 0 else float("inf"),
        p=float((np.count_nonzero(size >= abs(value) - 1e-12) + 1) / (len(size) + 1)),
    )


def ratio_interval(per_pair_NG: Float[np.ndarray, "pairs sets"], prompts_N: Shaped[NDArray[Any], " pairs"]) -> Interval:
    """95 % interval, over prompts, of |mean of column 0| over the median |mean| of the other columns; NaN where there is one prompt.

    A ratio's errors are lopsided, so it is taken on the logarithm: the ratio without each prompt gives its variance (the jackknife), with
    Student's t of the effective number of prompts.
    """
    _, prompt_N = np.unique(prompts_N, return_inverse=True)
    size_C = np.bincount(prompt_N)
    if (num := len(size_C)) == 1:
        return Interval(float("nan"), float("nan"))
    sums_CG = cluster_sums(per_pair_NG, prompt_N)
    total_G = sums_CG.sum(axis=0)
    log_ratio, *without_C = np.log([_ratio(sums_G) for sums_G in (total_G, *(total_G - sums_CG))])
    variance = (num - 1) / num * np.square(without_C - np.mean(without_C)).sum()
    half = student(size_C.sum() ** 2 / np.square(size_C).sum() - 1) * np.sqrt(variance)
    return Interval(float(np.exp(log_ratio - half)), float(np.exp(log_ratio + half)))


def _ratio(sums_G: Float64[NDArray[np.float64], " sets"]) -> float:
    size_G = np.maximum(np.abs(sums_G), 1e-12)
    return float(size_G[0] / np.median(size_G[1:]))


def specificity(target_change: float, other_changes: Sequence[float]) -> float | None:
    """|target| / (|target| + largest |other|): 1 if only the target moves, 1/2 if something else moves as far; None if nothing moves."""
    worst = max((abs(change) for change in other_changes), default=0.0)
    total = abs(target_change) + worst
    return abs(target_change) / total if total > 0 else None


def specificities(target: EditFigures, others: Mapping[str, EditFigures]) -> dict[str, float | None]:
    """`specificity` of an edit in margins and in accuracy, beside subsets that it should leave alone."""
    return {
        name: specificity(getattr(target, figure).value, [getattr(other, figure).value for other in others.values()])
        for name, figure in (("margin", "margin_shift"), ("accuracy", "accuracy_change"))
    }
