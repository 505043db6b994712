"""What a dictionary of turn ends learns from: shares, centres, held-out prompts, the reward's direction; and that it can be taken up again."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.data.store.activation_stores import table_of, write_store
from torch import Tensor

from sarm.data.store.looked_groups import is_heldout
from sarm.data.store.shuffled_rows import Cursor, batches
from sarm.nn.architectures import build_sae
from sarm.nn.sae import dense, standardise
from sarm.settings.checks import UserError
from sarm.settings.sae import SaeSettings
from sarm.stages.train_sae_rows import SaeRows, rows_of
from sarm.training.sae import SaeTraining

D_IN, PROMPTS = 16, 60
CPU = torch.device("cpu")
SAE = SaeSettings(
    recipe="turn_ends", d_sae=32, k=4, batch_size=64, steps=300, lr=3e-3, heldout_share=0.2, shares=(0.6, 0.4)
)
# A direction of little variance decides which answer is chosen.
DECIDES = torch.nn.functional.normalize(torch.linspace(-1, 1, D_IN).roll(5), dim=0)


def drawn(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, D_IN, generator=generator) * torch.linspace(0.3, 2, D_IN) + torch.linspace(-6, 6, D_IN)


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three streams of 60 prompts: pairs' ends, responses with three ends each, texts that lie elsewhere."""
    root = tmp_path_factory.mktemp("activations")
    ends = drawn(2 * PROMPTS, 0)
    ends[::2] += DECIDES
    prompts = [f"prompt{n // 2}" for n in range(2 * PROMPTS)]
    sides = ["chosen", "rejected"] * PROMPTS
    pairs = {"row_id": [n // 2 for n in range(2 * PROMPTS)], "doc_id": prompts, "side": sides}
    far = torch.zeros(D_IN)
    far[3] = 20
    branches = drawn(4 * PROMPTS, 1) + far / 4
    kinds = ["true_end"] * len(ends) + ["sentence"] * len(branches)
    own = {"doc_id": [*prompts, *(f"prompt{n // 4}" for n in range(4 * PROMPTS))]}
    texts = drawn(600, 2) - far
    return {
        "chat": write_store(root / "chat", [table_of(ends, own=pairs)]),
        "chat-turn_end": write_store(root / "responses", [table_of(torch.cat([ends, branches]), kinds=kinds, own=own)]),
        "text": write_store(root / "text", [table_of(texts, kinds=["true_end", "sentence"] * 300)]),
    }


def rows(activations: dict[str, Path], **changes: object) -> SaeRows:
    return rows_of(dataclasses.replace(SAE, **changes), activations, 0, CPU)


def walked(found: SaeRows) -> Tensor:
    (phase,) = found.phases
    return torch.cat([phase.prepare(x) for x, _, _ in batches(phase.rows, Cursor(0), 1, SAE.batch_size)])


def test_every_kind_of_every_stream_lies_about_the_true_ends(activations: dict[str, Path]) -> None:
    found = rows(activations)
    (phase,) = found.phases
    assert (phase.name, phase.rows.num_rows) == ("turn_ends", SAE.steps * SAE.batch_size)
    x = walked(found)
    ends = standardise(drawn(2 * PROMPTS, 0)[0::1])
    assert x.mean(0).sub(ends.mean(0)).norm() < 0.15 * ends.std(0).norm()
    # Unmoved, the texts alone would lie this far away.
    text = standardise(drawn(600, 2) - torch.eye(D_IN)[3] * 20)
    assert text.mean(0).sub(ends.mean(0)).norm() > 1.5 * ends.std(0).norm()
    assert found.figures.keys() == {"passes_responses", "passes_text"}
    assert found.figures["passes_responses"] * 0.4 > found.figures["passes_text"] * 0.6


def test_rows_of_held_out_prompts_are_measured_and_never_learnt(activations: dict[str, Path]) -> None:
    found = rows(activations, shares=(1.0, 0.0))
    ends = standardise(torch.cat([drawn(2 * PROMPTS, 0)]))
    unseen = [n for n in range(0, 2 * PROMPTS) if is_heldout(f"prompt{n // 2}", SAE.heldout_share)]
    assert len(found.measured["chat"].heldout) == len(unseen) > 5
    learnt = walked(found)
    rejected = ends[[n for n in unseen if n % 2]]
    # True ends are where they are; rounding is that of 16 bits.
    assert torch.cdist(rejected, learnt).min() > 0.05
    assert torch.cdist(rejected, found.measured["chat"].heldout).amin(1).max() < 0.01
    seen = ends[[n for n in range(1, 2 * PROMPTS, 2) if n not in unseen]]
    assert torch.cdist(seen, learnt).amin(1).max() < 0.01


def test_shares_leave_streams_out(activations: dict[str, Path]) -> None:
    assert rows(activations, shares=(1.0, 0.0)).figures.keys() == {"passes_responses"}
    only_texts = rows(activations, shares=(0.0, 1.0))
    assert only_texts.figures.keys() == {"passes_text"}
    assert only_texts.measured.keys() == {"chat", "text"}
    every = torch.cat(list(only_texts.measured["text"].all(slice(None))))
    # Both kinds were moved to the mean of the texts' own true ends, of those that are trained on.
    assert len(every) == 600
    assert every[::2].mean(0).sub(every[1::2].mean(0)).norm() < 0.2 * every.std(0).norm()


def test_the_reward_s_direction_gets_its_share_and_the_control_another_one(activations: dict[str, Path]) -> None:
    aware, control = rows(activations, reward_share=0.3), rows(activations, reward_share=0.3, reward_direction="random")
    assert aware.reward_map is not None
    assert control.reward_map is not None
    found = aware.reward_map.direction.float()
    assert float(found @ DECIDES) > 0.5
    assert abs(float(control.reward_map.direction.float() @ found)) < 0.6
    for one in (aware, control):
        assert one.reward_map is not None
        x = walked(one)
        centred = x - x.mean(0)
        along = centred @ one.reward_map.direction.float()
        share = float(along.square().sum() / centred.square().sum())
        # Of the true ends' variance it is 0.3; branches and texts vary about as they do.
        assert share == pytest.approx(0.3, abs=0.08)
    assert aware.about["reward_share"] == 0.3
    assert rows(activations).reward_map is None


def test_a_reward_share_without_pairs_is_refused(activations: dict[str, Path], tmp_path: Path) -> None:
    own = {"row_id": [n // 2 for n in range(80)], "doc_id": ["prompt"] * 80, "side": ["chosen", "rejected"] * 40}
    few = {**activations, "chat": write_store(tmp_path / "chat", [table_of(drawn(80, 3), own=own)])}
    with pytest.raises(UserError, match="pairs of fewer than 3 prompts"):
        rows(few, reward_share=0.1)
    assert rows(few).reward_map is None


def test_responses_in_no_pair_are_seen_as_often_as_those_in_pairs(activations: dict[str, Path], tmp_path: Path) -> None:
    own = {"doc_id": [f"other{n // 2}" for n in range(160)]}
    more = write_store(tmp_path / "more", [table_of(drawn(160, 7), kinds=["true_end", "sentence"] * 80, own=own)])
    found = rows({**activations, "responses-turn_end": more}, shares=(1.0, 0.0))
    few = rows(activations, shares=(1.0, 0.0)).figures["passes_responses"]
    assert found.figures["passes_responses"] < 0.85 * few
    learnt = walked(found)
    assert len(learnt) == SAE.steps * SAE.batch_size
    seen = standardise(drawn(160, 7)[::2])
    kept = [n for n in range(80) if not is_heldout(f"other{n}", SAE.heldout_share)]
    assert torch.cdist(seen[kept] - seen.mean(0), learnt - learnt.mean(0)).amin(1).median() < 0.5


def trained(found: SaeRows, stop_at: int | None = None) -> tuple[SaeTraining, list[dict[str, float]]]:
    sae = build_sae(d_in=D_IN, d_sae=SAE.d_sae, k=SAE.k, architecture="topk")
    sae.initialise_(found.samples[0], torch.Generator().manual_seed(0))
    training = SaeTraining([sae], found.phases[0], [SAE], seed=0)
    metrics: list[dict[str, float]] = []
    training.run([lambda _, logged: metrics.append(logged)], max_steps=stop_at)
    return training, metrics


def test_a_training_goes_on_to_the_last_bit(activations: dict[str, Path]) -> None:
    whole, _ = trained(rows(activations, reward_share=0.2))
    part, _ = trained(rows(activations, reward_share=0.2), stop_at=271)
    again = SaeTraining([build_sae(d_in=D_IN, d_sae=SAE.d_sae, k=SAE.k, architecture="topk")], rows(activations, reward_share=0.2).phases[0], [SAE], seed=0)  # fmt: skip
    again.load_state_dict(part.state_dict())
    again.run([lambda *_: None])
    for name, tensor in whole.learners[0].sae.state_dict().items():
        assert torch.equal(tensor, again.learners[0].sae.state_dict()[name]), name


def test_the_direction_of_the_reward_is_reconstructed_better_and_the_fold_reads_plain_rows(
    activations: dict[str, Path],
) -> None:
    errors = {}
    for share in (0.0, 0.3):
        found = rows(activations, reward_share=share)
        training, metrics = trained(found)
        sae = training.learners[0].sae
        assert metrics[-1]["fvu"] < metrics[0]["fvu"]
        x = found.measured["chat"].heldout
        read = dense(sae(found.phases[0].prepare(x)), SAE.d_sae)
        if found.reward_map is not None:
            found.reward_map.fold_(sae)
        with torch.no_grad():
            torch.testing.assert_close(dense(sae(x), SAE.d_sae), read, rtol=1e-4, atol=1e-4)
            errors[share] = float(((sae.decode(sae(x)) - x) @ DECIDES).square().mean())
    assert errors[0.3] < 0.7 * errors[0.0]
