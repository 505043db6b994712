import pytest
import torch
from torch import Tensor

from sarm.nn.architectures import ARCHITECTURES, build_sae
from sarm.nn.sae import Sae, dense
from sarm.settings.checks import UserError
from sarm.training.reward_aware import random_direction, reward_map

D_IN, D_SAE, K = 12, 40, 5
UNTIED = [name for name, architecture in ARCHITECTURES.items() if not architecture.is_tied]


def rows(number: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, D_IN, generator=generator) * torch.linspace(0.2, 3, D_IN) + 2


def sae_of(architecture: str, x_ND: Tensor) -> Sae:
    sae = build_sae(d_in=D_IN, d_sae=D_SAE, k=K, architecture=architecture)
    sae.initialise_(x_ND, torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_dec.add_(0.3)
        if not sae.is_tied:
            sae.b_enc.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
    return sae


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_the_direction_holds_the_asked_share_of_all_variance(share):
    x_ND, direction_D = rows(), random_direction(D_IN, 3)
    y_ND = reward_map(x_ND, direction_D, share)(x_ND).double()
    unit_D = direction_D.double() / direction_D.double().norm()
    centred_ND = y_ND - y_ND.mean(0)
    assert float((centred_ND @ unit_D).square().sum() / centred_ND.square().sum()) == pytest.approx(share, rel=1e-5)


def test_nothing_but_the_direction_changes_and_the_centre_stays():
    x_ND, direction_D = rows(), random_direction(D_IN, 3)
    mapped = reward_map(x_ND, direction_D, 0.4)
    y_ND = mapped(x_ND)
    torch.testing.assert_close(y_ND.mean(0), x_ND.mean(0), rtol=0, atol=1e-5)
    changed_ND = y_ND - x_ND
    unit_D = mapped.direction.float()
    along_ND = torch.outer(changed_ND @ unit_D, unit_D)
    torch.testing.assert_close(changed_ND, along_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", UNTIED)
def test_a_folded_sae_has_the_codes_of_mapped_rows_and_reconstructs_the_rows_themselves(architecture):
    x_ND = rows()
    mapped = reward_map(x_ND, random_direction(D_IN, 3), 0.5)
    sae = sae_of(architecture, mapped(x_ND)).double()
    y_ND = mapped(x_ND.double())
    with torch.no_grad():
        codes = sae(y_ND)
        wanted_ND = sae.decode(codes)
        mapped.fold_(sae)
        folded = sae(x_ND.double())
        torch.testing.assert_close(dense(folded, D_SAE), dense(codes, D_SAE), rtol=1e-9, atol=1e-9)
        # What is reconstructed of x is what was reconstructed of y, mapped back.
        torch.testing.assert_close(mapped(sae.decode(folded)), wanted_ND, rtol=1e-9, atol=1e-9)


def test_an_encoder_that_is_its_decoders_transpose_cannot_be_folded():
    tied = next(name for name, architecture in ARCHITECTURES.items() if architecture.is_tied)
    with pytest.raises(UserError, match="reward-share 0"):
        reward_map(rows(), random_direction(D_IN, 3), 0.1).fold_(sae_of(tied, rows()))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        reward_map(rows(), random_direction(D_IN, 3), share)


def test_a_direction_along_which_nothing_varies_is_refused():
    x_ND = rows()
    x_ND[:, 0] = 1.0
    with pytest.raises(UserError, match="no row differs"):
        reward_map(x_ND, torch.eye(D_IN)[0], 0.1)
