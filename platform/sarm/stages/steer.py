"""`jobs/steer.py`: edit head weights of an audited SARM, measure the edit on cached codes, save it as a SARM folder; and take it back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sarm.audit.codes import AuditCodes, check_latents
from sarm.audit.goals import certificate, edit_for
from sarm.audit.pairs import chooses
from sarm.audit.selection import matched_sets
from sarm.audit.steering import (
    Edit,
    Sweep,
    against_controls,
    by_subset,
    make_edit,
    measure_edit,
    specificities,
    steered_rewards,
)
from sarm.contracts.figures import plain_values
from sarm.contracts.folders import HEAD_EDIT, SARM_FOLDER
from sarm.contracts.manifest import StageFolder, finite_or_null, read_manifest, write_atomically
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.evaluate.intervals import estimated
from sarm.passes.models import hash_of_folder
from sarm.report import audit_figures as figures
from sarm.report.audit_page import write_audit_page
from sarm.report.figures import as_svg
from sarm.settings.audit import Steer
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.stages.audit_folder import Audited, read_audit
from sarm.stages.edited_model import save_edited

STEERING = "steering.json"


def steer(session: Session, settings: Steer) -> Path:
    """Measure, save and log one edit; returns its folder. A finished folder of the same edit is left alone.

    Raises UserError for unknown, silent or no features, and for a goal that cannot be reached, before anything is written.
    """
    out = session.run.out
    audited = read_audit(out)
    if audited.model is None:
        from sarm.stages.steer_inside import steer_inside

        return steer_inside(session, settings, audited)
    if settings.undo is not None:
        return _undo(session, settings)
    edit, goal = _goal_edit(audited, settings) if settings.edit == "goal" else (_plain_edit(audited, settings), None)
    asked = {
        name: value
        for name, value in identity(settings, seed=session.run.seed).items()
        if name not in ("run", "undo", "name")
    }
    folder = _sarm_folder(out / "steer" / settings.name, audited.sarm, {"asked": asked, "edit": edit.as_json()})

    def body(child: StageRun) -> Mapping[str, Any]:
        content = _measure(audited=audited, edit=edit, settings=settings, seed=session.run.seed, folder=folder.folder)
        if goal is not None:
            content["certificate"] = goal
        write_atomically(
            folder.folder / STEERING, json.dumps(finite_or_null(plain_values(content)), indent=2, allow_nan=False)
        )
        save_edited(audited.sarm, edit, folder.folder)
        for name in (STEERING, HEAD_EDIT):
            child.log_artifact(folder.folder / name)
        for path in folder.folder.glob("*.svg"):
            child.log_artifact(path)
        if content["sweep"]:
            child.log_table([{k: v for k, v in row.items() if k != "control"} | {"control_median": row["control"].control_median} for row in content["sweep"]], "sweep.json")  # fmt: skip
        target = content["target"]
        shown = {f"target_{name}": getattr(target, name).value for name in ("margin_shift", "accuracy_change", "flips")}
        return {"figures": {**shown, "off_accuracy_change": content["off_target"].accuracy_change.value, "weights_changed": len(edit.latent)}}  # fmt: skip

    session.stage(f"steer {settings.name}", folder, body)
    page = write_audit_page(out)
    session.tracker.parent.log_artifact(page)
    say(f"model: {folder.folder}   report: {page}")
    return folder.folder


def _plain_edit(audited: Audited, settings: Steer) -> Edit:
    latents = check_latents(audited.codes, settings.features or audited.selection.latent.tolist())
    return make_edit(settings.edit, settings.strength, latents, audited.codes.weight)


def _goal_edit(audited: Audited, settings: Steer) -> tuple[Edit, dict[str, Any]]:
    """The smallest edit that reaches the goal on half of the prompts, and what it does on the other half."""
    assert settings.goal is not None
    target, off = (
        audited.codes.role("target"),
        {half: audited.codes.role(half) for half in ("off_select", "off_target")},
    )
    is_seen = np.array([chooses(prompt) for prompt in target.prompts])
    if is_seen.all() or not is_seen.any():
        raise UserError("the target has too few prompts to solve on half of them. Audit with more --target pairs.")
    bound = settings.max_change * float(np.abs(audited.codes.weight).max())
    solved = edit_for(
        target=target.keep(is_seen),
        others=_subsets(off["off_select"]),
        goal=settings.goal,
        tolerance=settings.tolerance,
        max_change=bound,
    )
    latent = np.flatnonzero(solved.delta)
    weight = audited.codes.weight[latent]
    edit = Edit(latent, weight, (weight + solved.delta[latent]).astype(np.float32).astype(np.float64))
    delta_S = np.zeros_like(audited.codes.weight)
    delta_S[latent] = edit.after - edit.before
    solved_on = {"target_shift": solved.target_shift, "largest_other_shift": solved.largest_other_shift}
    others = _subsets(off["off_target"])
    unseen = target.keep(~is_seen)
    return edit, {
        "solved_on": solved_on,
        **plain_values(
            certificate(delta_S=delta_S, target=unseen, others=others, goal=settings.goal, tolerance=settings.tolerance)
        ),
    }


def _subsets(codes: AuditCodes) -> dict[str, AuditCodes]:
    return {name: codes.keep(codes.subsets == name) for name in sorted(set(codes.subsets.tolist()))}


def _measure(audited: Audited, edit: Edit, settings: Steer, seed: int, folder: Path) -> dict[str, Any]:
    target, off = audited.codes.role("target"), audited.codes.role("off_target")
    after_R = steered_rewards(audited.codes, edit)
    on_target, on_off = measure_edit(target, after_R), measure_edit(off, after_R)
    target_subsets, off_subsets = by_subset(target, after_R), by_subset(off, after_R)
    subsets = {**target_subsets, **off_subsets}
    histogram = figures.reward_shift(
        {"target": target.reward[target.chosen], "off target": off.reward[off.chosen]},
        {"target": after_R[target.chosen], "off target": after_R[off.chosen]},
    )
    (folder / "rewards_before_and_after.svg").write_text(as_svg(histogram))
    content: dict[str, Any] = {
        "edit": {
            "kind": settings.edit,
            "strength": settings.strength,
            "goal": settings.goal,
            "tolerance": settings.tolerance,
            "weights": edit.as_json(),
        },
        "target": on_target,
        "target_subsets": target_subsets,
        "off_target": on_off,
        "off_subsets": off_subsets,
        "over_refusal": {name: subsets[name] for name in settings.over_refusal if name in subsets},
        "specificity": specificities(on_target, off_subsets),
        "sweep": [],
    }
    if settings.edit in ("scale", "add", "set"):
        content |= _sweep(
            audited=audited, target=target, off=off, latents=edit.latent, settings=settings, seed=seed, folder=folder
        )
    return content


def _sweep(
    audited: Audited, target: AuditCodes, off: AuditCodes, latents: NDArray[np.int64], settings: Steer, seed: int, folder: Path
) -> dict[str, Any]:  # fmt: skip
    """Every strength, of the features and of matched sets, in closed form."""
    sets_GE = np.vstack([latents[None], matched_sets(selected=latents, density_S=audited.codes.density, weight_S=audited.codes.weight, count=settings.controls, seed=seed)])  # fmt: skip
    swept = {
        name: Sweep(codes, settings.edit, settings.strengths, sets_GE)
        for name, codes in (("target", target), ("off", off))
    }
    found_AG = {name: sweep.summary() for name, sweep in swept.items()}
    before = {name: float((sweep.codes.margins > 0).mean()) for name, sweep in swept.items()}
    off_change_AG = _worst_change(off, settings, sets_GE)
    rows = []
    for a, strength in enumerate(settings.strengths):
        control = against_controls(float(found_AG["target"]["margin"][a, 0]), found_AG["target"]["margin"][a, 1:])
        rows.append(
            {
                "strength": strength,
                **{
                    f"{name}_{figure}": float(found_AG[name][figure][a, 0])
                    for name in swept
                    for figure in ("margin", "chosen", "affected", "flips", "accuracy")
                },
                "control": control,
            }
        )
    slope_N = swept["target"].pair_slopes()
    own = {f"{name}_{figure}": found_AG[name][figure][:, 0] for name in swept for figure in ("margin", "accuracy")}
    controls = {f"target_{figure}": found_AG["target"][figure][:, 1:] for figure in ("margin", "accuracy")}
    dose = figures.dose_response(settings.strengths, own, controls, settings.edit)
    (folder / "dose_and_response.svg").write_text(as_svg(dose))
    change_AG = found_AG["target"]["accuracy"] - before["target"]
    points = [
        {"strength": s, "target": float(change_AG[a, 0]), "off": float(off_change_AG[a, 0])}
        for a, s in enumerate(settings.strengths)
    ]
    front = figures.pareto(points, change_AG[:, 1:], off_change_AG[:, 1:])
    (folder / "pareto.svg").write_text(as_svg(front))
    rank = stats.spearmanr(settings.strengths, own["target_accuracy"]).statistic if len(set(own["target_accuracy"])) > 1 else np.nan  # fmt: skip
    return {
        "sweep": rows,
        "slope": estimated(slope_N, target.prompts),
        "monotonic": float(rank) if np.isfinite(rank) else None,
        "num_controls": settings.controls,
    }


def _worst_change(off: AuditCodes, settings: Steer, sets_GE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Largest change of accuracy of any off-target subset, by strength and set."""
    changes = []
    for codes in _subsets(off).values():
        after_AG = Sweep(codes, settings.edit, settings.strengths, sets_GE).summary()["accuracy"]
        changes.append(np.abs(after_AG - (codes.margins > 0).mean()))
    largest_AG: NDArray[np.float64] = np.max(changes, axis=0)
    return largest_AG


def _sarm_folder(folder: Path, source: Path, steering: Mapping[str, Any]) -> StageFolder:
    """A SARM stage whose settings are those of the model that was edited, and the edit."""
    trained = dict(read_manifest(source, SARM_FOLDER).config)
    return StageFolder(folder, SARM_FOLDER, {**trained, "steering": {**steering, "source": hash_of_folder(source)}})


def _undo(session: Session, settings: Steer) -> Path:
    edited = session.run.out / "steer" / str(settings.undo)
    read_manifest(edited, SARM_FOLDER)
    edit = Edit.from_json(json.loads((edited / HEAD_EDIT).read_text())["weights"]).undone()
    folder = _sarm_folder(session.run.out / "steer" / settings.name, edited, {"undoes": settings.undo})

    def body(child: StageRun) -> Mapping[str, Any]:
        save_edited(edited, edit, folder.folder)
        child.log_artifact(folder.folder / HEAD_EDIT)
        return {"figures": {"weights_changed": len(edit.latent)}}

    session.stage(f"undo {settings.undo}", folder, body)
    return folder.folder
