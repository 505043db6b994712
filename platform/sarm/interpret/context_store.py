"""contexts/v1: what makes each latent of a reward model fire, and how often; the reader.

`contexts.parquet` holds texts (`schema.LATENT_CONTEXTS`), `latents.parquet` one row a latent and place that fired there
(`schema.LATENT_SUMMARIES`). Places: "sentence", the last token of a sentence (where the papers look), and "rewarded", the
final token (the only one that the reward reads). Kinds: "top", the strongest distinct texts, and "decile", texts drawn by hash
from each tenth of the positive activations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.folders import CONTEXTS_FOLDER
from sarm.contracts.manifest import read_manifest
from sarm.contracts.tables import LATENT_CONTEXTS_TABLE, LATENT_SUMMARIES_TABLE
from sarm.settings.checks import UserError

CONTEXTS_FILE, LATENTS_FILE = "contexts.parquet", "latents.parquet"
PLACES = ("sentence", "rewarded")


@dataclass(frozen=True)
class ContextStore:
    """A finished contexts/v1 folder in memory."""

    folder: Path
    contexts: pa.Table
    """`schema.LATENT_CONTEXTS`, by latent, place, kind, decile and rank."""
    latents: pa.Table
    """`schema.LATENT_SUMMARIES`, by latent and place."""
    facts: dict[str, Any]
    """Counts of the manifest: `model` (identity of the reward model), `d_sae`, `texts` ..."""

    def of(self, latent: int, place: str) -> pa.Table:
        """The contexts of one latent at one place."""
        table = self.contexts
        return table.filter(pc.and_(pc.equal(table["latent"], latent), pc.equal(table["place"], place)))


def load_contexts(folder: Path, model: str | None = None) -> ContextStore:
    """Read a folder that `jobs/collect_contexts.py` finished.

    `model` is the identity that the contexts have to belong to, if any. Raises UserError if the folder is missing, unfinished,
    torn, of another kind or of another model.
    """
    manifest = read_manifest(folder, CONTEXTS_FOLDER)
    if model is not None and manifest.counts.get("model") != model:
        raise UserError(
            f"{folder} holds contexts of another model ({str(manifest.counts.get('model'))[:12]}, expected {model[:12]}). Collect them again for this one, or pass its own --model."
        )
    return ContextStore(
        folder,
        _read(folder / CONTEXTS_FILE, LATENT_CONTEXTS_TABLE),
        _read(folder / LATENTS_FILE, LATENT_SUMMARIES_TABLE),
        manifest.counts,
    )


def _read(path: Path, expected: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}. Delete {path.parent} and collect again.") from error
    if not table.schema.equals(expected):
        raise UserError(
            f"{path} has the columns {', '.join(table.schema.names)}, expected {', '.join(expected.names)}. Delete {path.parent} and collect again."
        )
    return table
