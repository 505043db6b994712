"""The hook of `conftest.py`: shapes in signatures are checked in the rooms that hold arrays."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from sarm.audit.retraining import root_mean_square
from sarm.data.formats.sae_weights import with_input_bias
from sarm.evaluate.statistics import cluster_sums
from sarm.interpret.tallies import place_in_run
from sarm.nn.architectures import build_sae
from sarm.nn.losses import bradley_terry
from sarm.report.reward_card import Prefixes
from sarm.training.phase_shift import absorb_phase_shift_


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: bradley_terry(torch.zeros(2, 2)), "margins"),
        (lambda: with_input_bias(torch.zeros(3), torch.zeros(2), torch.zeros(3, 3)), "W_enc"),
        (lambda: cluster_sums(np.ones((3, 2)), np.zeros(2, np.int64)), "cluster_N"),
        (lambda: absorb_phase_shift_(build_sae("topk", 4, 8, 2), torch.zeros(5, 4), torch.zeros(4)), "after_ND"),
        (lambda: place_in_run(np.zeros((2, 2), np.int64)), "group"),
        (lambda: root_mean_square(np.ones(3)), "x_ND"),
        (lambda: Prefixes("text", [4], np.ones(3)), "contribution"),
    ],
    ids=("nn", "data", "evaluate", "train", "interpret", "audit", "report"),
)
def test_a_call_with_a_wrong_shape_is_refused(call: Callable[[], object], argument: str):
    with pytest.raises(TypeCheckError, match=argument):
        call()
