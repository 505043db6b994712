"""Where a SARM that is given token ids alone finds the rewarded token, and what it does where an answer was cut off."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokens.chat_families import FAMILIES, chat_of
from tests.nn.test_modeling_sarm import build
from transformers import AutoModelForSequenceClassification, pipeline

from sarm.data.formats.sarm_folder import save_sarm
from sarm.nn.modeling_sarm import CODE_FILES, SarmForSequenceClassification
from sarm.nn.protocol import PROTOCOL_VERSION

PROMPT = [{"role": "user", "content": "How do I pick a lock?"}]
ANSWERS = ("I am sorry, but I cannot help with that.", "First take a thin wire, then go slowly.")


@pytest.fixture(scope="module")
def model(tiny_folder, tiny_chat):
    found = build(tiny_folder)
    found.config.answer_place, found.config.protocol_version = tiny_chat.answer_place, PROTOCOL_VERSION
    return found


@pytest.fixture(scope="module")
def sequences(tiny_chat) -> list[list[int]]:
    return [tokens.ids for tokens in tiny_chat.encode_responses(PROMPT, ANSWERS)]


@torch.no_grad()
def rewards(model, *rows: list[int], **options) -> list[float]:
    """Rewards of rows of one length."""
    return model(input_ids=torch.tensor(rows), **options).logits.squeeze(-1).tolist()


def test_an_answer_that_was_cut_off_is_closed_and_says_so(model, sequences):
    for ids in sequences:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids[:-1]]))
        assert out.logits.item() == pytest.approx(rewards(model, ids)[0], abs=1e-5)
        assert out.cut_off.tolist() == [True]
        assert out.unopened.tolist() == [False]
    with torch.no_grad():
        assert model(input_ids=torch.tensor([sequences[0]])).cut_off.tolist() == [False]


def test_two_cut_answers_of_one_prompt_never_get_the_prompts_reward(model, sequences):
    length = min(map(len, sequences)) - 4
    first, second = rewards(model, *(ids[:length] for ids in sequences))
    assert first != second
    end = model.config.end_of_turn_id
    prompts = [ids[: ids.index(end) + 1] for ids in sequences]
    assert prompts[0] == prompts[1]
    model.config.answer_place, place = None, model.config.answer_place
    try:
        old = rewards(model, *(ids[:length] for ids in sequences))
    finally:
        model.config.answer_place = place
    # Alone in a batch the last bits of a row may differ, as a processor's kernels have it.
    assert old[0] == old[1] == pytest.approx(rewards_of_prompt(model, prompts[0]), rel=1e-5), "what protocol 1 gave"


@torch.no_grad()
def rewards_of_prompt(model, ids: list[int]) -> float:
    """The reward at the prompt's own end of turn."""
    places = {"rewarded_rows": torch.tensor([0]), "rewarded_columns": torch.tensor([len(ids) - 1])}
    order = torch.arange(len(ids))[None]
    tokens = torch.tensor([ids])
    return model(input_ids=tokens, position_ids=order, segment_ids=torch.zeros_like(tokens), **places).logits.item()


def test_a_cut_off_answer_can_be_refused_or_penalised(model, sequences):
    cut = sequences[0][:-3]
    with pytest.raises(ValueError, match=r"rows \[0\] have no end of turn .* pass on_cut_off='close'"):
        rewards(model, cut, on_cut_off="refuse")
    model.config.reward_mean, model.config.reward_std = 2.0, 0.5
    assert rewards(model, cut, on_cut_off="penalise") == [0.5]
    model.config.cut_off_reward = -7.0
    assert rewards(model, cut, on_cut_off="penalise") == [-7.0]
    whole = rewards(model, sequences[0], on_cut_off="penalise")
    assert whole == rewards(model, sequences[0], on_cut_off="refuse") == rewards(model, sequences[0])
    with pytest.raises(ValueError, match="on_cut_off must be one of"):
        type(model.config)(on_cut_off="guess")


def padded(sequences: list[list[int]], side: str, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, sequences)) + 3
    ids, mask = torch.full((len(sequences), length), pad), torch.zeros(len(sequences), length, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        start = length - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = torch.tensor(tokens), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["the end of turn", "another"])
