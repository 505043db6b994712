import contextlib
import copy
import dataclasses
import json
import threading
from collections import Counter
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sarm.contracts.ids import prompt_id_of
from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.sources.tiny import tiny_pairs
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PairOfGroup, PromptGroup, prompt_groups
from sarm.data.tokens.packing import padded_tokens
from sarm.nn.losses import bradley_terry
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.checks import StoppedError, UserError
from sarm.settings.reward import RewardSettings
from sarm.training.dense_latents import RecentFiring
from sarm.training.objective import Objective, objective_of
from sarm.training.reward import RewardTraining, _backward, _forward, parameter_groups, train_reward
from sarm.training.reward_batches import busy_share, cut_into_steps, deal, who_waits
from sarm.training.reward_checks import LossGuard, Sums
from sarm.training.reward_engine import LocalEngine

ROW_TOKENS, END = 256, 1
CONFIG = RewardSettings(lr=1e-3, head_lr=1e-2, epochs=2, batch_pairs=6, batch_tokens=1024, warmup_share=0.1)


@pytest.fixture(scope="module")
def groups(tiny_chat) -> list[PromptGroup]:
    """Six prompts of three pairs each."""
    rows = [
        {**p, "pair_id": f"pair{n}", "prompt_id": prompt_id_of(p["prompt"]), "split": "train"}
        for n, p in zip(range(18), tiny_pairs(), strict=False)
    ]
    return list(prompt_groups(pa.Table.from_pylist(rows, schema=PAIRS_TABLE), tiny_chat))


@pytest.fixture(scope="module")
def untrained(tiny_folder):
    """A reward model whose head is random, so that gradients reach the blocks from the first step on."""
    backbone = load_backbone(str(tiny_folder), 2)
    generator = torch.Generator().manual_seed(5)
    sae = TopKSae(64, 96, 8)
    sae.initialise_(torch.randn(200, 64, generator=generator), generator)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=96, k=8, end_of_turn_id=END)
    model = SarmForSequenceClassification(config, backbone, sae)
    with torch.no_grad():
        model.score.weight.copy_(0.1 * torch.randn(1, 96, generator=generator))
    return model


def train(model, groups, config=CONFIG, engine_type=LocalEngine, seed=0):
    """(trained model, logged metrics)"""
    model, logged = copy.deepcopy(model), []
    engine = engine_type(model, parameter_groups(model, config), config.max_grad_norm)
    train_reward(engine, groups, config, seed, ROW_TOKENS, END, lambda step, metrics: logged.append(metrics))
    return model, logged


class GradientRecorder(LocalEngine):
    """Keeps the gradient of each step instead of taking it."""

    def step(self, rate_factor: float, norm_factor: float = 1.0) -> float:
        self.model.steps = [*getattr(self.model, "steps", []), gradients_of(self.model)]
        self._optimizer.zero_grad(set_to_none=True)
        return 0.0


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_falls_and_pairs_are_ordered(untrained, groups):
    _, logged = train(untrained, groups, dataclasses.replace(CONFIG, epochs=6))
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert logged[-1]["accuracy"] == 1


def test_the_sae_and_the_embeddings_stay_bit_for_bit_and_the_rest_moves(untrained, groups):
    model, _ = train(untrained, groups)
    for name, before in untrained.named_parameters():
        is_frozen = name.startswith("sae.") or "embed_tokens" in name
        assert torch.equal(before, model.get_parameter(name)) == is_frozen, name


