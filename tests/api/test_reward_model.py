"""`sarm.load` and what it gives, against the model run alone, and `sarm.train`'s settings against the command line's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stages.random_sarm import D_SAE, random_sarm

import sarm
from sarm.api.training import configured
from sarm.audit.steering import Edit
from sarm.data.formats.feature_edit import FeatureEdit, save_edit
from sarm.data.formats.sarm_folder import load_sarm
from sarm.nn.architectures import build_sae
from sarm.nn.splice import LatentEdit, Splice
from sarm.passes.models import BESIDE, find_model, hash_of_folder
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking
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
        (None, "expected a list of conversations, got None"),
        ([None], "conversation 0 is 'None'"),
        (["text"], "conversation 0 is 'text'"),
        ([[]], "conversation 0"),
        ([CONVERSATIONS[0], [QUESTION]], "conversation 1: the conversation ends with user"),
        ([[QUESTION, {"role": "assistant", "content": 3}]], "conversation 0: .*no text"),
    ],
)
def test_what_is_no_list_of_conversations_is_refused_with_its_place(model, given, said):
    with pytest.raises(UserError, match=said):
        model.reward(given)


def test_conversations_may_come_one_after_the_other(model):
    assert model.reward(iter(CONVERSATIONS)) == model.reward(CONVERSATIONS)
    assert model.reward(tuple(iter(one)) for one in CONVERSATIONS) == model.reward(CONVERSATIONS)


def test_a_conversation_that_is_longer_than_the_model_reads_is_scored_with_a_warning(model, tiny_chat):
    long = [{"role": "user", "content": "grow " * tiny_chat.max_length}, CONVERSATIONS[0][1]]
    with pytest.warns(UserWarning, match=f"1 of 2 conversations have more than {tiny_chat.max_length:,} tokens"):
        first, second = model.reward([CONVERSATIONS[0], long])
    assert first == pytest.approx(model.reward([CONVERSATIONS[0]])[0], abs=1e-6)
    assert second == pytest.approx(model.explain(long).reward, abs=1e-4)


def test_a_model_with_an_edit_of_features_beside_its_weights_is_read_with_it_as_evaluations_read_it(folder, tmp_path, tiny_chat):  # fmt: skip
    own = Path(shutil.copytree(folder, tmp_path / "sarm"))
    sae = build_sae("topk", load_sarm(folder).config.backbone["hidden_size"], 32, 4)
    torch.manual_seed(1)
    for weight in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight)
    (own / BESIDE).mkdir()
    splice = Splice(sae, 1, [LatentEdit(latent) for latent in range(32)])
    save_edit(FeatureEdit((splice,), "all", hash_of_folder(own), ("0" * 32,)), own / BESIDE)
    spec = find_model(Benchmarking(model=str(own), benchmarks=("pairs=x",)))
    (scored,), _ = load_scorer(spec, 256)([Request([QUESTION], ANSWERS, alone=False)])
    edited = sarm.load(own)
    assert edited.reward(CONVERSATIONS) == pytest.approx([one.score for one in scored], abs=1e-4)
    assert max(np.abs(np.subtract(edited.reward(CONVERSATIONS), sarm.load(folder).reward(CONVERSATIONS)))) > 1e-2
    assert edited.explain(CONVERSATIONS[0]).reward == pytest.approx(scored[0].score, abs=1e-4)
    saved = sarm.load(edited.save(tmp_path / "saved"))
    assert not (tmp_path / "saved" / BESIDE).exists(), "it would be applied twice"
    assert saved.reward(CONVERSATIONS) == pytest.approx(edited.reward(CONVERSATIONS), abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"role": "assistant", "content": 3}, "no text"),
        ({"role": "user", "content": "more"}, "ends with user"),
        ({"role": "assistant", "content": "Wait.", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]}, "calls of tools"),
        ({"role": "assistant", "content": "", "tool_calls": "?"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_answer_in_words_is_not_explained(model, answer, said):
    with pytest.raises(UserError, match=said):
        model.explain([QUESTION, answer])


def test_an_explanation_of_no_features_is_refused(model):
    for number in (0, -1):
        with pytest.raises(UserError, match="features must be at least 1"):
            model.explain(CONVERSATIONS[0], features=number)


@pytest.mark.parametrize(
    ("latents", "given"),
    [([0, D_SAE], None), ([-1], None), (None, {"weights": [1.0, 2.0]}), (None, {"weights": {"0": 1.0}}), (None, {"scale": {0: "much"}}), (None, {"scale": {0: 1e300}})],
)  # fmt: skip
def test_an_edit_of_another_model_or_of_no_numbers_is_refused(model, latents, given):
    if latents is not None:
        weight = np.array([float(model.weights[latent % D_SAE]) for latent in latents])
        given = {"weights": Edit(np.array(latents), weight, weight + 1.0)}
    with pytest.raises(UserError, match=r"is none of|expected a number|finite"):
        model.edit(**given)


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
    # Values as other programs hold them: a number that is a text, a path where a text is stored, a text where a path is.
    by_text = configured("tiny", seed=3, sae={"k": "5"}, data={"texts": [Path("a.txt"), "b.txt"]}, run={"num_workers": 2, "out": str(tmp_path)})  # fmt: skip
    assert by_text == by_flags


@pytest.mark.parametrize(
    ("preset", "settings", "said"),
    [
        ("tinny", {}, "did you mean 'tiny'"),
        ("tiny", {"sea": {"k": 5}}, "did you mean 'sae'"),
        ("tiny", {"sae": {"kk": 5}}, "did you mean 'k'"),
        ("tiny", {"data": {"pairs": "pairs.jsonl"}}, "is a list"),
        ("tiny", {"sae": {"k": 0}}, "k must be between"),
        ("tiny", {"sae": {"k": 2.5}}, r"sae\['k'\] cannot be 2.5"),
        ("tiny", {"sae": {"architecture": "topkk"}}, r"sae\['architecture'\] cannot be 'topkk'"),
        ("tiny", {"reward": {"lr": "fast"}}, r"reward\['lr'\] cannot be 'fast'"),
        ("tiny", {"sae": 5}, "sae is 5, expected its settings by name"),
        ("tiny", {"run": {"dry_run": True}}, r"run\['dry_run'\] does nothing here"),
        ("tiny", {"run": {"submit": "http://h:8265"}}, r"run\['submit'\] does nothing here"),
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
