"""What an evaluation says of how well a reward can be read, from the scores of held-out pairs."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sarm.data.formats.sarm_folder import read_latents
from sarm.data.store.pairs import load_pairs
from sarm.evaluate.readability import Named, Readability, named_latents, readability
from sarm.interpret.answered import answered_of


def answers_of(pairs: Path, scores: pa.Table) -> pa.Table:
    """The held-out responses of PAIR_SCORES, chosen ones first, with their texts and codes."""
    heldout = load_pairs(pairs, "heldout")
    place = pc.index_in(scores["pair_id"], value_set=heldout["pair_id"].combine_chunks())
    return pa.concat_tables(
        pa.table(
            {
                "doc_id": scores["pair_id"],
                "side": pa.array([side] * len(scores)),
                "text": heldout[side].take(place),
                "latents": scores[f"{side}_latents"],
                "values": scores[f"{side}_values"],
            }
        )
        for side in ("chosen", "rejected")
    )


def readability_of(model: Path, answers: pa.Table, scores: pa.Table, seed: int) -> tuple[Readability, list[Named]]:
    """The figures of a SARM's folder, and what words say of its latents; `answers` are those of its scores."""
    (weight,) = read_latents(model, "score.weight")
    answered = answered_of(scores, answers["text"], len(weight))
    named = named_latents(answered, weight, seed)
    return readability(answered, weight, named, seed), named
