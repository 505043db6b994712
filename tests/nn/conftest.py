"""A random three-block model of every supported family, saved as a user would have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

NUM_LAYERS, D_IN, VOCABULARY, WINDOW = 3, 32, 97, 4

_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, **_MIXED},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    # A soft cap of 2 is felt by random weights, 50 would not be.
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2, **_MIXED},
    "gemma3_text": {"head_dim": 8, **_MIXED},
}


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the model of a family, written on first use."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            config = AutoConfig.for_model(
                family,
                vocab_size=VOCABULARY,
                hidden_size=D_IN,
                intermediate_size=48,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                # Ten times the usual: attention is far from uniform, so that a wrong mask is seen.
                initializer_range=0.2,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **_OPTIONS[family],
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return folder_of
