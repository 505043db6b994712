"""vLLM's own server with a converted SARM of each family: every reward is ours.

It has an environment of its own: `make test-vllm` sets it up, and says in `SARM_VLLM` where its Python is.
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.data.tokens.chat_families import chat_of
from tests.integrations.vllm.server import asked, vllm_server
from tests.serve.asked import conversation, readings
from tests.stages.random_sarm import random_sarm, with_scale
from transformers import AutoConfig, AutoModelForCausalLM

from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.settings.conversion import ConvertSarm
from sarm.settings.model import ModelSettings
from sarm.stages.convert_sarm import convert_sarm

PYTHON = os.environ.get("SARM_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-vllm")

MEAN, STD = 0.75, 2.5
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# Backbone, tokenizer and template, and options beside the common ones. ChatML's and Gemma's templates write a newline behind every answer.
FAMILIES = {
    "llama": ("chatml", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("chatml", {}),
    "qwen3": ("qwen3", {}),
    # A soft cap of 2 is felt by random weights.
    "gemma2": ("gemma", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2, **_MIXED}),
    "gemma3_text": ("gemma", _MIXED),
}
_COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
_BEGINNINGS = ("slowly", "with water", "it does not grow", "ask a neighbour", "in the evening,", "nobody knows:")
CONVERSATIONS = [
    conversation(f"{_BEGINNINGS[n % 6]} {'and light ' * (n % 7)}after {n} days.") for n in range(52)
] + [
    [*conversation(f"first {n}"), {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "Bread. " * n}]
    for n in range(1, 9)
]  # fmt: skip


class Running:
    """A server, what is asked of it, and our own readings of the same conversations."""

    def __init__(self, address: str, source: Path, chat):
        self.address, self.chat = address, chat
        self.readings = readings(source, CONVERSATIONS)
        self.rewards = [(one.reward - MEAN) / STD for one in self.readings]
        self.ids = [one.ids for one in chat.encode(CONVERSATIONS)]

    def classified(self, **body) -> list[float]:
        status, answer = asked(self.address, "/classify", **body)
        assert status == 200, answer
        assert {one["label"] for one in answer["data"]} == {"reward"}
        return [one["probs"][0] for one in answer["data"]]


@pytest.fixture(scope="module", params=FAMILIES)
def running(request, tmp_path_factory):
    """One server at a time, on a random SARM of two blocks."""
    template, options = FAMILIES[request.param]
    place, given = tmp_path_factory.mktemp(request.param), chat_of(template)
    layers = {"layer_types": [*options["layer_types"], "full_attention"]} if "layer_types" in options else {}
    config = AutoConfig.for_model(request.param, vocab_size=len(given.tokenizer), pad_token_id=None, **{**_COMMON, **options, **layers})  # fmt: skip
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    # With the class of tokenizer that transformers takes for this family, as whoever loads such a model has.
    given.tokenizer.save_pretrained(place / "model")
    chat = load_chat_tokenizer(ModelSettings(name=str(place / "model"), max_length=256), place / "model")
    source = random_sarm(place / "sarm", place / "model", chat, layer=2)
    with_scale(source, MEAN, STD)
    convert_sarm(ConvertSarm(source=source, target=place / "vllm", format="vllm", on_cut_off="refuse"))
    # Nothing is compiled for a tiny model.
    with vllm_server(PYTHON, place / "vllm", place / "log", "--enforce-eager") as address:
        yield Running(address, source, chat)


def test_classify_by_token_ids(running):
    assert len(set(running.rewards)) > 50, "what is compared differs"
    assert running.classified(input=running.ids) == pytest.approx(running.rewards, abs=1e-4)
    assert running.classified(input=running.ids[:3], use_activation=False) == pytest.approx(running.rewards[:3], abs=1e-4)  # fmt: skip


def test_classify_by_messages(running):
    found = [running.classified(messages=messages)[0] for messages in CONVERSATIONS]
    assert found == pytest.approx(running.rewards, abs=1e-4)


def test_classify_by_text_with_what_the_template_writes_behind_the_answer(running):
    texts = [running.chat.render(messages) for messages in CONVERSATIONS]
    assert running.classified(input=texts, add_special_tokens=False) == pytest.approx(running.rewards, abs=1e-4)


def test_pooling_explains(running):
    status, answer = asked(running.address, "/pooling", task="plugin", data={"conversations": CONVERSATIONS})
    assert status == 200, answer
    for found, reading in zip(answer["data"], running.readings, strict=True):
        assert found["raw_reward"] == pytest.approx(reading.reward, abs=1e-4)
        assert found["reward"] == pytest.approx((reading.reward - MEAN) / STD, abs=1e-4)
        assert sum(found["contributions"]) == pytest.approx(reading.reward, abs=1e-4)
        ours = dict(zip(reading.latents.tolist(), reading.values.tolist(), strict=True))
        assert dict(zip(found["latents"], found["values"], strict=True)) == pytest.approx(ours, abs=1e-4)
        assert not found["cut_off"]
    status, answer = asked(running.address, "/pooling", task="classify", input=running.ids)
    assert [one["data"][0] for one in answer["data"]] == pytest.approx(running.rewards, abs=1e-4)


def test_requests_at_once_get_their_own_rewards(running):
    order = [n for n in range(len(running.ids)) for _ in range(4)]
    random.Random(0).shuffle(order)

    def one(n: int) -> float:
        if n % 3:
            return running.classified(input=[running.ids[n]])[0]
        status, answer = asked(running.address, "/pooling", task="plugin", data={"input_ids": [running.ids[n]]})
        assert status == 200, answer
        return answer["data"][0]["reward"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, order)) == pytest.approx([running.rewards[n] for n in order], abs=1e-4)


def test_answers_that_were_cut_off_are_refused_and_the_server_goes_on(running):
    cut = running.ids[5][:-1]
    status, answer = asked(running.address, "/classify", input=[running.ids[4], cut])
    assert status == 400, answer
    status, answer = asked(running.address, "/pooling", task="plugin", data={"input_ids": [cut]})
    assert status == 400
    assert "the answer was cut off" in answer["error"]["message"]
    status, answer = asked(running.address, "/pooling", task="plugin", data={"conversations": [CONVERSATIONS[5]], "finish": ["length"]})  # fmt: skip
    assert status == 400
    assert running.classified(input=[running.ids[4]]) == pytest.approx([running.rewards[4]], abs=1e-4)


@pytest.mark.parametrize("data", [{}, {"conversations": "text"}, {"input_ids": [[10**6]]}, {"input_ids": [[1] * 5000]}])
def test_bad_requests_are_refused_and_the_server_goes_on(running, data):
    status, answer = asked(running.address, "/pooling", task="plugin", data=data)
    assert status == 400, answer
    assert running.classified(input=[running.ids[0]]) == pytest.approx([running.rewards[0]], abs=1e-4)
