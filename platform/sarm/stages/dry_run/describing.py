"""What `--dry-run` prints: after the checks that a job itself makes first, the plan of its stages, or its settings."""

from typing import Any

from sarm.settings.run import ChainSettings
from sarm.stages.chain_state import state_of
from sarm.stages.dry_run.plan_text import plan_text, planned_machine, settings_text
from sarm.stages.fitting import fitted
from sarm.stages.inputs import check_inputs


def describe(config: Any) -> str:
    """The plan of a job.

    Raises UserError where the job would be refused: for folders of other settings, sources that cannot be opened, and layers that
    the model does not have.
    """
    if not isinstance(getattr(config, "run", None), ChainSettings):
        return settings_text(config)
    machine = planned_machine(config)
    config = fitted(config, machine).config
    state = state_of(config)
    state.refuse(config.run.out)
    check_inputs(config, state)
    return plan_text(config, [(stage.name, stage.state) for stage in state.stages], machine=machine)
