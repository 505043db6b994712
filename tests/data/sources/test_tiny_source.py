from collections import Counter

import numpy as np
import pytest

from sarm.data.sources.cache import cache_root
from sarm.data.sources.tiny import _trained_bpe, tiny_model, tiny_pairs, tiny_texts
from sarm.data.tokens.sentences import sentence_ends


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_model()


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def test_texts_are_many_different_and_always_the_same():
    texts = list(tiny_texts())
    assert len(set(texts)) == 200
    assert texts == list(tiny_texts())
    assert all(len(sentence_ends(text)) >= 3 for text in texts)
    assert all(trap in " ".join(texts) for trap in ("Dr. ", "U.S. ", "https://", "i.e. ", "...", "\n\n"))


def test_every_prompt_has_three_pairs_that_share_answers():
    pairs = list(tiny_pairs())
    per_prompt = Counter(pair["prompt"][0]["content"] for pair in pairs)
    assert len(pairs) == 120
    assert set(per_prompt.values()) == {3}
    assert len(per_prompt) == 40
    assert Counter(pair["subset"] for pair in pairs) == {"refusal": 60, "help": 60}
    assert pairs == list(tiny_pairs())


def test_length_tells_nothing_about_preference():
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in tiny_pairs())
    assert longer < 120
    lengths = [len(pair[side]) for pair in tiny_pairs() for side in ("chosen", "rejected")]
    assert max(lengths) < 2 * min(lengths)


def test_the_tokenizer_is_the_same_each_time_it_is_trained():
    assert _trained_bpe().to_str() == _trained_bpe().to_str()


def test_any_text_survives_the_tokenizer(tokenizer):
    assert len(tokenizer) <= 600
    text = "Grüße 👍 from St. Mary's, 3.14!\n\n\tEnd"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chats_are_rendered_with_a_newline_behind_the_end_of_a_turn(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert (
        tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 2


def test_the_model_is_small_seeded_and_built_once(model_folder, monkeypatch, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == 64
    assert model.config.num_key_value_heads == 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = torch.get_rng_state()
    monkeypatch.setenv("SARM_CACHE", str(tmp_path))
    again = tiny_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert again.is_relative_to(cache_root())
    assert (again / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    stamp = (again / "model.safetensors").stat().st_mtime_ns
    assert tiny_model() == again
    assert (again / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_probe_on_the_random_model_prefers_the_polite_answer_of_unseen_prompts(model_folder, tokenizer):
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModelForCausalLM

    pairs = list(tiny_pairs())
    chats = [
        [*pair["prompt"], {"role": "assistant", "content": pair[side]}]
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    # Without the newline, so that the end-of-turn token is the last.
    texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip() for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][torch.arange(len(texts)), last] == tokenizer.eos_token_id).all()
    with torch.no_grad():
        hidden = AutoModelForCausalLM.from_pretrained(model_folder)(**batch, output_hidden_states=True).hidden_states[1]
    both = hidden[torch.arange(len(texts)), last].numpy().reshape(len(pairs), 2, -1)
    both = (both - both.mean((0, 1))) / both.std((0, 1))
    margins = both[:, 0] - both[:, 1]
    heldout = np.array([i // 3 % 4 == 0 for i in range(len(pairs))])
    train = margins[~heldout]
    probe = LogisticRegression(fit_intercept=False).fit(
        np.concatenate([train, -train]), [1] * len(train) + [0] * len(train)
    )
    assert (margins[heldout] @ probe.coef_[0] > 0).mean() >= 0.9
