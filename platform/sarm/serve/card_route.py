"""`POST /v1/card`: which latents are active after every token of an answer, with their weights and names.

All that a reward card shows is a sum of these: the reward after each token, under the model's own head and under any other.
"""

from functools import partial
from typing import Any

from sarm.passes.reader import Reading
from sarm.serve.encoding import Encoded, Encoder
from sarm.serve.faults import RequestError
from sarm.serve.heads import BASE
from sarm.serve.schemas import CardRequest, Query
from sarm.serve.service import Service


async def card(service: Service, request: CardRequest, query: Query) -> dict[str, Any]:
    """The codes of every beginning of the answer, the empty one first and the whole last. Not counted by the watch.

    Raises RequestError: 422 for a conversation that cannot be scored, or whose answer's beginnings cannot be read.
    """
    if query != Query():
        raise RequestError(422, "bad_request", "this route takes no options in the address")
    ((answer,),) = await service.answers([partial(_encoded, messages=request.messages)])
    assert answer.read is not None
    assert answer.encoded is not None
    assert answer.encoded.beginnings is not None
    readings = [*answer.read.beginnings, answer.read.reading]
    response = request.messages[-1]["content"]
    starts = (0, *answer.encoded.beginnings.ends[:-1])
    weight_S = service.heads.weights(BASE)
    latents = sorted({int(latent) for reading in readings for latent in reading.latents})
    return {
        "model": service.about.as_json(),
        "reward": service.value(answer, BASE, "raw"),
        "standardised": service.value(answer, BASE, "standardised"),
        "cut": answer.encoded.is_cut,
        "flags": list(answer.encoded.flags),
        "tokens": [response[start:end] for start, end in zip(starts, answer.encoded.beginnings.ends, strict=True)],
        "codes": [_codes(reading) for reading in readings],
        "latents": [{"id": one, "name": service.names.of(one), "weight": float(weight_S[one])} for one in latents],
    }


def _encoded(encoder: Encoder, messages: list[dict[str, Any]]) -> list[Encoded]:
    return [encoder.with_beginnings(messages)]


def _codes(reading: Reading) -> list[tuple[int, float]]:
    """Latents with their values, in as few digits as a float32 needs."""
    return [(int(latent), float(str(value))) for latent, value in zip(reading.latents, reading.values, strict=True)]
