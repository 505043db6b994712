"""Reward cards: the one forward pass against the model run on every beginning alone, and the sums."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.report import browser
from tests.report.hostile import STRINGS
from tests.stages.random_sarm import random_sarm

from sarm.data.formats.sarm_folder import load_sarm
from sarm.passes.reader import sarm_reader
from sarm.report.numbers import number, signed
from sarm.report.reward_card import card, print_card, write_card
from sarm.settings.card import RewardCard
from sarm.settings.checks import UserError
from sarm.stages.card import make_card, read_prefixes

PROMPT = {"role": "user", "content": "how does a garden grow"}
ANSWER = "Slowly, at first. Then all at once!\n\nWater helps"


@pytest.fixture(scope="module")
def sarm(tiny_folder, tiny_chat, tmp_path_factory):
    return random_sarm(tmp_path_factory.mktemp("card") / "sarm", tiny_folder, tiny_chat)


@pytest.fixture(scope="module")
def model(sarm):
    return load_sarm(sarm)


@pytest.fixture(scope="module")
def prefixes(sarm):
    return read_prefixes(sarm_reader(sarm), [PROMPT, {"role": "assistant", "content": ANSWER}])


def test_every_beginning_has_the_reward_that_the_model_gives_it_alone(model, tiny_chat, prefixes):
    (tokens,) = tiny_chat.encode_responses([PROMPT], [ANSWER], offsets=True)
    own = [column for column, (start, end) in enumerate(tokens.offsets) if start < end]
    tail = tokens.ids[own[-1] + 1 :]
    assert len(prefixes.ends) == len(own)
    for num, reward in enumerate(prefixes.rewards()):
        ids = tokens.ids[: own[0] + num] + tail
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits.item()
        assert reward == pytest.approx(alone, abs=1e-4)


def test_offsets_say_which_characters_of_the_answer_a_token_covers(tiny_chat, prefixes):
    pieces = [ANSWER[start:end] for start, end in zip([0, *prefixes.ends[:-1]], prefixes.ends, strict=True)]
    assert "".join(pieces) == ANSWER
    (cut,) = tiny_chat.encode_responses([PROMPT], ["word " * 400], offsets=True)
    assert len(cut.offsets) == len(cut.ids) == tiny_chat.max_length
    assert cut.num_truncated > 0


def test_the_parts_of_a_card_add_up_to_the_reward(prefixes, model):
    weight = model.score.weight.detach().squeeze(0).numpy()
    content = card(prefixes, weight, {}, 3, (0.0, 2.0))
    assert content["reward"] == pytest.approx(
        sum(one["value"] for one in content["features"]) + content["rest"], abs=1e-6
    )
    for one in content["features"]:
        assert one["value"] == pytest.approx(one["weight"] * one["activation"], abs=1e-6)
    for parts in ("sentences", "tokens"):
        assert content["empty"] + sum(one["step"] for one in content[parts]) == pytest.approx(
            content["reward"], abs=1e-6
        )
    assert [one["text"] for one in content["sentences"]] == ["Slowly, at first.", "Then all at once!", "Water helps"]
    assert "".join(one["text"] for one in content["tokens"]) == ANSWER
    assert content["standardised"] == pytest.approx(content["reward"] / 2)
    assert content["num_rest"] == np.count_nonzero(prefixes.contribution[-1]) - 3


def test_a_card_of_hostile_texts_is_inert_on_the_page_and_on_the_terminal(prefixes, model, tmp_path):
    weight = model.score.weight.detach().squeeze(0).numpy()
    active = np.flatnonzero(prefixes.contribution.any(0)).tolist()
    content = card(prefixes, weight, dict.fromkeys(active, STRINGS[9]), 8, (0.0, 1.0))
    content["sentences"][0]["text"] = content["tokens"][0]["text"] = STRINGS[0]
    path = tmp_path / "new" / "card.html"
    write_card(content, STRINGS[13], STRINGS[3], path)
    page = path.read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "<svg" not in page
    out = io.StringIO()
    content["sentences"][0]["text"] = "\x1b[2J[bold red]x"
    print_card(content, Console(file=out, width=100))
    assert "[bold red]x" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    if not browser.missing():
        (found,) = browser.open_pages([path])
        assert (found["hit"], found["outside"], found["scripts"]) == (None, [], 0)
        assert found["phone"] <= 390


@pytest.mark.parametrize("width", [60, 80, 120])
def test_figures_are_whole_on_a_terminal_however_long_the_names_are(width):
    """Only texts are cut for room."""
    rows = [{"latent": 2080 + n, "name": "terms: " + "people who, the diversity, " * 9, "weight": -0.0123456 * n, "activation": 12.3456 * n, "value": -0.654321 * n} for n in (1, 2, 3)]  # fmt: skip
    sentence = {"text": "We should also be aware that " * 5, "step": -2.0785, "reward": 4.1849, "features": rows}
    content = {"features": rows, "rest": 0.0451, "num_rest": 19, "beyond": None, "reward": -2.1134, "empty": 6.2712, "sentences": [sentence]}  # fmt: skip
    out = io.StringIO()
    print_card(content, Console(file=out, width=width))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for one in rows:
        for figure in (signed(one["value"]), number(one["activation"]), signed(one["weight"]), f"{one['latent']} {signed(one['value'])}"):  # fmt: skip
            assert figure in shown, figure
    for figure in (0.0451, -2.1134, 6.2712, -2.0785, 4.1849):
        assert signed(figure) in shown, figure
    assert "reward" in shown
    assert "…" in shown


def test_a_conversation_file_makes_a_card(sarm, tmp_path, capsys):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([PROMPT, {"role": "assistant", "content": "yes"}]))
    content = make_card(RewardCard(model=sarm, conversation=file, out=tmp_path / "card.html"))
    assert (tmp_path / "card.html").read_text().count("no name yet") == len(content["features"])
    assert "reward" in capsys.readouterr().out


def test_what_is_no_conversation_is_one_line(sarm, tmp_path):
    with pytest.raises(UserError, match="no conversation"):
        RewardCard(model=sarm)
    with pytest.raises(UserError, match="two conversations"):
        RewardCard(model=sarm, prompt="a", response="b", conversation=tmp_path)
    file = tmp_path / "chat.json"
    for text, why in (
        ("{", "is no conversation"),
        ("[]", "ends with nothing"),
        (json.dumps([PROMPT]), "ends with user"),
        (json.dumps([PROMPT, {"role": "assistant"}]), r"is no conversation \(not_text\)"),
        (json.dumps("How?"), r"is no conversation \(not_messages\)"),
        # A card of the words alone would be of another reward.
        (
            json.dumps(
                [
                    PROMPT,
                    {
                        "role": "assistant",
                        "content": "Wait.",
                        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}],
                    },
                ]
            ),
            "calls tools",
        ),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            make_card(RewardCard(model=sarm, conversation=file, out=tmp_path / "card.html"))
    with pytest.raises(UserError, match="no token of its own"):
        make_card(RewardCard(model=sarm, prompt="a", response="  ", out=tmp_path / "card.html"))
    assert not (tmp_path / "card.html").exists()