@torch.no_grad()
def test_padded_rows_without_a_mask_get_the_rewards_that_they_get_with_one(model, sequences, side, pad):
    pad_id = model.config.end_of_turn_id if pad == "the end of turn" else 17
    model.config.pad_token_id = pad_id
    for rows in (sequences, [ids[:-2] for ids in sequences]):
        ids, mask = padded(rows, side, pad_id)
        wanted = torch.tensor([rewards(model, tokens)[0] for tokens in rows])
        for found in (model(input_ids=ids), model(input_ids=ids, attention_mask=mask)):
            torch.testing.assert_close(found.logits.squeeze(-1), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_plain_strings_and_prompts_are_told_from_answers(model, tiny_chat, sequences):
    plain = tiny_chat.encode_text("How do I pick a lock? I cannot help with that.").ids
    end = model.config.end_of_turn_id
    prompt = sequences[0][: sequences[0].index(end) + 1]
    for ids in (plain, prompt):
        out = model(input_ids=torch.tensor([ids]))
        assert (out.unopened.tolist(), out.cut_off.tolist()) == ([True], [True])
    # Of a long answer only the end may be left.
    out = model(input_ids=torch.tensor([sequences[0][-5:]]))
    assert (out.unopened.tolist(), out.cut_off.tolist()) == ([False], [False])


@torch.no_grad()
def test_text_behind_the_rewarded_token_is_reported(model, tiny_chat, sequences):
    end = model.config.end_of_turn_id
    more = tiny_chat.encode_text(" and more of it").ids
    for behind, unscored in (([], False), ([end, end], False), ([*more, end], True)):
        out = model(input_ids=torch.tensor([sequences[0] + behind]))
        assert (out.unscored.tolist(), out.cut_off.tolist()) == ([unscored], [False])


def test_labels_are_regressed_on_and_embeddings_refused(model, sequences):
    ids = torch.tensor([sequences[0]])
    out = model(input_ids=ids, labels=torch.tensor([1.5]))
    assert out.loss.item() == pytest.approx((out.logits.item() - 1.5) ** 2)
    assert model(input_ids=ids).loss is None
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 64))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_every_cut_of_every_familys_conversations_is_rewarded_behind_its_own_answer(family, model, data):
    """No forward pass: the places alone, with the family's ids."""
    chat = chat_of(family)
    words = st.sampled_from(
        ["So", "\nso", " so", "1", "-", "Is it?", "a <|im_end|> b", "</s>", "é", "assistant", "[/INST]", "\n\n"]
    )
    content = st.lists(words, min_size=1, max_size=5).map("".join)
    turns = data.draw(st.integers(1, 3))
    messages = [
        {"role": role, "content": "x" + data.draw(content)} for _ in range(turns) for role in ("user", "assistant")
    ]
    (tokens,) = chat.encode([messages])
    (asked,) = chat.encode([[*messages[:-1], {"role": "assistant", "content": "y"}]])
    shared = next(n for n, (a, b) in enumerate(zip(tokens.ids, asked.ids, strict=False)) if a != b)
    end, place = len(tokens.ids) - 1, chat.answer_place
    cut = data.draw(st.integers(shared, end))
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    pad = chat.end_of_turn_id

    class Stub:
        config = type(
            "Config", (), {"answer_place": place, "end_of_turn_id": pad, "on_cut_off": "close", "pad_token_id": pad}
        )

    def places(ids):
        return SarmForSequenceClassification.answer_places(Stub(), torch.tensor([ids]))

    if chat.opening_ids:
        # A tail as truncation to any length leaves it, within the opening or within the answer.
        opened = next(
            n for n in range(end, 0, -1) if tuple(tokens.ids[n - len(chat.opening_ids) : n]) == chat.opening_ids
        )
        tail = tokens.ids[data.draw(st.integers(opened - len(chat.opening_ids) + 1, end - 1)) :]
        bos = [] if chat.bos_id is None else [chat.bos_id]
        kept = places([pad] * left + bos + tail + [pad] * right)
        assert (kept.columns.item(), kept.cut_off.item(), kept.unscored.item()) == (
            left + len(bos + tail) - 1,
            False,
            False,
        )
        assert kept.mask[0].tolist() == [0] * left + [1] * len(bos + tail) + [1] * right
        on = places(
            tokens.ids + chat.encode([[*messages, {"role": "user", "content": "But why?"}]])[0].ids[len(tokens.ids) :]
        )
        # Where the opening ends the user's turn, an answer to it is awaited, and cut off.
        assert on.unscored.item() or on.cut_off.item()
        assert not places(tokens.ids).unscored.item()
    whole = places([pad] * left + tokens.ids + [pad] * right)
    assert (whole.columns.item(), whole.cut_off.item()) == (left + end, False)
    found = places([pad] * left + tokens.ids[:cut])
    assert found.cut_off.item()
    assert not found.unopened.item()
    assert found.columns.item() == left + cut
    assert found.input_ids[0, left : left + cut + 1].tolist() == [*tokens.ids[:cut], chat.end_of_turn_id]
    assert found.mask[0].tolist() == [0] * left + [1] * (cut + 1)


@pytest.fixture(scope="module")
def saved(model, tiny_chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sarm")
    model.config.cut_off_reward = None
    save_sarm(model, tiny_chat, folder)
    return folder


def test_a_loaded_model_is_saved_with_the_code_that_reads_it(saved, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(saved).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in saved.glob("*.py")}
    for path in saved.glob("*.py"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


_SAVE_AGAIN = """
import sys
sys.modules["sarm"] = None
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
"""


def test_a_model_loaded_without_the_package_is_saved_with_its_code(saved, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _SAVE_AGAIN, str(saved), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == set(CODE_FILES)


def test_a_text_classification_pipeline_gives_the_reward_itself(saved, tiny_chat, model, sequences):
    classify = pipeline("text-classification", model=str(saved), tokenizer=tiny_chat.tokenizer)
    (found,) = classify([tiny_chat.render([*PROMPT, {"role": "assistant", "content": ANSWERS[0]}])])
    assert found["label"] == "reward"
    assert found["score"] == pytest.approx(rewards(model, sequences[0])[0], abs=1e-5)


def test_the_config_of_protocol_1_still_loads_and_says_what_it_cannot_do(tiny_folder, caplog, sequences):
    old = build(tiny_folder)
    assert (old.config.protocol_version, old.config.answer_place) == (1, None)
    with torch.no_grad():
        out = old(input_ids=torch.tensor([sequences[0][:-2]]))
    assert out.cut_off is None
