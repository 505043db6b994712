"""The chain of stages: a job runs those that it reads first, reuses what is finished, and says so before it begins."""

import os
from dataclasses import replace
from typing import Any

from sarm.contracts.folders import Folders
from sarm.engine.live.display import note_stage
from sarm.engine.ray.machine import machine_of, this_machine
from sarm.engine.session import open_session
from sarm.engine.terminal import say
from sarm.settings.jobs import FeaturePages
from sarm.settings.run import StageName
from sarm.stages.chain_state import ChainState, StageState, move_aside, state_of, was_moved
from sarm.stages.dry_run.plan_text import plan_text
from sarm.stages.fitting import fitted
from sarm.stages.inputs import check_inputs
from sarm.stages.stage import STAGES


def run_chain(config: Any) -> dict[StageName, Any]:
    """Run the stages of a job that are not done; returns what each gives back (`evaluate`: the report's files and content).

    Raises UserError before anything is paid for: for folders of other settings, sources and models that cannot be read, GPUs that cannot be
    used, a cluster without room.
    """
    if was_moved(config.run.out):
        config = replace(config, run=replace(config.run, redo_from=None))
    machine = machine_of(config.run)
    config, budgets = fitted(config, machine)
    state = state_of(config)
    state.refuse(config.run.out)
    check_inputs(config, state)
    if state.is_todo("extract_activations") or state.is_todo("train_sarm"):
        # Last: seconds of imports.
        from sarm.data.formats.models import check_model

        check_model(config.model)
    # Only now: who is refused keeps what is there.
    if (aside := move_aside(config)) is not None:
        say(f"moved aside what {config.run.redo_from} and the stages after it had made: {aside}")
        config = replace(config, run=replace(config.run, redo_from=None))
    _announce(config, state)
    for line in budgets if not state.is_done else ():
        say(f"budget: {line}")
    with open_session(config) as session:
        session.needs = _needs(config, state)
        if session.needs and (machine.is_joined or machine.device(config.run.use_gpu).is_gpu):
            # Preparing data may take hours: GPUs that cannot be used and nodes that are too few are refused before it.
            session.look()
        given: dict[StageName, Any] = {}
        for number, stage in enumerate(state.stages, 1):
            if not _is_settled(config, stage):
                note_stage(stage.name, number, len(state.stages))
                given[stage.name] = STAGES[stage.name].run(session, config)
        return given


def _needs(config: Any, state: ChainState) -> tuple[int, ...]:
    """How many actors and workers the stages that are to do ask for."""
    run, todo = config.run, {stage.name for stage in state.stages if stage.state != "done"}
    actors = [run.num_actors] if todo & {"extract_activations", "evaluate", "collect_contexts"} else []
    return (*actors, *([run.num_workers] if todo & {"train_sae", "train_sarm"} else []))


def _announce(config: Any, state: ChainState) -> None:
    """The plan and its cost, where the job does more than its own stage or anything at all is left of a whole chain."""
    if len(state.stages) == 1 or state.is_done:
        return
    machine = this_machine()
    if config.run.ray_address or os.environ.get("RAY_ADDRESS"):
        # Asking the cluster would mean joining it twice.
        machine = machine._replace(note="Times are for this machine. --dry-run asks the cluster.")
    print(
        plan_text(config, [(stage.name, stage.state) for stage in state.stages], machine=machine, is_dry=False),
        flush=True,
    )


def _is_settled(config: Any, stage: StageState) -> bool:
    """Whether there is nothing to do; a report is written anew whenever it is asked for."""
    if stage.state != "done" or (stage.name == "evaluate" and not isinstance(config, FeaturePages)):
        return False
    for plan in STAGES[stage.name].folders(config, Folders(config.run.out)):
        say(f"{stage.name}: already done, {plan.folder}")
    return True