def test_a_rate_of_zero_trains_the_head_alone(untrained, groups):
    model, _ = train(untrained, groups, dataclasses.replace(CONFIG, lr=0.0))
    moved = {name for name, p in untrained.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert moved == {"score.weight"}


def test_the_same_seed_gives_the_same_weights_bit_for_bit(untrained, groups):
    (first, _), (second, _), (other, _) = (train(untrained, groups, seed=seed) for seed in (0, 0, 1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.score.weight, other.score.weight)


def test_a_steps_gradient_equals_that_of_a_loop_over_single_unpacked_pairs(untrained, groups):
    whole_epoch = dataclasses.replace(CONFIG, batch_pairs=100, epochs=1, pair_weights="step")
    packed, _ = train(untrained, groups, whole_epoch, GradientRecorder)
    (found,) = packed.steps

    model = copy.deepcopy(untrained)
    parameter_groups(model, whole_epoch)
    num_pairs = sum(len(group.pairs) for group in groups)
    for group in groups:
        for pair in group.pairs:
            chosen, rejected = (
                model(input_ids=torch.tensor([group.tokens[place].ids])).logits
                for place in (pair.chosen, pair.rejected)
            )
            (bradley_terry((chosen - rejected)[0]).sum() / num_pairs).backward()
    wanted = gradients_of(model)
    assert found.keys() == wanted.keys()
    assert max(g.abs().max() for g in wanted.values()) > 0.01
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def unequal(groups) -> list[PromptGroup]:
    """The same prompts with one, two or three of their pairs, so that steps of four are of two to four pairs."""
    return [group._replace(pairs=group.pairs[: 1 + n % 3]) for n, group in enumerate(groups)]


@pytest.mark.parametrize("pair_weights", ["equal", "step"])
def test_every_pair_weighs_alike_in_every_step_unless_asked_otherwise(untrained, groups, pair_weights):
    config = dataclasses.replace(CONFIG, epochs=1, batch_pairs=4, pair_weights=pair_weights)
    assert dataclasses.replace(config, pair_weights="equal") == dataclasses.replace(CONFIG, epochs=1, batch_pairs=4)
    recorded, logged = train(untrained, unequal(groups), config, GradientRecorder)
    sizes = [entry["pairs"] for entry in logged]
    assert len(set(sizes)) > 1, "else there is nothing to see here"
    assert sum(sizes) == sum(len(group.pairs) for group in unequal(groups))
    model = copy.deepcopy(untrained)
    parameter_groups(model, config)
    for step, size in zip(cut_into_steps(unequal(groups), 4, 0, 0), sizes, strict=True):
        for group in step:
            for pair in group.pairs:
                chosen, rejected = (
                    model(input_ids=torch.tensor([group.tokens[place].ids])).logits
                    for place in (pair.chosen, pair.rejected)
                )
                loss = bradley_terry((chosen - rejected)[0]).sum()
                (loss / (4 if pair_weights == "equal" else size)).backward()
    # Weights stand still, so the steps' gradients add up to that of all pairs with their weights.
    for name, wanted in gradients_of(model).items():
        found = torch.stack([step[name] for step in recorded.steps]).sum(0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_clipping_does_not_take_from_large_steps_what_their_pairs_weigh(untrained, groups):
    """A step of twice the pairs may have twice the norm."""
    limits = []

    class Limits(GradientRecorder):
        def step(self, rate_factor: float, norm_factor: float = 1.0) -> float:
            limits.append(norm_factor)
            return super().step(rate_factor, norm_factor)

    _, logged = train(untrained, unequal(groups), dataclasses.replace(CONFIG, epochs=1, batch_pairs=4), Limits)
    assert limits == [entry["pairs"] / 4 for entry in logged]
    model = copy.deepcopy(untrained)
    config = dataclasses.replace(CONFIG, max_grad_norm=0.5)
    engine = LocalEngine(model, parameter_groups(model, config), config.max_grad_norm)
    clipped = []
    engine._optimizer.register_step_pre_hook(lambda *_: clipped.append(model.score.weight.grad.norm().item()))
    engine.backward(3.0 * model.score.weight.sum(), last=True)
    assert engine.step(0.25, 2.0) == pytest.approx(3.0 * 96**0.5), "the norm before clipping"
    assert clipped == [pytest.approx(1.0, rel=1e-4)]


@pytest.mark.parametrize("batch_tokens", [64, 150, 400])
def test_a_steps_gradient_does_not_depend_on_how_it_is_cut_into_micro_batches(untrained, groups, batch_tokens):
    config = dataclasses.replace(CONFIG, epochs=1, batch_pairs=9)
    whole, _ = train(untrained, groups, dataclasses.replace(config, batch_tokens=100_000), GradientRecorder)
    cut, _ = train(untrained, groups, dataclasses.replace(config, batch_tokens=batch_tokens), GradientRecorder)
    assert len(whole.steps) == len(cut.steps) == 2
    for one, other in zip(whole.steps, cut.steps, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-5)


def test_the_shares_of_several_ranks_add_up_to_the_steps_gradient(untrained, groups):
    """What a rank backpropagates times 1 / world, summed over ranks, idle ones among them."""
    config = dataclasses.replace(CONFIG, epochs=1, batch_pairs=100, pair_weights="step")
    whole, _ = train(untrained, groups, config, GradientRecorder)
    world, total = 5, None
    num_pairs = sum(len(group.pairs) for group in groups)
    for share in deal(groups, world, ROW_TOKENS, 400):
        model = copy.deepcopy(untrained)
        engine = LocalEngine(model, parameter_groups(model, config), 1.0)
        for micro in share:
            _backward(engine, micro, world / num_pairs, END, Objective(), last=False)
        part = gradients_of(model)
        total = part if total is None else {name: total[name] + part[name] for name in total}
    for name, gradient in whole.steps[0].items():
        torch.testing.assert_close(total[name] / world, gradient, rtol=0, atol=1e-5)


def test_the_log_counts_every_pair_and_ends_at_1(untrained, groups):
    _, logged = train(untrained, groups)
    assert len(logged) == 2 * 3, "18 pairs in steps of 6, twice"
    assert [entry["epoch"] for entry in logged] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert logged[-1]["progress"] == 1
    assert all(0 < entry["lr"] <= CONFIG.lr for entry in logged)
    assert all(entry["head_lr"] == pytest.approx(10 * entry["lr"]) for entry in logged)


def test_the_first_loss_of_a_zero_head_is_log_2(untrained, groups):
    model = copy.deepcopy(untrained)
    torch.nn.init.zeros_(model.score.weight)
    _, logged = train(model, groups)
    assert logged[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert logged[0]["margin"] == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_its_pairs_before_a_step(untrained, groups, poison):
    model = copy.deepcopy(untrained)
    with torch.no_grad():
        model.score.weight[0, ::2] = poison
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine = LocalEngine(model, parameter_groups(model, CONFIG), 1.0)
    with pytest.raises(UserError, match=r"the loss of step 1 is nan.*pair0, pair1, pair2.*--reward\.lr"):
        train_reward(engine, groups[:1], CONFIG, 0, ROW_TOKENS, END, lambda step, metrics: None)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_stops_before_a_step(untrained, groups):
    class Overflowing(LocalEngine):
        def backward(self, loss, *, last):
            super().backward(loss, last=last)
            self.model.score.weight.grad[0, 0] = torch.inf

    model = copy.deepcopy(untrained)
    engine = Overflowing(model, parameter_groups(model, CONFIG), 1.0)
    with pytest.raises(UserError, match=r"gradient's norm at step 1 is inf.*Its pairs, worst first: pair\d+"):
        train_reward(engine, groups, CONFIG, 0, ROW_TOKENS, END, lambda step, metrics: None)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in untrained.named_parameters())


def test_a_spike_stops_before_a_step_and_names_the_worst_pair_first():
    guard = LossGuard(max_rise=10)
    for step in range(40):
        guard.check_loss(step, 0.1, [])
    guard.check_loss(40, 6.9, [("a", 6.9)])
    again = LossGuard(max_rise=10)
    again.load(guard.state())
    with pytest.raises(UserError, match=r"step 41 is 7, more than .* 10 times the usual 0\.69.*first: b, a\."):
        again.check_loss(41, 7.0, [("a", 2.0), ("b", 12.0)])


def resumed_after(step, untrained, groups, config):
    """Metrics and weights of a training whose process is gone after this step and that goes on in another."""
    logged: list[dict] = []

    def leave():
        if training.num_steps == step:
            raise StoppedError

    model = copy.deepcopy(untrained)
    engine = LocalEngine(model, parameter_groups(model, config), config.max_grad_norm)
    training = RewardTraining(engine, groups, config, 0, ROW_TOKENS, END)
    with contextlib.suppress(StoppedError):
        training.run(lambda _, metrics: logged.append(metrics), leave)
    state, moments = json.dumps(training.state_dict()), copy.deepcopy(engine._optimizer.state_dict())

    model = copy.deepcopy(model)
    engine = LocalEngine(model, parameter_groups(model, config), config.max_grad_norm)
    engine._optimizer.load_state_dict(moments)
    training = RewardTraining(engine, groups, config, 0, ROW_TOKENS, END)
    training.load_state_dict(json.loads(state))
    training.run(lambda _, metrics: logged.append(metrics))
    return logged, model


@pytest.mark.parametrize("step", range(1, 7))
def test_a_training_that_stops_after_any_step_goes_on_bit_for_bit(step, untrained, groups):
    whole, wanted = train(untrained, groups), [entry["loss"] for entry in train(untrained, groups)[1]]
    logged, model = resumed_after(step, untrained, groups, CONFIG)
    assert [entry["loss"] for entry in logged] == wanted
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in whole[0].named_parameters())


def test_validation_weighs_every_pair_the_same_and_keeps_the_best(untrained, groups):
    config = dataclasses.replace(CONFIG, validate_every=2, epochs=3)
    model, kept, logged = copy.deepcopy(untrained), [], []
    engine = LocalEngine(model, parameter_groups(model, config), 1.0)
    training = RewardTraining(
        engine,
        groups[:4],
        config,
        0,
        ROW_TOKENS,
        END,
        validation=groups[4:],
        on_best=lambda: kept.append(copy.deepcopy(model.state_dict())),
    )
    training.run(lambda _, metrics: logged.append(metrics))
    measured = {i + 1: entry["validation_loss"] for i, entry in enumerate(logged) if "validation_loss" in entry}
    assert list(measured) == [2, 4, 6]
    best = min(measured, key=measured.get)
    assert (training.validation.best_step, training.validation.best_loss) == (best, measured[best])
    assert model.training
    model.load_state_dict(kept[-1])
    with torch.no_grad():
        margins = [
            model(input_ids=torch.tensor([group.tokens[pair.chosen].ids])).logits
            - model(input_ids=torch.tensor([group.tokens[pair.rejected].ids])).logits
            for group in groups[4:]
            for pair in group.pairs
        ]
    assert measured[best] == pytest.approx(float(bradley_terry(torch.cat(margins).squeeze(1)).mean()), abs=1e-5)


def test_training_stops_early_when_the_patience_runs_out(untrained, groups):
    worse = dataclasses.replace(CONFIG, lr=0.1, head_lr=0.5, epochs=20, validate_every=1, patience=3, max_loss_rise=1e9)
    model, logged = copy.deepcopy(untrained), []
    engine = LocalEngine(model, parameter_groups(model, worse), 1.0)
    training = RewardTraining(engine, groups[:4], worse, 0, ROW_TOKENS, END, validation=groups[4:])
    training.run(lambda _, metrics: logged.append(metrics))
    losses = [entry["validation_loss"] for entry in logged]
    assert len(losses) < 40, "else there is nothing to see here"
    assert min(losses[-3:]) >= min(losses[:-3])
    assert training.validation.best_step == len(losses) - 3


def test_the_local_engine_clips_and_scales_its_rates(untrained):
    model = copy.deepcopy(untrained)
    config = dataclasses.replace(CONFIG, max_grad_norm=0.5)
    engine = LocalEngine(model, parameter_groups(model, config), config.max_grad_norm)
    before = model.score.weight.detach().clone()
    engine.backward(3.0 * model.score.weight.sum(), last=True)
    assert engine.step(0.25) == pytest.approx(3.0 * 96**0.5), "the norm before clipping"
    # Adam's first step is the rate times the gradient's sign.
    torch.testing.assert_close(model.score.weight, before - 0.25 * config.head_lr, rtol=0, atol=1e-6)
    assert model.score.weight.grad is None


@st.composite
def prompt_group_lists(draw) -> list[PromptGroup]:
    """Up to 8 prompts with 2 to 4 responses and some of the pairs among them."""
    found = []
    for number in range(draw(st.integers(1, 8))):
        lengths = draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
        prompt = [100 + number] * draw(st.integers(1, 15))
        tokens = [Tokens([*prompt, *[10 + i] * n], 0) for i, n in enumerate(lengths)]
        all_pairs = list(permutations(range(len(lengths)), 2))
        places = draw(st.lists(st.sampled_from(all_pairs), min_size=1, max_size=6, unique=True))
        pairs = [PairOfGroup(f"{number}:{a}>{b}", a, b, None, None) for a, b in places]
        found.append(PromptGroup(f"p{number}", [f"r{i}" for i in range(len(lengths))], tokens, pairs))
    return found


step_lists = prompt_group_lists()


@given(step=step_lists, world=st.integers(1, 4), batch_tokens=st.integers(10, 120))
def test_every_rank_gets_as_many_micro_batches_and_every_pair_is_dealt_once(step, world, batch_tokens):
    shares = deal(step, world, 60, batch_tokens)
    assert len(shares) == world
    assert len({len(share) for share in shares}) == 1
    micros = [micro for share in shares for micro in share]
    dealt = Counter(pair.pair_id for micro in micros for group in micro.groups for pair in group.pairs)
    assert dealt == Counter(pair.pair_id for group in step for pair in group.pairs)
    idle = [micro for micro in micros if not any(group.pairs for group in micro.groups)]
    assert len(idle) < world
    assert all(micro.rows for micro in idle), "an idle rank has something to run forward"


@given(step=step_lists, batch_tokens=st.integers(10, 120))
def test_micro_batches_fit_the_budget_with_padding_unless_a_single_pair_does_not(step, batch_tokens):
    for micro in deal(step, 1, 60, batch_tokens)[0]:
        num_pairs = sum(len(group.pairs) for group in micro.groups)
        assert padded_tokens(micro.rows) <= batch_tokens or num_pairs == 1


@given(step=step_lists, world=st.integers(1, 3), batch_tokens=st.integers(10, 120))
def test_a_micro_batch_holds_both_answers_of_each_of_its_pairs(step, world, batch_tokens):
    for share in deal(step, world, 60, batch_tokens):
        for micro in share:
            keys = {key for row in micro.rows for key, _ in row.taken}
            for group in micro.groups:
                for pair in group.pairs:
                    assert {(group.prompt_id, pair.chosen), (group.prompt_id, pair.rejected)} <= keys


@given(groups=step_lists, batch_pairs=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_steps_cover_every_group_once_and_respect_the_batch(groups, batch_pairs, seed, epoch):
    steps = cut_into_steps(groups, batch_pairs, seed, epoch)
    assert Counter(g.prompt_id for step in steps for g in step) == Counter(g.prompt_id for g in groups)
    for step in steps:
        assert sum(len(group.pairs) for group in step) <= batch_pairs or len(step) == 1


def test_steps_depend_on_seed_and_epoch_alone(groups):
    def order(seed, epoch):
        return [[group.prompt_id for group in step] for step in cut_into_steps(groups, 6, seed, epoch)]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) > 5


def with_drawn_lengths(num_prompts: int) -> list[PromptGroup]:
    """One pair a prompt; the lengths of prompts and answers are drawn from lognormals, and fitted to no data set."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(num_prompts):
        prompt = [7] * int(np.clip(rng.lognormal(5.0, 1.0), 8, 2500))
        answers = [[10 + i] * int(np.clip(rng.lognormal(5.7, 0.8), 4, 1500)) for i in range(2)]
        tokens = [Tokens([*prompt, *answer], 0) for answer in answers]
        found.append(PromptGroup(f"p{number}", ["a", "b"], tokens, [PairOfGroup(f"{number}", 0, 1, None, None)]))
    return found


@pytest.mark.parametrize("batch_pairs", [8, 64, 128])
@pytest.mark.parametrize("world", [8, 32])
def test_a_step_takes_no_more_than_1_3_times_its_ideal_and_64_pairs_keep_8_ranks_busy(world, batch_pairs):
    """The ideal: what one rank runs shared out evenly, or the largest pair alone where that is longer."""
    busy = []
    for step in cut_into_steps(with_drawn_lengths(400), batch_pairs, 0, 0)[:-1]:
        dealt = deal(step, world, 2048, 8192)
        alone = sum(padded_tokens(micro.rows) for micro in deal(step, 1, 2048, 8192)[0])
        length = sum(max(padded_tokens(micro.rows) for micro in each) for each in zip(*dealt, strict=True))
        assert length <= 1.3 * max(alone / world, *(padded_tokens(group.rows(2048)) for group in step))
        assert all(micro.tokens == padded_tokens(micro.rows) for share in dealt for micro in share)
        busy.append(busy_share(dealt))
    if batch_pairs >= 8 * world:
        assert np.mean(busy) >= 0.9


def test_a_prompt_of_many_pairs_is_cut_where_other_ranks_would_wait_for_it():
    tokens = [Tokens([*[7] * 20, *[10 + i] * 100], 0) for i in range(8)]
    pairs = [PairOfGroup(f"{i}", 2 * i, 2 * i + 1, None, None) for i in range(4)]
    step = [PromptGroup("p", [f"r{i}" for i in range(8)], tokens, pairs)]
    dealt = deal(step, 4, 2048, 8192)
    assert all(any(group.pairs for group in share[0].groups) for share in dealt)
    assert busy_share(dealt) > 0.95
    assert len(deal(step, 1, 2048, 8192)[0]) == 1, "alone it repeats nothing"


@pytest.mark.parametrize(
    ("batch_pairs", "world", "said"), [(8, 8, "--num-workers 1,"), (63, 8, "--num-workers 7,"), (64, 8, ""), (8, 1, "")]
)
def test_a_start_says_when_a_step_has_too_few_pairs_for_its_workers(batch_pairs, world, said):
    config = dataclasses.replace(CONFIG, batch_pairs=batch_pairs, batch_tokens=8192)
    found = who_waits(with_drawn_lengths(400), config, 0, world, 2048)
    words = [
        f"A step of {batch_pairs} pairs for 8 workers is fewer than about 8 pairs a worker",
        "busy for",
        "padding",
        said,
    ]
    assert all(word in found for word in words) if said else found == ""


def test_what_a_rank_without_work_repeats_is_counted_nowhere(untrained, groups):
    model, firing = copy.deepcopy(untrained), RecentFiring(untrained.config.d_sae)
    engine = LocalEngine(model, parameter_groups(model, CONFIG), CONFIG.max_grad_norm)
    one = groups[0]._replace(pairs=groups[0].pairs[:1])
    (idle,) = next(share for share in deal([one], 2, ROW_TOKENS, 4096) if not share[0].groups)
    outcome, loss = _forward(engine, idle, 0, objective_of(CONFIG), firing)
    firing.end_step(torch.device("cpu"))
    assert firing.state()["num_seen"] == 0
    assert (outcome.pair_ids, Sums.of([outcome]).tokens) == ([], 0)
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_next_step_is_planned_while_this_one_runs(untrained, groups, monkeypatch):
    """On a GPU the planning of a step takes as long as the step."""
    plan, threads = RewardTraining._planned, []

    def planned(self, places):
        threads.append(threading.current_thread().name)
        return plan(self, places)

    monkeypatch.setattr(RewardTraining, "_planned", planned)
    train(untrained, groups)
    assert len(threads) == 6
    assert all(name.startswith("ahead") for name in threads)
