"""A reward model whose weights are set rather than trained: it rewards good words, and markdown more than it should, by known amounts.

What a short training leaves behind differs from processor to processor, and so does what an edit repairs of it. Here the residual after the
first block is the token's own embedding, which says in one direction whether the token is of good or bad answers and in another whether it is
of markdown. The second block's attention takes both's means over the whole text, and the head adds them up. So the reward is, up to the norms,
a * mean quality + b * mean markdown, and a dictionary at the first block has everything that there is to find.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.bench.planted_style import Pair

from sarm.audit.style_pairs import property_named
from sarm.data.sources.tiny import tiny_model

QUALITY, STYLE, MEAN_QUALITY, MEAN_STYLE = range(4)
"""Directions of the residual."""


def set_classifier(folder: Path, pairs: Sequence[Pair], bias: float) -> Path:
    """The model, saved as anybody would.

    Markdown adds `bias` times what lies between the two answers of a pair in the middle of `pairs`: above 1, most bad answers with it are
    preferred to good ones without.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=1, num_hidden_layers=2, dtype=torch.float32, pad_token_id=0)  # fmt: skip
    own = property_named("markdown", "")
    plain = [(own.base(pair["chosen"]), own.base(pair["rejected"])) for pair in pairs]
    styled = [own.style(good) or "" for good, _ in plain]
    good, bad = zip(*plain, strict=True)
    with torch.no_grad():
        _set_weights(model, *(_counts(tokenizer, texts) for texts in (good, bad, styled)))
        for place, weight in ((MEAN_QUALITY, 1.0), (MEAN_STYLE, 0.0)):
            model.score.weight[0, place] = weight
        between = _rewards(model, tokenizer, pairs, plain)
        model.score.weight[0] = torch.nn.functional.one_hot(torch.tensor(MEAN_STYLE), model.config.hidden_size)
        added = _rewards(model, tokenizer, pairs, list(zip(styled, good, strict=True)))
        model.score.weight[0, MEAN_QUALITY] = 1.0
        model.score.weight[0, MEAN_STYLE] = bias * between.median() / added.median()
        model.score.weight *= 4 / between.median()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _counts(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    counts = Counter(one for text in texts for one in tokenizer(text, add_special_tokens=False)["input_ids"])
    return torch.tensor([float(counts[one]) for one in range(len(tokenizer))])


def _set_weights(model: Any, good_V: torch.Tensor, bad_V: torch.Tensor, styled_V: torch.Tensor) -> None:
    second = model.model.layers[1]
    for name, parameter in model.model.layers.named_parameters():
        if "layernorm" not in name:
            parameter.zero_()
    embeddings = torch.randn(model.config.vocab_size, model.config.hidden_size) * 0.5
    embeddings[:, : MEAN_STYLE + 1] = 0.0
    known = len(good_V)
    embeddings[:known, QUALITY] = ((good_V + 1) / (bad_V + 1)).log().clamp(-2, 2)
    # Of markdown is what plain texts never have.
    embeddings[:known, STYLE] = 3.0 * ((styled_V > 0) & (good_V + bad_V == 0))
    model.model.embed_tokens.weight.copy_(embeddings)
    # Queries and keys are zero, so attention is the mean over all tokens; the first head takes the two directions along.
    for place, (source, target) in enumerate(((QUALITY, MEAN_QUALITY), (STYLE, MEAN_STYLE))):
        second.self_attn.v_proj.weight[place, source] = 1.0
        second.self_attn.o_proj.weight[target, place] = 1.0


def _rewards(model: Any, tokenizer: Any, pairs: Sequence[Pair], answers: Sequence[Sequence[str]]) -> torch.Tensor:
    """The first answer's reward minus the second's."""
    found = []
    for pair, sides in zip(pairs, answers, strict=True):
        turns = [[{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": side}] for side in sides]  # fmt: skip
        rewards = [model(torch.tensor([tokenizer.apply_chat_template(one, tokenize=True, return_dict=True)["input_ids"]])).logits[0, 0] for one in turns]  # fmt: skip
        found.append(rewards[0] - rewards[1])
    return torch.stack(found)
