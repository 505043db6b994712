"""Which path speaks which protocol: its body, its errors, and the status by which its clients come again.

429 ends runs: verl repeats 5xx and nothing else, and OpenRLHF and slime do not read `Retry-After`. So there, overload is 503.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sarm.serve.card_route import card
from sarm.serve.faults import ErrorForm, openai_error, own_error, tei_error
from sarm.serve.own_route import rewards
from sarm.serve.pooling_routes import classify, embeddings, pooling, predict
from sarm.serve.rlhf_routes import llama_factory, openrlhf, slime
from sarm.serve.schemas import (  # fmt: skip
    CardRequest,
    LlamaFactoryRequest,
    OpenRlhfRequest,
    PoolingRequest,
    RewardsRequest,
    SlimeRequest,
    TeiRequest,
)


@dataclass(frozen=True)
class Route:
    """A path that scores."""

    path: str
    schema: type[BaseModel]
    answer: Callable[..., Awaitable[Any]]
    """(service, body, query) to what is sent."""
    error: ErrorForm
    overload: int
    """Status when the queue is too long."""
    invalid: int
    """Status of a body of another shape."""


ROUTES = (
    Route("/v1/rewards", RewardsRequest, rewards, own_error, overload=429, invalid=422),
    Route("/v1/card", CardRequest, card, own_error, overload=429, invalid=422),
    Route("/get_reward", OpenRlhfRequest, openrlhf, own_error, overload=503, invalid=422),
    Route("/slime", SlimeRequest, slime, own_error, overload=503, invalid=422),
    Route("/v1/score/evaluation", LlamaFactoryRequest, llama_factory, own_error, overload=503, invalid=422),
    Route("/classify", PoolingRequest, classify, openai_error, overload=503, invalid=400),
    Route("/pooling", PoolingRequest, pooling, openai_error, overload=503, invalid=400),
    Route("/v1/embeddings", PoolingRequest, embeddings, openai_error, overload=503, invalid=400),
    Route("/predict", TeiRequest, predict, tei_error, overload=429, invalid=422),
)
