"""Reward models behind one call: requests (a prompt and its completions) in, scores out.

exact      contents encoded as text, one BOS, left truncation that keeps the final token, float32 head; a SARM reads a shared prompt once
official   the template's text tokenised again with special tokens (often two BOS, the first masked), truncated on the
           tokenizer's own side, as the benchmarks' code does: a right truncation cuts off the token that carries the reward
"""

import math
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from sarm.contracts.passes import Cost
from sarm.data.sources.conversations import ConversationError
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.packing import Row, answer_row, answer_rows
from sarm.data.tokens.said_beside import KINDS, turns_of
from sarm.passes.functions import load_function
from sarm.passes.models import ModelSpec
from sarm.passes.reader import Reader, Reading
from sarm.passes.row_scorer import TorchScorer
from sarm.passes.scoring import Message, Request, Scored, Scorer
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings


class SarmScorer:
    """A reward model of this project under the exact protocol: completions of one prompt read it once."""

    def __init__(self, spec: ModelSpec, batch_tokens: int):
        folder = Path(spec.place)
        settings = ModelSettings(name=spec.place, max_length=spec.max_length, system_prompt=spec.system_prompt)
        reader = Reader(
            folder=folder,
            settings=settings,
            dtype=spec.dtype,
            batch_tokens=batch_tokens,
            edit=Path(spec.edit) if spec.edit else None,
        )
        self._reader = reader.ready(torch.get_num_threads())

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]:
        encoded = [self._encode(request) for request in requests]
        rows: list[Row] = []
        cost = Cost()
        readings: dict[Hashable, Reading] = {}
        for r, (request, tokens) in enumerate(zip(requests, encoded, strict=True)):
            answers = [((r, i), one.ids) for i, one in enumerate(tokens) if isinstance(one, Tokens)]
            if request.alone:
                for key, ids in answers:
                    readings |= self._reader.read([answer_row(key, ids)], cost)
            else:
                rows += answer_rows(answers, self._reader.row_tokens)
        readings |= self._reader.read(rows, cost)
        scored = [
            [
                Scored(readings[r, i].reward, len(one.ids), one.num_truncated > 0)
                if isinstance(one, Tokens)
                else Scored(math.nan, 0, False, one)
                for i, one in enumerate(tokens)
            ]
            for r, tokens in enumerate(encoded)
        ]
        return scored, cost

    def _encode(self, request: Request) -> list[Tokens | str]:
        """The tokens of each completion, or why it has none."""
        try:
            return list(self._reader.chat.encode_responses(request.prompt, request.completions))
        except ConversationError:
            return [self._encode_one(request.prompt, text) for text in request.completions]

    def _encode_one(self, prompt: list[Message], completion: str) -> Tokens | str:
        try:
            return self._reader.chat.encode_responses(prompt, [completion])[0]
        except ConversationError as error:
            return error.reason


class CallableScorer:
    """Any function of conversations: `score(list[list[message]]) -> numbers`, one a conversation."""

    def __init__(self, spec: ModelSpec):
        self._function = load_function(spec.place)
        self._place = spec.place

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]:
        scored: list[list[Scored]] = []
        for request in requests:
            prompt = turns_of(request.prompt, lambda: frozenset(KINDS))
            conversations = [[*prompt, {"role": "assistant", "content": c}] for c in request.completions]
            groups = [[one] for one in conversations] if request.alone else [conversations]
            values = [float(value) for group in groups for value in self._function(group)]
            if len(values) != len(conversations):
                raise UserError(
                    f"{self._place} gave {len(values)} scores for {len(conversations)} conversations. Return one a conversation."
                )
            scored.append([Scored(value, None, False) for value in values])
        return scored, Cost()


def load_scorer(spec: ModelSpec, batch_tokens: int) -> Scorer:
    """The scorer of a model."""
    if spec.kind == "callable":
        return CallableScorer(spec)
    return (SarmScorer if (spec.kind, spec.protocol) == ("sarm", "exact") else TorchScorer)(spec, batch_tokens)
