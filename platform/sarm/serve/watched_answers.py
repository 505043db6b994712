"""An answer as the watch takes it: what was encoded and read of it, and its contributions under a head."""

import hashlib
from typing import NamedTuple

import numpy as np

from sarm.audit.drift import Answer
from sarm.passes.reader import Reading
from sarm.serve.encoding import SPELLED, Encoded
from sarm.serve.heads import Heads


class Seen(NamedTuple):
    """An answer that was read. `name` is the same for a request that is sent again; None if nothing says so."""

    name: str | None
    encoded: Encoded
    reading: Reading


def answer_of(seen: Seen, heads: Heads, variant: str) -> Answer:
    """An answer as the watch sees it, under one head."""
    encoded, reading = seen.encoded, seen.reading
    prompt = np.asarray(encoded.ids[: encoded.prompt_tokens], np.int64).tobytes()
    return Answer(
        latents=reading.latents,
        contributions=heads.terms(variant, reading),
        prompt=hashlib.blake2b(prompt, digest_size=12).hexdigest(),
        tokens=len(encoded.ids) - encoded.prompt_tokens,
        is_truncated=encoded.is_truncated,
        is_cut=encoded.is_cut,
        is_injected=SPELLED in encoded.flags,
        unexplained=reading.unexplained,
    )


def term_of(answer: Answer, latent: int) -> float:
    """What a latent adds to the answer's raw reward."""
    return float(answer.contributions[answer.latents == latent].sum())
