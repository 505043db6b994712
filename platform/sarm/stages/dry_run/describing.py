"""What `--dry-run` prints: after the checks that a job itself makes first, the plan of its stages, or its settings."""

from typing import Any

from sarm.settings.run import ChainSettings
from sarm.stages.chain_state import ChainState, state_of
from sarm.stages.dry_run.inputs import check_layers, check_sources
from sarm.stages.dry_run.plan_text import plan_text, settings_text


def describe(config: Any) -> str:
    """The plan of a job.

    Raises UserError where the job would be refused: for folders of other settings, sources that cannot be opened, and layers that
    the model does not have.
    """
    if not isinstance(getattr(config, "run", None), ChainSettings):
        return settings_text(config)
    state = state_of(config)
    state.refuse(config.run.out)
    _check(config, state)
    return plan_text(config, [(stage.name, stage.state) for stage in state.stages])


def _check(config: Any, state: ChainState) -> None:
    if state.is_todo("prepare_data"):
        check_sources(config.data)
    if state.is_todo("extract_activations"):
        check_layers(config.model, {config.model.layer})
        check_layers(config.model, {config.model.layer, *config.extraction.layers}, "--layers")
    elif state.is_todo("train_sarm"):
        check_layers(config.model, {config.model.layer})
