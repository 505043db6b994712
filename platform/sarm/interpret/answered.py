"""Scored pairs as distinct responses with their codes."""

import numpy as np
import pyarrow as pa
from scipy import sparse

from sarm.contracts.ids import hash_share
from sarm.evaluate.readability import Answered
from sarm.interpret.attribution import active_latents

# Enough for intervals of a point, at seconds of counting.
_MAX_PAIRS = 20_000


def answered_of(scores: pa.Table, texts: pa.ChunkedArray, d_sae: int) -> Answered:
    """The responses of PAIR_SCORES, each once; `texts` are those of all chosen, then of all rejected ones.

    Of more than 20,000 pairs a random choice that depends on their ids alone. Raises UserError as `feature_table`.
    """
    num_pairs = scores.num_rows
    kept_N = np.argsort([hash_share(pair_id) for pair_id in scores["pair_id"].to_pylist()], kind="stable")[:_MAX_PAIRS]
    kept_N.sort()
    rows = [active_latents(scores, side, d_sae) for side in ("chosen", "rejected")]
    codes = [sparse.csr_array((value, (row, latent)), shape=(num_pairs, d_sae)) for row, latent, value in rows]
    all_texts, prompts = texts.to_pylist(), scores["prompt_id"].to_pylist()
    place_of: dict[tuple[str, str], int] = {}
    taken: list[int] = []
    pairs_N2 = np.empty((len(kept_N), 2), dtype=np.int64)
    for i, pair in enumerate(kept_N):
        for side in range(2):
            number = side * num_pairs + int(pair)
            key = (prompts[pair], all_texts[number])
            if key not in place_of:
                place_of[key] = len(taken)
                taken.append(number)
            pairs_N2[i, side] = place_of[key]
    values = sparse.csr_array(sparse.vstack(codes)[taken])
    return Answered(
        values=values,
        prompts=np.array([prompt for prompt, _ in place_of]),
        texts=[text for _, text in place_of],
        pairs=pairs_N2,
    )
