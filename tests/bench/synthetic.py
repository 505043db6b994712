"""Rows made of known sparse features, to see whether a dictionary finds them.

N rows, D d_in, F features, S d_sae. x = sum of `active` of F random unit directions with weights between 0.5 and 1.5.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarm.nn.architectures import build_sae
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner
from sarm.training.schedule import trapezoid


class Features(NamedTuple):
    """The truth: unit directions [F, D], how many are active in a row, and a shift that all rows share."""

    directions: Tensor
    active: int
    shift: Tensor

    def rows(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` random rows."""
        num_features = len(self.directions)
        kept = torch.rand(num, num_features, generator=generator).topk(self.active).indices
        weights = 0.5 + torch.rand(num, self.active, generator=generator)
        return F.embedding_bag(kept, self.directions, per_sample_weights=weights, mode="sum") + self.shift


class Outcome(NamedTuple):
    """`recovered` is the share of features that some decoder row points to with a cosine over 0.9."""

    recovered: float
    mean_max_cosine: float
    dead_share: float


def random_features(d_in: int, num_features: int, active: int, shift: float, generator: torch.Generator) -> Features:
    """Features in random directions; rows are `shift` away from the origin."""
    directions = F.normalize(torch.randn(num_features, d_in, generator=generator), dim=1)
    return Features(directions, active, shift * F.normalize(torch.randn(d_in, generator=generator), dim=0))


def train_on(features: Features, config: SaeSettings, steps: int, centred: bool = True) -> Outcome:
    """Train an SAE on fresh rows; unless `centred`, its b_dec starts at zero instead of the rows' mean."""
    generator = torch.Generator().manual_seed(0)
    sae = build_sae(config.architecture, features.directions.shape[1], config.d_sae, config.k)
    sample = features.rows(2048, generator)
    sae.initialise_(sample, generator)
    if not centred:
        sae.b_dec.data.zero_()
    learner = Learner(sae, config)
    for step in range(steps):
        rate = config.lr * trapezoid((step + 0.5) / steps, config.warmup_share, config.decay_share)
        learner.step(features.rows(config.batch_size, generator), rate)
    cosines = (features.directions @ sae.W_dec.detach().T).amax(1)
    return Outcome(float((cosines > 0.9).double().mean()), float(cosines.mean()), learner.dead_share())
