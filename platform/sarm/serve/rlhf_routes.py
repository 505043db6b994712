"""What OpenRLHF, LLaMA-Factory and slime send to a reward server, and what they read of its answer.

Their texts are in the policy's template. None of them can send a header or knows of a wait: they are held as long as possible, and what
they cannot use is a status that they repeat.
"""

import math
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from sarm.data.sources.conversations import Message
from sarm.data.tokens.written_turns import ForeignTextError
from sarm.serve.encoding import SPELLED, Encoded, Encoder
from sarm.serve.faults import RequestError
from sarm.serve.schemas import LlamaFactoryRequest, OpenRlhfRequest, Query, SlimeRequest
from sarm.serve.service import Answer, Service
from sarm.serve.watched_answers import origin_of


async def openrlhf(service: Service, request: OpenRlhfRequest, query: Query) -> dict[str, Any]:
    """`rewards` trains, `scores` is between 0 and 1 for dynamic filtering, and `extra_logs` has the same names whatever was sent.

    An empty query has empty lists: older clients send one to every server but the first.
    """
    queries = [request.query] if isinstance(request.query, str) else request.query
    prompts = [*(request.prompts or []), *[None] * len(queries)]
    found = await _texts(service, queries, prompts, query)
    values = [service.value(one, query.variant, query.scale) for one in found]
    standardised = [service.value(one, query.variant, "standardised") if one.penalty is None else one.penalty for one in found]  # fmt: skip
    return {
        "rewards": values,
        "scores": [sigmoid(value) for value in standardised],
        "extra_logs": {
            "sarm_truncated": [float(_encoded(one).is_truncated) for one in found],
            "sarm_cut": [float(_encoded(one).is_cut) for one in found],
            "sarm_special_tokens_in_content": [float(SPELLED in _encoded(one).flags) for one in found],
            "sarm_tokens": [float(len(_encoded(one).ids)) for one in found],
        },
    }


async def llama_factory(service: Service, request: LlamaFactoryRequest, query: Query) -> dict[str, Any]:
    """`scores`, one a text."""
    if request.max_length is not None and request.max_length < service.about.max_length:
        raise RequestError(422, "bad_request", f"max_length cannot be below the model's, which is {service.about.max_length}")  # fmt: skip
    found = await _texts(service, request.messages, [None] * len(request.messages), query)
    return {
        "id": f"scoreval-{uuid.uuid4().hex}",
        "object": "score.evaluation",
        "created": int(time.time()),
        "model": request.model,
        "scores": [service.value(one, query.variant, query.scale) for one in found],
    }


async def slime(service: Service, request: SlimeRequest, query: Query) -> float | dict[str, Any]:
    """The whole answer is the reward; with `?form=object`, an object for slime's `--reward-key reward`."""
    service.check_variants([query.variant])
    ((found,),) = await service.answers([partial(_slime_encoded, request)], scale=query.scale, origin=origin_of(query))
    value = service.value(found, query.variant, query.scale)
    if query.form == "number":
        return value
    encoded = _encoded(found)
    return {"reward": value, "scale": query.scale, "truncated": encoded.is_truncated, "flags": list(encoded.flags)}


async def _texts(service: Service, texts: Sequence[str], prompts: Sequence[str | None], query: Query) -> list[Answer]:
    service.check_variants([query.variant])
    encodings = [partial(_text_encoded, text, prompt) for text, prompt in zip(texts, prompts, strict=False)]
    found = await service.answers(encodings, scale=query.scale, origin=origin_of(query))
    return [answer for own in found for answer in own]


def _text_encoded(text: str, prompt: str | None, encoder: Encoder) -> list[Encoded]:
    return [encoder.text(text, prompt)]


def _slime_encoded(request: SlimeRequest, encoder: Encoder) -> list[Encoded]:
    """A response is what was generated, mostly without its end of turn, so that it does not say whether it was cut off."""
    if not isinstance(request.prompt, str):
        return [encoder.messages([*request.prompt, _answer(encoder.without_end(request.response))])]
    if not request.prompt:
        raise ForeignTextError("the prompt is empty. Send a rendered one, or messages.")
    found = encoder.text(request.prompt + request.response, request.prompt)
    return [found._replace(is_truncated=False)]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _encoded(answer: Answer) -> Encoded:
    assert answer.encoded is not None
    return answer.encoded


def sigmoid(value: float) -> float:
    """Between 0 and 1, for any finite value."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))
