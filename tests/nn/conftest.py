"""A random three-block model of every supported family, saved as a user would have it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.nn.family_options import COMMON, OPTIONS
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the model of a family, written on first use."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS[family]})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return folder_of
