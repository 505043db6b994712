"""Preference editing by goal: the smallest sparse edit of head weights that raises one mean margin and holds the others.

    minimise |delta|_1  subject to  m_T . delta >= x,   |m_g . delta| <= y for every other group g,   |delta_i| <= b

m_g is a group's mean of z(chosen) - z(rejected): the mean margin moves by exactly m_g . delta. A linear programme (delta = p - n), solved by HiGHS.
Every latent with a difference in any group takes part: one that does not move the target may be what holds another group.
The certificate is the same sums on pairs that the solver has not seen, with intervals over prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from scipy import optimize

from sarm.audit.codes import AuditCodes
from sarm.contracts.figures import SPREAD
from sarm.evaluate.intervals import Estimate, estimated
from sarm.settings.checks import UserError

_ZERO = 1e-9
# How far HiGHS may be off a constraint (its primal feasibility tolerance).
_FEASIBLE = 1e-7


@dataclass(frozen=True)
class GoalEdit:
    """The change of the head, and what it does to the groups that it was made on."""

    delta: Float[np.ndarray, " d_sae"]
    target_shift: float
    largest_other_shift: float


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far an edit moves a group's mean margin, in reward units."""

    moved: Estimate = field(metadata=SPREAD)
    num_pairs: int
    num_prompts: int


@dataclass(frozen=True)
class Certificate:
    """What an edit does to pairs that it was not solved on."""

    target: Shift
    goal_within: bool | None
    """Whether the goal is in the target's interval; None where the target has none."""
    others: dict[str, Shift]
    tolerance_kept: Literal["yes", "no", "undecided"]


def mean_difference(codes: AuditCodes) -> Float[np.ndarray, " d_sae"]:
    """Mean of z(chosen) - z(rejected) over pairs."""
    return np.asarray(codes.difference.mean(axis=0)).ravel()


def edit_for(
    target: AuditCodes, others: dict[str, AuditCodes], goal: float, tolerance: float, max_change: float
) -> GoalEdit:
    """The edit that raises the target's mean margin by `goal` and moves no other group's by more than `tolerance`.

    `max_change` bounds each weight's change, in reward units per unit of latent.
    Raises UserError, saying how far one can get, where there is none.
    """
    target_S = mean_difference(target)
    other_GS = np.stack([mean_difference(codes) for codes in others.values()]) if others else np.zeros((0, len(target_S)))  # fmt: skip
    if not target_S.any():
        raise UserError("no latent tells the target's chosen from its rejected responses, so no edit can raise its margin.")  # fmt: skip
    moves = np.flatnonzero((target_S != 0) | (other_GS != 0).any(axis=0))
    t_M, o_GM = target_S[moves], other_GS[:, moves]
    held = np.concatenate([o_GM, -o_GM])
    limits = np.full(len(held), tolerance)
    furthest = float(t_M @ _solve(-t_M, held, limits, max_change))
    if furthest < goal - _FEASIBLE:
        raise UserError(f"the goal of {goal:g} cannot be reached: with no other subset moving by more than {tolerance:g}, the target can rise by {furthest:.4g} at most. Pass a smaller --goal, or a larger --tolerance or --max-change.")  # fmt: skip
    # A goal at the very edge is out of the solver's reach by a rounding: ask for the edge itself.
    reached = min(goal, furthest)
    delta_M = _solve(None, np.concatenate([held, -t_M[None]]), np.append(limits, -reached), max_change)
    delta_S = np.zeros_like(target_S)
    delta_S[moves] = np.where(np.abs(delta_M) > _ZERO, delta_M, 0.0)
    shifts = other_GS @ delta_S
    return GoalEdit(delta_S, float(target_S @ delta_S), float(np.abs(shifts).max(initial=0.0)))


def certificate(
    delta_S: Float[np.ndarray, " d_sae"], target: AuditCodes, others: Mapping[str, AuditCodes], goal: float, tolerance: float
) -> Certificate:  # fmt: skip
    """What an edit does to pairs that it was not solved on: the shift of every group's mean margin, with a 95 % interval over prompts.

    An interval is NaN where the group has too few prompts to show one; `goal_within` is then None, and the tolerance undecided.

    `tolerance_kept` says whether every other group's whole interval lies within the tolerance, `no` if a shift itself does not, else
    `undecided`. That all intervals must lie inside makes the claim as sure as one of them, however many groups there are.
    """
    rows = {name: _shift(codes, delta_S) for name, codes in {"target": target, **others}.items()}
    moved = rows.pop("target")
    low, high = moved.moved.ci95
    is_off = any(abs(row.moved.value) > tolerance for row in rows.values())
    # A group without an interval leaves it open.
    is_wide = not all(max(np.abs(row.moved.ci95)) <= tolerance for row in rows.values())
    return Certificate(
        target=moved,
        goal_within=None if np.isnan(low) else low <= goal <= high,
        others=rows,
        tolerance_kept="no" if is_off else "undecided" if is_wide else "yes",
    )


def _shift(codes: AuditCodes, delta_S: Float64[NDArray[np.float64], " d_sae"]) -> Shift:
    moved_N = np.asarray(codes.difference @ delta_S)
    moved = estimated(moved_N, codes.prompts)
    return Shift(moved=moved, num_pairs=codes.num_pairs, num_prompts=len(np.unique(codes.prompts)))


def _solve(
    gain_M: Float64[NDArray[np.float64], " moved"] | None,
    rows_CM: Float64[NDArray[np.float64], "limits moved"],
    limit_C: Float64[NDArray[np.float64], " limits"],
    bound: float,
) -> Float64[NDArray[np.float64], " moved"]:
    """delta = p - n >= 0 that minimises `gain . delta`, or |delta|_1 without a gain, under rows . delta <= limit."""
    size = rows_CM.shape[1]
    cost = np.ones(2 * size) if gain_M is None else np.concatenate([gain_M, -gain_M])
    found = optimize.linprog(cost, np.hstack([rows_CM, -rows_CM]), limit_C, bounds=(0, bound), method="highs")
    if found.status != 0:
        raise UserError(f"the solver found no edit: {found.message}")
    step_M: NDArray[np.float64] = found.x[:size] - found.x[size:]
    return step_M
