"""Cross-entropy recovered by a trained SAE, on texts of the corpus that it has not seen."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import torch

from sarm.data.formats.models import model_folder
from sarm.data.store.looked_groups import is_heldout
from sarm.data.tokens.chat import load_tokenizer
from sarm.evaluate.cross_entropy import cross_entropies
from sarm.nn.pretrained import load_language_model
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

# Of each text; enough for most of a passage.
_MAX_TOKENS = 256


def cross_entropy_figures(
    sae: Sae, corpus: Path, activations: dict[str, Any], num_texts: int, heldout_share: float, device: torch.device
) -> dict[str, float]:
    """Cross-entropies in nats a token and the share recovered, on at most `num_texts` texts whose activations were held out.

    `activations` is the store's metadata, which names model and layer. Raises UserError if no text was held out.
    """
    model = ModelSettings(name=activations["model"], revision=activations["revision"], layer=activations["layer"])
    folder = model_folder(model)
    tokenizer = load_tokenizer(model, folder)
    texts = [
        tokenizer(text).input_ids[:_MAX_TOKENS] for text in itertools.islice(_heldout(corpus, heldout_share), num_texts)
    ]
    if not texts:
        raise UserError(
            f"no text of {corpus} was held out. Pass a larger --sae.heldout-share, or --sae.cross-entropy-texts 0."
        )
    language_model = load_language_model(folder, model.layer, revision=model.revision).eval().to(device)
    found = cross_entropies(language_model, model.layer, sae, texts)
    return {
        "ce_recovered": found.recovered(),
        "ce_clean": found.clean,
        "ce_spliced": found.spliced,
        "ce_zero": found.zero,
        "ce_tokens": float(found.num_tokens),
    }


def _heldout(corpus: Path, share: float) -> Iterator[str]:
    for batch in ds.dataset([str(path) for path in sorted(corpus.glob("*.parquet"))]).to_batches(
        columns=["row_id", "text"]
    ):
        for row in batch.to_pylist():
            if is_heldout(f"{row['row_id']:016x}", share):
                yield row["text"]
