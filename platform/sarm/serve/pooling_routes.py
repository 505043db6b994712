"""The routes of inference servers: vLLM's `/classify` and `/pooling`, SGLang's `/classify` and `/v1/embeddings`, and TEI's `/predict`.

Scores are rewards, standardised unless the address says `?scale=raw`. Where the server that is spoken to would put a sigmoid over a score
unless told not to, so does this one.
"""

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from sarm.serve.encoding import Encoded, Encoder
from sarm.serve.faults import RequestError
from sarm.serve.rlhf_routes import sigmoid
from sarm.serve.schemas import PoolingRequest, Query, TeiRequest
from sarm.serve.service import Answer, Encoding, Service
from sarm.serve.watched_answers import origin_of


async def classify(service: Service, request: PoolingRequest, query: Query) -> Any:
    """vLLM's for `input` and `messages`; SGLang's for `text` and `input_ids`, which answers a single text with a single object."""
    if request.input is not None or request.messages is not None:
        values, found = await _scored(service, request, query)
        data = [{"index": n, "label": "reward", "probs": [value], "num_classes": 1} for n, value in enumerate(values)]
        return _listing(service, request, query, found, "classify", data)
    values, found = await _scored(service, request, query, is_raw_default=True)
    objects = [
        {
            "embedding": [value],
            "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": tokens, "finish_reason": None, "scale": query.scale},
        }
        for value, tokens in zip(values, _tokens(found), strict=True)
    ]
    is_single = isinstance(request.text, str) or _is_ids(request.input_ids)
    return objects[0] if is_single else objects


async def pooling(service: Service, request: PoolingRequest, query: Query) -> dict[str, Any]:
    """vLLM's, for the task `classify`, which is the one that a reward model has."""
    if request.task not in (None, "classify"):
        raise RequestError(400, "bad_request", "the task must be classify: a reward model has no other")
    values, found = await _scored(service, request, query)
    data = [{"index": n, "object": "pooling", "data": [value]} for n, value in enumerate(values)]
    return _listing(service, request, query, found, "pool", data)


async def embeddings(service: Service, request: PoolingRequest, query: Query) -> dict[str, Any]:
    """SGLang's way to serve reward models, which verl uses: an embedding of one number, without a sigmoid."""
    if request.input is None:
        raise RequestError(400, "bad_request", "there is no input")
    values, found = await _scored(service, request, query, is_raw_default=True)
    data = [{"index": n, "object": "embedding", "embedding": [value]} for n, value in enumerate(values)]
    return _listing(service, request, query, found, "embd", data)


async def predict(service: Service, request: TeiRequest, query: Query) -> Any:
    """TEI's: a text or a pair gives a list of one label, a batch a list of those.

    A text is a rendered conversation, a pair what a user and an assistant say. What is too long loses its beginning, never its end.
    """
    if (request.truncation_direction or "left").lower() == "right":
        raise RequestError(422, "bad_request", "truncation_direction right would cut off the rewarded token; leave it out or pass left")  # fmt: skip
    inputs = request.inputs
    is_batch = isinstance(inputs, list) and not _is_pair(inputs)
    each: list[Any] = inputs if isinstance(inputs, list) and is_batch else [inputs]
    service.check_variants([query.variant])
    encodings = [partial(_tei_encoded, one) for one in each]
    found = await service.answers(
        encodings, scale=query.scale, origin=origin_of(query), refuse_long=not request.truncate
    )
    values = [service.value(answer, query.variant, query.scale) for own in found for answer in own]
    labels = [[{"score": value if request.raw_scores else sigmoid(value), "label": "reward"}] for value in values]
    return labels if is_batch else labels[0]


async def _scored(
    service: Service, request: PoolingRequest, query: Query, *, is_raw_default: bool = False
) -> tuple[list[float], list[Answer]]:
    limit = service.about.max_length
    if request.truncate_prompt_tokens is not None and request.truncate_prompt_tokens not in (
        -1,
        *range(limit, 1 << 24),
    ):
        raise RequestError(400, "bad_request", f"truncate_prompt_tokens cannot be below the model's {limit}; leave it out")  # fmt: skip
    service.check_variants([query.variant])
    found = [
        answer
        for own in await service.answers(_encodings(request), scale=query.scale, origin=origin_of(query))
        for answer in own
    ]
    values = [service.value(answer, query.variant, query.scale) for answer in found]
    is_activated = not is_raw_default if request.use_activation is None else request.use_activation
    return [sigmoid(value) if is_activated else value for value in values], found


def _encodings(request: PoolingRequest) -> list[Encoding]:
    if request.messages is not None:
        messages = request.messages
        return [lambda encoder: [encoder.messages(messages)]]
    given: Any = next(one for one in (request.input, request.text, request.input_ids) if one is not None)
    each = [given] if isinstance(given, str) or _is_ids(given) else given
    return [partial(_one_encoded, one) for one in each]


def _one_encoded(one: str | list[int], encoder: Encoder) -> list[Encoded]:
    return [encoder.text(one) if isinstance(one, str) else encoder.ids(one)]


def _tei_encoded(one: str | Sequence[str], encoder: Encoder) -> list[Encoded]:
    if isinstance(one, str):
        return [encoder.text(one)]
    if len(one) == 1:
        return [encoder.text(one[0])]
    return encoder.completions([{"role": "user", "content": one[0]}], [one[1]])


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and isinstance(given[0], int)


def _is_pair(inputs: Sequence[Any]) -> bool:
    """Two strings are a prompt with its answer, and no batch."""
    return len(inputs) == 2 and all(isinstance(one, str) for one in inputs)


def _tokens(found: Sequence[Answer]) -> list[int]:
    return [len(one.encoded.ids) if one.encoded is not None else 0 for one in found]


def _listing(
    service: Service,
    request: PoolingRequest,
    query: Query,
    found: Sequence[Answer],
    kind: str,
    data: list[dict[str, Any]],
) -> dict[str, Any]:
    tokens = sum(_tokens(found))
    return {
        "id": f"{kind}-{request.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model or service.about.name,
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
        "scale": query.scale,
    }
