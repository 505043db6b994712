"""Reward models behind one call: requests (a prompt and its completions) in, scores out.

exact      contents encoded as text, one BOS, left truncation that keeps the final token, float32 head; a SARM reads a shared prompt once
official   the template's text tokenised again with special tokens (often two BOS, the first masked), truncated on the
           tokenizer's own side, as the benchmarks' code does: a right truncation cuts off the token that carries the reward
"""

import math
import time
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from sarm.contracts.passes import Cost
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.sources.conversations import ConversationError, check_messages
from sarm.data.tokens.chat import ChatTokenizer, Tokens
from sarm.data.tokens.control_tokens import ControlTokens
from sarm.data.tokens.packing import Row, TokenBatch, answer_row, answer_rows, token_batches
from sarm.data.tokens.spelling import NotEncodableError
from sarm.passes.models import ModelSpec, load_function, sarm_tokenizer
from sarm.passes.reader import Reader, Reading
from sarm.passes.usage import device_of_worker
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

Message = dict[str, str]


class Request(NamedTuple):
    """One prompt with completions to score; `alone` forbids sharing a forward pass."""

    prompt: list[Message]
    completions: list[str]
    alone: bool


class Scored(NamedTuple):
    """A completion's score, its tokens (None where the model has none) and whether tokens were cut off.

    The score is NaN where the conversation cannot be encoded, and `reason` says why.
    """

    score: float
    num_tokens: int | None
    truncated: bool
    reason: str | None = None


@runtime_checkable
class Scorer(Protocol):
    """Scores of every completion of every request, and what the forward passes took."""

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]: ...


class _Sequence(NamedTuple):
    ids: list[int]
    masked: int
    truncated: bool
    reason: str | None = None


class SarmScorer:
    """A reward model of this project under the exact protocol: completions of one prompt read it once."""

    def __init__(self, spec: ModelSpec, batch_tokens: int):
        folder = Path(spec.place)
        settings = ModelSettings(name=spec.place, max_length=spec.max_length, system_prompt=spec.system_prompt)
        self._reader = Reader(folder, settings, spec.dtype, batch_tokens).ready(torch.get_num_threads())

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


