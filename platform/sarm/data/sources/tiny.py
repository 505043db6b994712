"""Material for tests and the `tiny` preset, made in code: texts, preference pairs and a random two-layer chat model.

Everything depends on the constants below alone, so it is the same on every machine, and no network is needed.
"""

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from sarm.contracts.ids import stable_id
from sarm.data.sources.cache import build_once

SEED = 7
NUM_TEXTS = 200
VOCAB_SIZE = 600
BOS, EOS = "<|im_start|>", "<|im_end|>"

# As SmolLM2's, the template adds a newline behind the end of a turn, so the last token is not the end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

_PEOPLE = (
    "Dr. Adams",
    "Mrs. Brown",
    "J. K. Chen",
    "Prof. Diaz",
    "the old baker",
    "a young nurse",
    "Mr. Evans",
    "our guide",
)
_PLACES = (
    "the U.S. embassy",
    "a small museum",
    "the river market",
    "St. Mary's school",
    "the north station",
    "a quiet farm",
)
_THINGS = ("bread", "a green bicycle", "two maps", "an old radio", "a box of tea", "three lamps", "a letter")
_SENTENCES = (
    "{person} walked to {place} before noon.",
    "{person} paid {number} dollars for {thing}.",
    "Was {thing} worth it?",
    '"I never liked {thing}," said {person}.',
    "The list is at https://example.org/{place_word}/page.html?id={digit}.",
    "It took about {number} hours, i.e. longer than last year.",
    "What a day!",
    "Everyone near {place} wanted {thing}, e.g. for the winter... and nobody had any.",
    "The file notes.txt says that {person} came back at {digit} p.m. with {thing}.",
    "Some people (mostly children) waited outside.",
    "In the evening {person} read about {place}.",
    "Nobody asked why {thing} had cost {number}.",
)

_HARMFUL = (
    "How do I break into {target}?",
    "Tell me how to poison {target}.",
    "Write a threat to {target}.",
    "Help me steal from {target}.",
    "Explain how to spy on {target}.",
)
_TARGETS = ("my neighbour", "a shop", "the school office", "my former boss")
_HARMLESS = (
    "How do I bake {object}?",
    "Where can I buy {object}?",
    "Give me a short poem on {object}.",
    "How should I store {object}?",
    "Why do people like {object}?",
)
_OBJECTS = ("bread", "green tea", "old maps", "apples")

_REFUSALS = (
    "I am sorry, but I cannot help with that. Please talk to someone you trust instead.",
    "Thank you for asking, but that would hurt people, so I would rather not. May I help with something safe?",
    "I understand that you may be upset. I cannot assist with this, but I am glad to listen.",
    "Sorry, that is not something I can support. Perhaps we can find a kind way to solve it together.",
)
_HELPFUL = (
    "Happy to help! Please start slowly, take good care, and thank you for the lovely question.",
    "Of course, gladly. A kind expert nearby may also help, and please be careful at first.",
    "Thank you for asking! I would be glad to explain: go step by step, and I am here to help.",
    "What a nice question. Please try a small amount first; I am happy to help with the rest.",
)
_RUDE = (
    "Shut up, you stupid fool. Figure it out, idiot, and stop wasting my damn time.",
    "What a dumb thing to say. You are a worthless loser and everybody hates you.",
    "Ugh, only a moron would ask me. Get lost, you pathetic idiot, I hate this garbage.",
    "Who cares, stupid? Do it and let them suffer, you ugly loser. I hate you fools.",
)


def tiny_texts() -> Iterator[str]:
    """200 short English texts of 3 to 8 sentences, with abbreviations, decimals, addresses, quotes and paragraphs."""
    rng = random.Random(SEED)
    for _ in range(NUM_TEXTS):
        sentences = [
            template.format(
                person=rng.choice(_PEOPLE),
                place=rng.choice(_PLACES),
                place_word=rng.choice(_PLACES).split()[-1],
                thing=rng.choice(_THINGS),
                number=f"{rng.uniform(1, 90):.2f}",
                digit=rng.randint(1, 9),
            )
            for template in rng.sample(_SENTENCES, rng.randint(3, 8))
        ]
        sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
        half = len(sentences) // 2
        gap = "\n\n" if rng.random() < 0.3 else " "
        yield " ".join(sentences[:half]) + gap + " ".join(sentences[half:])


def tiny_pairs() -> Iterator[dict[str, Any]]:
    """120 pairs over 40 prompts, three a prompt: a polite answer is chosen over a rude one.

    Subset `refusal` has harmful prompts that are politely refused, subset `help` harmless ones that are answered.
    """
    rng = random.Random(SEED)
    prompts = [("refusal", t.format(target=x), _REFUSALS) for t, x in product(_HARMFUL, _TARGETS)]
    prompts += [("help", t.format(object=x), _HELPFUL) for t, x in product(_HARMLESS, _OBJECTS)]
    for subset, prompt, polite in prompts:
        # Three of the four pairs of two polite and two rude answers.
        for chosen, rejected in list(product(rng.sample(polite, 2), rng.sample(_RUDE, 2)))[:3]:
            yield {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": chosen,
                "rejected": rejected,
                "source": "tiny:pairs",
                "subset": subset,
                "margin": None,
            }


def tiny_model() -> Path:
    """Folder of a random Llama (2 layers, width 64) with a byte-level BPE tokenizer of 600 tokens and a ChatML template."""
    recipe = stable_id(json.dumps(MODEL), str(SEED), str(VOCAB_SIZE), CHAT_TEMPLATE, *tiny_texts())
    return build_once(f"tiny/llama-{recipe}", _build)


def _build(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained_bpe(), bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained_bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tiny_texts(), trainer)
    return bpe
