import numpy as np
import pyarrow as pa
import pytest
from tests.audit.conftest import WEIGHT, tables

from sarm.audit.codes import check_latents, codes_of, completeness
from sarm.settings.checks import UserError


def test_rewards_are_the_sum_of_contributions_and_a_foreign_head_is_refused(codes):
    assert completeness(codes) < 1e-6
    with pytest.raises(UserError, match=r"differ from the sum .* by up to"):
        codes_of(*tables(), WEIGHT * 2)
    with pytest.raises(UserError, match="do not fit a head of 3 latents"):
        codes_of(*tables(), WEIGHT[:3])


def test_a_pair_without_codes_is_refused_not_padded():
    responses, pairs = tables()
    with pytest.raises(UserError, match=r"2 of 80 pairs have a response without codes"):
        codes_of(responses.filter(pa.array([i != "p3r0" for i in responses["response_id"].to_pylist()])), pairs, WEIGHT)


def test_sentence_ends_are_summed_and_their_means_do_not_grow_with_length(codes):
    chosen, rejected = codes.chosen[0], codes.rejected[0]
    assert codes.ends[chosen] == 2 * codes.ends[rejected] == 4
    total, mean = codes.at("sentence"), codes.per_end("sentence")
    assert total[chosen, 1] == pytest.approx(2 * codes.z[chosen, 1], rel=1e-6)
    assert mean[chosen, 1] == pytest.approx(total[chosen, 1] / 4)
    assert mean[chosen, 4] == mean[rejected, 4] == 0.5


def test_roles_share_no_prompt_and_the_off_target_is_in_halves(codes):
    parts = {role: set(codes.role(role).prompts) for role in ("select", "target", "off_select", "off_target")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 40
    assert codes.role("train").num_pairs == codes.role("select").num_pairs + codes.role("off_select").num_pairs
    with pytest.raises(UserError, match="no target pair"):
        codes.role("select").role("target")


@pytest.mark.parametrize(
    ("latents", "message"),
    [([], "no feature is selected"), ([9], "no latent 9"), ([-1], "no latent -1"), ([1, 1], "twice"), ([5], "never fires")],
)  # fmt: skip
def test_latents_that_cannot_be_edited_are_refused(codes, latents, message):
    with pytest.raises(UserError, match=message):
        check_latents(codes, latents)
    assert check_latents(codes, [2, 1]).tolist() == [2, 1]


def test_density_counts_each_response_once(codes):
    target = codes.role("target")
    brute = np.mean([[codes.z[r, s] != 0 for s in range(6)] for r in target.responses], axis=0)
    np.testing.assert_allclose(target.density, brute)
