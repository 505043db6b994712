"""`sarm.load` and what it gives, against the model run alone, and `sarm.train`'s settings against the command line's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stages.random_sarm import D_SAE, random_sarm

import sarm
from sarm.api.training import configured
from sarm.data.formats.sarm_folder import load_sarm
from sarm.settings.checks import UserError
from sarm.settings.jobs import TrainSarm
from sarm.stages.job import parse

QUESTION = {"role": "user", "content": "how does a garden grow"}
ANSWERS = ["Slowly, at first.", "Water helps. Then all at once!", "No."]
CONVERSATIONS = [[QUESTION, {"role": "assistant", "content": answer}] for answer in ANSWERS]
OTHER = [{"role": "user", "content": "what is rain"}, {"role": "assistant", "content": "Water that falls."}]


@pytest.fixture(scope="module")
def folder(tiny_folder, tiny_chat, tmp_path_factory) -> Path:
    return random_sarm(tmp_path_factory.mktemp("api") / "sarm", tiny_folder, tiny_chat)


@pytest.fixture(scope="module")
def model(folder) -> sarm.RewardModel:
    return sarm.load(folder)


@torch.no_grad()
def alone(folder: Path, tiny_chat, conversation) -> float:
    """The reward of one conversation by the transformers model, in a row of its own."""
    (tokens,) = tiny_chat.encode([conversation])
    return load_sarm(folder)(input_ids=torch.tensor([tokens.ids])).logits.item()


def test_rewards_are_those_of_each_conversation_alone_in_the_order_that_they_came(folder, model, tiny_chat):
    mixed = [CONVERSATIONS[0], OTHER, *CONVERSATIONS[1:], CONVERSATIONS[0]]
    rewards = model.reward(mixed)
    assert rewards == pytest.approx([alone(folder, tiny_chat, one) for one in mixed], abs=1e-4)
    assert rewards[0] == pytest.approx(rewards[-1], abs=1e-6)
    assert model.reward([]) == []


def test_an_explanation_is_the_sum_that_the_reward_is(model):
    told = model.explain(CONVERSATIONS[1], features=3)
    assert told.reward == pytest.approx(model.reward([CONVERSATIONS[1]])[0], abs=1e-4)
    assert len(told.features) == 3
    assert told.rest + sum(one.contribution for one in told.features) == pytest.approx(told.reward, abs=1e-4)
    for one in told.features:
        assert one.contribution == pytest.approx(one.weight * one.activation, rel=1e-5)
        assert one.weight == model.weights[one.latent]


def test_an_explanation_is_shown_in_80_columns_and_written_as_a_page(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = model.explain(CONVERSATIONS[1])
    told.show()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert str(told.features[0].latent) in shown
    assert "Water helps" in told.write(tmp_path / "cards" / "card.html").read_text()


def test_an_edit_moves_rewards_by_the_change_of_weight_times_activation_and_leaves_the_model_alone(model):
    told = model.explain(CONVERSATIONS[0])
    first, second = told.features[:2]
    before = model.weights.copy()
    edited = model.edit({first.latent: 0.0}, scale={second.latent: -1.0})
    expected = told.reward - first.contribution - 2 * second.contribution
    assert edited.reward([CONVERSATIONS[0]])[0] == pytest.approx(expected, abs=1e-4)
    assert edited.edited == {first.latent: 0.0, second.latent: pytest.approx(-second.weight)}
    assert np.array_equal(model.weights, before)
    assert model.edited == {}
    assert model.reward([CONVERSATIONS[0]])[0] == pytest.approx(told.reward, abs=1e-4)
    # Edits add up, and one can be taken back.
    back = edited.edit({first.latent: first.weight, second.latent: second.weight})
    assert back.edited == {}


def test_an_edited_model_is_saved_and_loaded_with_its_edit(model, folder, tmp_path):
    latent = model.explain(CONVERSATIONS[0]).features[0].latent
    edited = model.edit(scale={latent: 3.0})
    saved = edited.save(tmp_path / "edited")
    loaded = sarm.load(saved)
    assert loaded.reward(CONVERSATIONS) == pytest.approx(edited.reward(CONVERSATIONS), abs=1e-6)
    (record,) = json.loads((saved / "edit.json").read_text())["weights"]
    assert (record["latent"], record["before"]) == (latent, float(model.weights[latent]))
    # The file that is left beside it is an edit of the model that it was made from.
    again = sarm.load(folder).edit(saved)
    assert np.array_equal(again.weights, edited.weights)
    with pytest.raises(UserError, match="there already"):
        edited.save(saved)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (CONVERSATIONS[0], "got one conversation"),
        ("text", "got one conversation"),
        (["text"], "conversation 0 is 'text'"),
        ([[]], "conversation 0"),
        ([CONVERSATIONS[0], [QUESTION]], "conversation 1: the conversation ends with user"),
        ([[QUESTION, {"role": "assistant", "content": 3}]], "conversation 0: .*no text"),
    ],
)
def test_what_is_no_list_of_conversations_is_refused_with_its_place(model, given, said):
    with pytest.raises(UserError, match=said):
        model.reward(given)


def test_an_edit_that_cannot_be_is_refused(model):
    for latent in (-1, D_SAE):
        with pytest.raises(UserError, match=f"latent {latent} is none"):
            model.edit({latent: 1.0})
    with pytest.raises(UserError, match="finite"):
        model.edit({0: float("nan")})


@pytest.mark.parametrize(("name", "said"), [("/no/such", "no model folder"), ("no-slash", "no model folder")])
def test_what_is_no_model_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        sarm.load(name)


def test_a_folder_without_a_sarm_and_a_dtype_that_is_none_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="no reward model"):
        sarm.load(tmp_path)
    with pytest.raises(UserError, match="float32 or bfloat16"):
        sarm.load(folder, dtype="float16")


def test_settings_of_train_are_those_that_flags_give(tmp_path):
    by_flags = parse(TrainSarm, "Train.", ["tiny", "--out", str(tmp_path), "--seed", "3", "--sae.k", "5", "--data.texts", "a.txt", "b.txt", "--num-workers", "2"])  # fmt: skip
    by_values = configured("tiny", out=tmp_path, seed=3, sae={"k": 5}, data={"texts": ["a.txt", "b.txt"]}, run={"num_workers": 2})  # fmt: skip
    assert by_values == by_flags
    assert configured("tiny") == parse(TrainSarm, "Train.", ["tiny"])


@pytest.mark.parametrize(
    ("preset", "settings", "said"),
    [
        ("tinny", {}, "did you mean 'tiny'"),
        ("tiny", {"sea": {"k": 5}}, "did you mean 'sae'"),
        ("tiny", {"sae": {"kk": 5}}, "did you mean 'k'"),
        ("tiny", {"data": {"pairs": "pairs.jsonl"}}, "is a list"),
        ("tiny", {"sae": {"k": 0}}, "k must be between"),
    ],
)
def test_wrong_settings_of_train_are_refused_with_what_may_have_been_meant(preset, settings, said):
    with pytest.raises(UserError, match=said):
        configured(preset, **settings)


def test_train_finds_a_finished_run_done_and_loads_its_model(finished):
    model = sarm.train("tiny", out=finished)
    row = json.loads((finished / "sarm" / "config.json").read_text())
    assert len(model.weights) == row["d_sae"]
    assert len(model.reward(CONVERSATIONS)) == 3
