"""The strongest texts of each latent, from codes that are in memory: what a report shows of a run's own held-out answers.

`tallies` keeps them for streams of any length.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sarm.contracts.tables import CONTEXTS_TABLE
from sarm.interpret.tallies import place_in_run


def strongest_texts(answers: pa.Table, n: int) -> pa.Table:
    """CONTEXTS with the `n` strongest distinct texts of each latent that fires; `rank` counts from 1.

    `answers` has doc_id, side, text, latents and values, the last two as lists. Texts of a latent are ordered by (-value, doc_id, side,
    text), and one text counts once, with its first place in this order: the order of the rows plays no part.
    """
    answers = answers.sort_by([(name, "ascending") for name in ("doc_id", "side", "text")])
    lists = answers["latents"].combine_chunks()
    # Ties are broken by the row, since rows are sorted.
    row_F = pc.list_parent_indices(lists).to_numpy()
    latent_F = pc.list_flatten(lists).to_numpy().astype(np.int64)
    # As float32, which is what the table stores: values are compared as they will be read back.
    value_F = pc.list_flatten(answers["values"].combine_chunks()).to_numpy().astype(np.float32)
    order = np.lexsort((row_F, -value_F, latent_F))
    order = order[value_F[order] > 0]
    codes = answers["text"].combine_chunks().dictionary_encode()
    text_F = codes.indices.to_numpy().astype(np.int64)[row_F]
    # The first place of each text among those of its latent.
    _, first = np.unique(latent_F[order] * len(codes.dictionary) + text_F[order], return_index=True)
    order = order[np.sort(first)]
    rank_F = place_in_run(latent_F[order]) + 1
    order, rank_F = order[rank_F <= n], rank_F[rank_F <= n]
    shown = answers.take(row_F[order])
    texts = {name: shown[name] for name in ("side", "doc_id", "text")}
    return pa.table({"latent": latent_F[order], "rank": rank_F, "value": value_F[order], **texts}).cast(CONTEXTS_TABLE)
