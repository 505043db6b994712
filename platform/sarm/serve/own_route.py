"""`POST /v1/rewards`: several answers to a prompt, several heads at once, and what each reward is the sum of."""

import time
from functools import partial
from typing import Any

from sarm.serve.encoding import Encoded, Encoder
from sarm.serve.faults import RequestError
from sarm.serve.names import named
from sarm.serve.schemas import Item, Penalty, Query, RewardsRequest
from sarm.serve.service import Answer, Service
from sarm.serve.watched_answers import Origin


async def rewards(service: Service, request: RewardsRequest, query: Query) -> dict[str, Any]:
    """The rewards of every answer of every item, in the request's order.

    Raises RequestError: 404 for another model or variant, 409 for another identity than is expected, 422 for an item that cannot be scored.
    """
    if query != Query():
        raise RequestError(422, "bad_request", "this route takes its options in the body")
    about = service.about
    if request.model is not None and request.model != about.name:
        raise RequestError(404, "unknown_model", f"there is no such model; {about.name} is served")
    if request.expect_identity is not None and request.expect_identity != about.identity:
        raise RequestError(409, "other_identity", f"the served model is {about.identity}, another than was expected")
    service.check_variants(request.variants)
    if request.explain and any(latent >= service.heads.num_latents for latent in request.explain.features):
        raise RequestError(422, "bad_request", f"explain.features must be below {service.heads.num_latents}")
    rule = request.on_truncated
    started = time.monotonic()
    found = await service.answers(
        [partial(_encoded, item) for item in request.items],
        scale=request.scale,
        on_truncated=rule.penalise if isinstance(rule, Penalty) else rule,
        refuse_long=request.on_too_long == "refuse",
        partial=request.partial,
        timeout=request.timeout_s,
        origin=Origin(request.run, request.split, request.step, tuple(request.variants)),
        ids=[item.id for item in request.items],
    )
    reads = [answer.read for own in found for answer in own if answer.read is not None]
    return {
        "model": about.as_json(),
        "scale": request.scale,
        "items": [
            {"id": item.id, "answers": [_answer(service, request, answer) for answer in own]}
            for item, own in zip(request.items, found, strict=True)
        ],
        "usage": {
            "tokens": sum(len(answer.encoded.ids) for own in found for answer in own if answer.encoded is not None),
            "computed_tokens": sum(read.computed_tokens for read in reads),
        },
        "timing": {
            "queue_ms": 1000 * max((read.queue_seconds for read in reads), default=0.0),
            "compute_ms": 1000 * max((read.compute_seconds for read in reads), default=0.0),
            "total_ms": 1000 * (time.monotonic() - started),
        },
    }


def _encoded(item: Item, encoder: Encoder) -> list[Encoded]:
    truncated = [one == "length" for one in item.finish] if item.finish else None
    if item.prompt is not None and item.completions is not None:
        return encoder.completions(item.prompt, item.completions, truncated)
    if item.messages is not None:
        return [encoder.messages(item.messages, is_truncated=bool(truncated and truncated[0]))]
    if item.text is not None:
        found = encoder.text(item.text, item.prompt_text)
        return [found if truncated is None else found._replace(is_truncated=truncated[0])]
    assert item.input_ids is not None
    return [encoder.ids(item.input_ids)]


def _answer(service: Service, request: RewardsRequest, answer: Answer) -> dict[str, Any]:
    if answer.error is not None or answer.encoded is None:
        error = answer.error
        assert error is not None
        return {"reward": None, "error": {"code": error.code, "message": error.told}}
    values = {name: service.value(answer, name, request.scale) for name in request.variants}
    encoded = answer.encoded
    shown: dict[str, Any] = {
        "reward": values[request.variants[0]],
        "variants": values,
        "tokens": len(encoded.ids),
        "cut": encoded.is_cut,
        "truncated": encoded.is_truncated,
        "flags": list(encoded.flags),
    }
    if answer.penalty is not None:
        return {**shown, "flags": [*encoded.flags, "penalised"]}
    if request.explain is not None and answer.read is not None:
        found = service.heads.explanation(
            request.variants[0], answer.read.reading, request.explain.top, request.explain.features
        )
        shown["explanation"] = {**found, "features": named(found["features"], service.names)}
    return shown
