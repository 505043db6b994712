"""An answer as the watch takes it: what was encoded and read of it, and its contributions under a head."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from sarm.audit.drift import Answer
from sarm.passes.reader import Reading
from sarm.serve.encoding import SPELLED, Encoded
from sarm.serve.heads import BASE, Heads
from sarm.serve.schemas import DEFAULT_RUN, DEFAULT_SPLIT, Query

# Of an answer that an alarm may show, its last tokens.
_SHOWN_TOKENS = 512


class Seen(NamedTuple):
    """An answer that was read. `name` is the same for a request that is sent again; None if nothing says so."""

    name: str | None
    encoded: Encoded
    reading: Reading


@dataclass(frozen=True)
class Origin:
    """Where a request's answers come from, and under which heads they were scored."""

    run: str = DEFAULT_RUN
    split: str = DEFAULT_SPLIT
    step: int | None = None
    variants: tuple[str, ...] = (BASE,)


class Record(NamedTuple):
    """What the watch keeps of an answer under one head, and what one replica of a server sends to another's watch."""

    name: str | None
    answer: Answer
    ids: Int32[NDArray[np.int32], " tokens"]
    """Its last token ids."""


Records = dict[str, list[Record]]
"""By variant."""


def records_of(origin: Origin, seen: Sequence[Seen], heads: Heads) -> Records:
    """Answers under each of the heads that they were scored with and that are still there."""
    ids = [np.asarray(one.encoded.ids[-_SHOWN_TOKENS:], np.int32) for one in seen]
    return {
        variant: [Record(one.name, answer_of(one, heads, variant), own) for one, own in zip(seen, ids, strict=True)]
        for variant in origin.variants
        if variant in heads.names
    }


def origin_of(query: Query) -> Origin:
    """What the address of a request says of it."""
    return Origin(query.run, query.split, query.step, (query.variant,))


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
