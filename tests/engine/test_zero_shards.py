"""What of a saved training goes where; `tests/stages/test_resume.py` resumes whole trainings."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sarm.engine.deepspeed.zero_shards import load_moments_
from sarm.settings.checks import UserError


def engine_on(device: str) -> Any:
    """Of an engine without shards, what `load_moments_` reads."""
    model = nn.Linear(3, 2, device=device)
    adam = torch.optim.AdamW(model.parameters())
    return SimpleNamespace(stage=0, model=model, deepspeed=SimpleNamespace(basic_optimizer=adam, optimizer=None))


def saved(model: nn.Module) -> Any:
    shards = {
        name: {"start": 0, **{key: torch.arange(float(p.numel())) for key in ("weight", "exp_avg", "exp_avg_sq")}}
        for name, p in model.named_parameters()
    }
    return SimpleNamespace(parts=["rank-0"], folder="states", read=lambda part: {"state": {"own": shards}})


def test_everything_of_adam_lies_where_the_weights_are():
    # No machine is needed to see where a tensor would be.
    engine = engine_on("meta")
    load_moments_(engine, saved(engine.model), "own", 7)
    for parameter in engine.model.parameters():
        state = engine.deepspeed.basic_optimizer.state[parameter]
        assert {key: tensor.device.type for key, tensor in state.items()} == dict.fromkeys(state, "meta")
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_moments_and_steps_are_those_that_were_saved():
    engine = engine_on("cpu")
    load_moments_(engine, saved(engine.model), "own", 7)
    for parameter in engine.model.parameters():
        state = engine.deepspeed.basic_optimizer.state[parameter]
        assert state["step"] == 7
        assert torch.equal(state["exp_avg"].flatten(), torch.arange(float(parameter.numel())))


def test_a_state_that_lacks_a_parameter_is_refused():
    engine = engine_on("cpu")
    found = saved(engine.model)
    found.read("rank-0")["state"]["own"].pop("bias")
    with pytest.raises(UserError, match="1 parameters differ, first bias"):
        load_moments_(engine, found, "own", 7)