class TorchScorer:
    """A `transformers` sequence classifier with one label, or a SARM under the official protocol: each completion has a row of its own.

    Raises UserError if the model has another number of outputs.
    """

    def __init__(self, spec: ModelSpec, batch_tokens: int):
        self._spec, self._batch_tokens, self._device = spec, batch_tokens, device_of_worker()
        dtype = getattr(torch, spec.dtype)
        self._chat: ChatTokenizer | None = None
        if spec.kind == "sarm":
            chat = sarm_tokenizer(spec)
            self._chat, self._tokenizer = chat, chat.tokenizer
            self._model: Any = load_sarm(Path(spec.place), dtype).to(self._device)  # type: ignore[arg-type]
        else:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(spec.place, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                spec.place, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
            self._model = model.to(self._device).eval()
            _float32_head(self._model, dtype)

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]:
        sequences = [[self._encode(request.prompt, text) for text in request.completions] for request in requests]
        found: dict[Hashable, float] = {}
        cost = Cost()
        for batch in self._batches(requests, sequences):
            started = time.perf_counter()
            with torch.inference_mode():
                logits = self._model(**self._inputs(batch, sequences)).logits
            found.update(zip(batch.keys, logits.float().reshape(-1).cpu().tolist(), strict=True))
            cost.tokens += int((batch.segment_ids >= 0).sum())
            cost.padded_tokens += batch.input_ids.numel()
            cost.forward_seconds += time.perf_counter() - started
        scored = [
            [
                Scored(found.get((r, i), math.nan), len(one.ids) - one.masked, one.truncated, one.reason)
                for i, one in enumerate(own)
            ]
            for r, own in enumerate(sequences)
        ]
        return scored, cost

    def _batches(self, requests: Sequence[Request], sequences: list[list[_Sequence]]) -> list[TokenBatch]:
        together: list[Row] = []
        alone: list[Row] = []
        for r, (request, encoded) in enumerate(zip(requests, sequences, strict=True)):
            rows = [answer_row((r, i), one.ids) for i, one in enumerate(encoded) if one.reason is None]
            (alone if request.alone else together).extend(rows)
        batches = token_batches(together, self._batch_tokens, self._pad_id(together), join=False)
        return batches + [batch for row in alone for batch in token_batches([row], 1, self._pad_id([row]), join=False)]

    def _inputs(self, batch: TokenBatch, sequences: list[list[_Sequence]]) -> dict[str, torch.Tensor]:
        mask = (batch.segment_ids >= 0).long()
        for line, key in enumerate(batch.keys):
            assert isinstance(key, tuple)
            mask[line, : sequences[key[0]][key[1]].masked] = 0
        return {"input_ids": batch.input_ids.to(self._device), "attention_mask": mask.to(self._device)}

    def _pad_id(self, rows: Sequence[Row]) -> int:
        """A classifier that knows no padding looks for it by id: then one that ends no sequence."""
        if self._chat is not None:
            return self._chat.pad_id
        config = self._model.config
        known = self._tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        if known is None or config.pad_token_id is None:
            last = {row.ids[-1] for row in rows}
            known = known if known is not None and known not in last else next(i for i in range(len(last) + 1) if i not in last)  # fmt: skip
            self._model.config.pad_token_id = known
        return int(known)

    def _encode(self, prompt: list[Message], completion: str) -> _Sequence:
        try:
            return (self._official if self._spec.protocol == "official" else self._exact)(prompt, completion)
        except ConversationError as error:
            return _Sequence([], 0, False, error.reason)

    @cached_property
    def _control(self) -> ControlTokens:
        """Of use to `exact` alone: `official` encodes by any tokenizer, as the benchmarks' code does."""
        try:
            return ControlTokens(self._tokenizer)
        except NotEncodableError as error:
            raise UserError(f"{error} Pass --protocol official, or another model.") from error

    def _exact(self, prompt: list[Message], completion: str) -> _Sequence:
        conversation = [*prompt, {"role": "assistant", "content": completion}]
        check_messages(conversation)
        try:
            rendered = self._control.render(conversation, self._apply, self._tokenizer.chat_template)
            ids, bos = self._control.encode([rendered])[0].ids, self._tokenizer.bos_token_id
        except NotEncodableError as error:
            raise ConversationError(str(error), "not_encodable") from error
        adds_bos = bos is not None and self._tokenizer("a").input_ids[0] == bos
        ids = ids[next((i for i, token in enumerate(ids) if token != bos), 0) :] if adds_bos else ids
        room = self._spec.max_length - adds_bos
        return _Sequence([*([bos] if adds_bos else []), *ids[-room:]], 0, len(ids) > room)

    def _official(self, prompt: list[Message], completion: str) -> _Sequence:
        ids, bos = self._tokenizer(self._render(prompt, completion)).input_ids, self._tokenizer.bos_token_id
        limit, excess = self._spec.max_length, len(ids) - self._spec.max_length
        if excess > 0:
            ids = ids[excess:] if self._tokenizer.truncation_side == "left" else ids[:limit]
        doubled = bos is not None and len(ids) > 1 and ids[0] == bos == ids[1]
        return _Sequence(ids, int(doubled), excess > 0)

    def _render(self, prompt: list[Message], completion: str) -> str:
        conversation = [*prompt, {"role": "assistant", "content": completion}]
        if self._chat is not None:
            return self._chat.render(conversation)
        check_messages(conversation)
        return self._apply(conversation)

    def _apply(self, turns: Sequence[Message]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(list(turns), tokenize=False)
            return text
        except Exception as error:  # a template raises whatever its author chose
            raise ConversationError(f"the chat template refuses {[turn['role'] for turn in turns]}: {error}") from error


class CallableScorer:
    """Any function of conversations: `score(list[list[message]]) -> numbers`, one a conversation."""

    def __init__(self, spec: ModelSpec):
        self._function = load_function(spec.place)
        self._place = spec.place

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]:
        scored: list[list[Scored]] = []
        for request in requests:
            conversations = [[*request.prompt, {"role": "assistant", "content": c}] for c in request.completions]
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


def _float32_head(model: Any, dtype: torch.dtype) -> None:
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if dtype != torch.float32 and isinstance(head, torch.nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
