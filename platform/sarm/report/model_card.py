"""The model card of a SARM (Mitchell et al. 2019), as the README of its folder: how it was made, from what, how good it is, what it is not for.

What is not known is said to be unknown, and no figure stands without its interval where it has one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from sarm.report.dictionary_note import dictionary_note
from sarm.report.numbers import share, span
from sarm.report.render import cell, table

_NOT_FOR = (
    "a verdict on a person, or on whether an answer is true, lawful or safe: it ranks answers as its training pairs did",
    "the only guard of what a model says or does",
    "training a policy without watching for reward hacking: a policy finds answers that are paid for what their features do not mean",
    "prompts, languages and chat templates that its training pairs do not have",
    "rewards compared between conversations with other prompts, or with those of another model",
)


class Made(NamedTuple):
    """What is known of a model beside its own folder."""

    config: Mapping[str, Any]
    """Its `config.json`."""
    pairs: Sequence[str] = ()
    """The preference sources that it was trained on."""
    texts: Sequence[str] = ()
    """The text sources that its dictionary was trained on."""
    num_pairs: int | None = None
    accuracies: Sequence[Mapping[str, Any]] = ()
    """Rows of a report: name, accuracy, ci95."""
    num_heldout: int | None = None
    edited: int = 0
    """How many weights of its head were edited after training."""
    feature_edits: Sequence[Mapping[str, Any]] = ()
    """The edits of features inside its blocks, as its config has them."""


def model_card(made: Made, name: str, licence: str, version: str) -> str:
    """The card as Markdown, with the metadata that the hub reads."""
    config, known = made.config, made.config.get("provenance") or {}
    base = str(known.get("model") or "")
    facts = {
        "base model": cell(base or "unknown"),
        "revision": cell(known.get("revision", "unknown")),
        "layer": cell(config.get("layer")),
        "dictionary": f"{config.get('d_sae', 0):,} latents, {config.get('k')} active, {cell((config.get('sae') or {}).get('architecture', 'topk'))}",
        "activations": "standardised" if config.get("standardise", True) else "as they are",
        "longest conversation": f"{known.get('max_length', 'unknown')} tokens",
        "chat template (hash)": cell(known.get("template", "unknown")),
        "tokenizer (hash)": cell(known.get("tokenizer", "unknown")),
        "protocol": cell(config.get("protocol_version", 1)),
        "rewards of training answers": f"mean {config.get('reward_mean', 0):.3g}, standard deviation {config.get('reward_std', 1):.3g}",
        "licence": cell(licence or "not stated; that of the base model applies"),
    }
    notes = dictionary_note(known)
    if made.edited:
        notes = [
            *notes,
            f"{made.edited} weights of the head were edited after training; the figures below are of the model before.",
        ]
    if made.feature_edits:
        told = ", ".join(f"{len(one['edits'])} at layer {one['layer']}" for one in made.feature_edits)
        notes = [
            *notes,
            f"Features inside its blocks were edited after training ({cell(told)}); the figures below are of the model before.",
        ]
    parts = [
        f"# {cell(name)}",
        "A reward model whose score is a sum of a few nameable features (SARM, arXiv 2508.08746). The first blocks of the base model read a "
        "conversation; a sparse autoencoder turns the activation of the answer's last token into a few active latents; a linear head adds them "
        "up. The reward is exactly the sum of weight times activation over these latents.",
        *(f"> {note}" for note in notes),
        table(("", ""), facts.items()),
        "## Data",
        _data(made),
        "## Figures",
        _figures(made),
        "## Not to be used for",
        "\n".join(f"- {line}" for line in _NOT_FOR),
        "## How to use it",
        _USE.replace("MODEL", name),
        f"Written by `sarm push`, version {version}.",
    ]  # fmt: skip
    return f"---\n{_metadata(made, base, licence)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(made: Made, base: str, licence: str) -> str:
    hubs = [match[1] for source in made.pairs if (match := re.match(r"hf:([\w.-]+/[\w.-]+)", source))]
    data = ModelCardData(
        license=licence or None,
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII) else None,
        datasets=hubs or None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", "sparse-autoencoder", "interpretability", "sarm"],
    )
    return str(data.to_yaml())


def _data(made: Made) -> str:
    if not made.pairs:
        return "The preference pairs that it was trained on are not known."
    num = "" if made.num_pairs is None else f" ({made.num_pairs:,} training pairs)"
    lines = [f"Preferences{num}: {', '.join(map(cell, made.pairs))}."]
    lines += [f"Texts of the dictionary: {', '.join(map(cell, made.texts))}."] if made.texts else []
    return "\n\n".join([*lines, "Prompts are split by hash: no prompt of a held-out pair was trained on."])


def _figures(made: Made) -> str:
    if not made.accuracies:
        return "It was not evaluated where this card was written."
    rows = [
        (cell(row["name"]), share(row["accuracy"]), span(row["ci95"]) if row.get("ci95") else "not measured")
        for row in made.accuracies
    ]
    num = "" if made.num_heldout is None else f", over {made.num_heldout:,} held-out pairs"
    return f"Share of pairs in the right order{num}. Intervals are over prompts.\n\n" + table(
        ("held-out accuracy", "", "95 % interval"), rows
    )


_USE = """With the package `sarm`:

```python
import sarm

model = sarm.load("MODEL")
conversation = [{"role": "user", "content": "How do I pick a lock?"}, {"role": "assistant", "content": "I can't help with that."}]
model.reward([conversation])  # raw rewards
model.explain(conversation).show()  # what they are the sum of
```

With transformers alone. The first line runs the code in this folder; the tokenizer needs none of it, which `trust_remote_code=False` says:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

model = AutoModelForSequenceClassification.from_pretrained("MODEL", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("MODEL", trust_remote_code=False)
text = tokenizer.apply_chat_template(conversation, tokenize=False)
pipeline("text-classification", model=model, tokenizer=tokenizer)(text, add_special_tokens=False)  # label "reward", the raw reward
```

Conversations have to be in this model's own chat template. Contents that spell its control tokens are text to the package, and control tokens
to a plain tokenizer."""
