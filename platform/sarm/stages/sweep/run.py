"""An ablation from its settings to its report: shared stages once, then the cells through Ray Tune, then the comparison."""

import time
from dataclasses import replace

from sarm.data.formats.models import check_model, model_folder
from sarm.engine.ray.machine import machine_of, this_machine
from sarm.engine.session import Session, open_session
from sarm.engine.terminal import say
from sarm.nn.pretrained import read_config
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.sweep import Ablation
from sarm.stages.fitting import fitted
from sarm.stages.inputs import check_sources
from sarm.stages.sweep.cells import check_sweep, sweep_plan
from sarm.stages.sweep.cost import sweep_text
from sarm.stages.sweep.folder import claim_sweep, move_sweep_aside, refuse_other_sweep, refuse_unshared
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell
from sarm.stages.sweep.readings import SweepFolders
from sarm.stages.sweep.report import Report, Spent, report
from sarm.stages.sweep.stages import share
from sarm.stages.sweep.trials import check_search, run_trials, status_of, trials_at_once


def run_sweep(config: Ablation) -> Report:
    """Do the cells that are not done and compare all of them.

    Raises UserError before anything starts for what cannot work: cells, sources, layers, the folder, the size of the cluster.
    """
    config, budgets = fitted(config, machine_of(config.run))
    plan = check_plan(config)
    for line in budgets:
        say(f"budget: {line}")
    if config.run.only:
        refuse_unshared(plan)
    # Only now: who is refused keeps what is there.
    if (aside := move_sweep_aside(config)) is not None:
        say(f"moved aside what {config.run.redo_from} and the stages after it had made: {aside}")
    plan = plan._replace(config=replace(config, run=replace(config.run, redo_from=None)))
    with open_session(config) as session:
        session.own_folders = SweepFolders(config.run.out)
        return _run(session, plan)


def check_plan(config: Ablation) -> SweepPlan:
    """The plan of a sweep that can be run as far as that is known without a cluster; raises UserError."""
    cells = check_sweep(config)
    check_search(config.sweep)
    check_sources(config.data)
    plan = sweep_plan(config, cells, _width)
    for model in plan.models:
        check_model(model)
    refuse_other_sweep(config)
    return plan


def _width(model: ModelSettings) -> int:
    try:
        read = read_config(model_folder(model), 1, revision=model.revision, gguf_file=model.gguf_file)
    except ValueError as error:
        raise UserError(str(error)) from error
    width: int = read.hidden_size
    return width


def todo(plan: SweepPlan) -> list[Cell]:
    """The cells without a result; those that failed are tried again, those that were stopped are not."""
    return [cell for cell in plan.cells if status_of(plan, cell)[0] in ("missing", "failed")]


def _run(session: Session, plan: SweepPlan) -> Report:
    started, missing, sweep, spent = time.monotonic(), todo(plan), plan.config.sweep, None
    num_samples = 1
    if sweep.search == "optuna":
        # Optuna may propose a cell again, which costs nothing.
        num_samples = sweep.num_samples - (len(plan.cells) - len(missing))
    if missing and num_samples > 0:
        # Before a cluster is started; --dry-run asks the one that is there for its size.
        print(sweep_text(plan.config, this_machine()), flush=True)
        # Before anything is paid for.
        at_once = trials_at_once(plan.config.sweep, plan.config.run, session.cluster)
        claim_sweep(plan.config)
        share(session, plan)
        parent = session.tracker.parent
        plan = plan._replace(mlflow_uri=session.tracker.uri, parent_run_id=parent.run_id)
        run_trials(plan, missing, session.cluster, num_samples)
        spent = Spent(time.monotonic() - started, at_once, len(missing) == len(plan.cells))
    else:
        say("all cells are done")
    return report(session, plan, spent)
