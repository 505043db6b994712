"""A reward model that reads one completion a row: those that others trained, and a SARM under the official protocol."""

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sarm.contracts.passes import Cost
from sarm.contracts.untrusted import read_json
from sarm.data.formats.feature_edit import FeatureEdit, load_edit
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.sources.conversations import ConversationError, check_messages
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.control_tokens import ControlTokens
from sarm.data.tokens.packing import Row, TokenBatch, answer_row, token_batches
from sarm.data.tokens.said_beside import apply_template, kinds_said, turns_of
from sarm.data.tokens.spelling import NotEncodableError
from sarm.nn.backbone import residuals_at
from sarm.nn.splice import Editing, Positions
from sarm.passes.foreign_models import ForeignModel, layout_of, load_foreign
from sarm.passes.models import ModelSpec, classifier_tokenizer, sarm_tokenizer
from sarm.passes.reward_gradients import stream_gradients
from sarm.passes.reward_heads import HeadLayout, gate_opening
from sarm.passes.scoring import Message, Request, Scored
from sarm.passes.usage import device_of_worker
from sarm.settings.checks import UserError


class Encoded(NamedTuple):
    """A conversation as token ids, of which the first `masked` are hidden; `reason` says why it has none."""

    ids: list[int]
    masked: int
    truncated: bool
    reason: str | None = None
    gate: int = 0
    """Where a gate reads the prompt."""


class TorchScorer:
    """A reward model that others trained, or a SARM under the official protocol: each completion has a row of its own.

    Raises UserError if a weight is missing.
    """

    def __init__(self, spec: ModelSpec, batch_tokens: int):
        self._spec, self._batch_tokens, self._device = spec, batch_tokens, device_of_worker()
        dtype = getattr(torch, spec.dtype)
        self._chat: ChatTokenizer | None = None
        self._layout: HeadLayout | None = None
        self._foreign: ForeignModel | None = None
        self._editing: Editing | None = None
        self._positions: Positions = "all"
        if spec.kind == "sarm":
            chat = sarm_tokenizer(spec)
            self._chat, self._tokenizer = chat, chat.tokenizer
            sarm = load_sarm(Path(spec.place), dtype).to(self._device).requires_grad_(requires_grad=False)  # type: ignore[arg-type]
            self._rewards: Callable[..., torch.Tensor] = lambda **inputs: sarm(**inputs).logits
            self._body: torch.nn.Module = sarm.model
            self._config, self._vocabulary = sarm.config, sarm.model.config.vocab_size
        else:
            folder = Path(spec.place)
            self._tokenizer = classifier_tokenizer(folder, spec.chat_template)
            self._layout = layout_of(folder, dict(read_json(folder / "config.json")), spec.head)
            model = load_foreign(folder, dtype, spec.head, spec.objectives).to(self._device).requires_grad_(requires_grad=False)  # fmt: skip
            self._rewards, self._config, self._vocabulary = model, model.body.config, model.vocabulary
            self._body, self._foreign = model.body, model
        if spec.edit:
            self.edit(load_edit(Path(spec.edit)))

    def edit(self, edit: FeatureEdit | None) -> None:
        """Score with these features edited from now on; None: with the model as it is. Raises ValueError for layers that the model lacks."""
        if self._editing is not None:
            self._editing.remove()
        self._editing = None if edit is None else Editing(self._body, edit.splices)
        self._positions = "all" if edit is None else edit.positions
        if self._foreign is not None:
            self._foreign.editing = self._editing

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]:
        return self.score(requests, self.encode(requests))

    def encode(self, requests: Sequence[Request]) -> list[list[Encoded]]:
        """The tokens of every completion with its prompt, or why it has none."""
        return [[self._encode(request.prompt, text) for text in request.completions] for request in requests]

    def score(self, requests: Sequence[Request], sequences: list[list[Encoded]]) -> tuple[list[list[Scored]], Cost]:
        """Scores of completions that `encode` has made into tokens."""
        found: dict[Hashable, float] = {}
        cost = Cost()
        for batch in self._batches(requests, sequences):
            started = time.perf_counter()
            with torch.inference_mode():
                rewards = self._rewards(**self._inputs(batch, sequences))
            found.update(zip(batch.keys, rewards.float().reshape(-1).cpu().tolist(), strict=True))
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

    def residuals(
        self, requests: Sequence[Request], sequences: list[list[Encoded]], layers: Sequence[int]
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """(request, completion, residual stream after each of `layers` at the answer's tokens [answer's tokens, d_in]), batch by batch.

        Raises UserError for a model whose blocks look to both sides, or stand elsewhere than a language model's.
        """
        self._check_layers()
        for batch in self._batches(requests, sequences):
            mask = self._inputs(batch, sequences)["attention_mask"].cpu()
            chosen = self._answers(batch, sequences, mask)
            rows, columns = chosen.nonzero(as_tuple=True)
            with torch.inference_mode():
                found = residuals_at(
                    model=self._body,  # type: ignore[arg-type]
                    layers=layers,
                    rows=rows.to(self._device),
                    columns=columns.to(self._device),
                    input_ids=batch.input_ids.to(self._device),
                )
            for line, key in enumerate(batch.keys):
                assert isinstance(key, tuple)
                own = (rows == line).to(self._device)
                yield key[0], key[1], [h_ND[own] for h_ND in found]

    def gradients(
        self, requests: Sequence[Request], sequences: list[list[Encoded]], layers: Sequence[int]
    ) -> Iterator[tuple[int, int, list[torch.Tensor], list[torch.Tensor]]]:
        """As `residuals`, and behind them the gradients of the completion's reward by them. Raises UserError as it does."""
        self._check_layers()
        for batch in self._batches(requests, sequences):
            inputs = self._inputs(batch, sequences)
            chosen = self._answers(batch, sequences, inputs["attention_mask"].cpu()).to(self._device)
            _, streams, slopes = stream_gradients(self._body, layers, functools.partial(self._flat_rewards, inputs))
            # A SARM may put rows in another order of its own, where its family keeps a state.
            assert all(h_BLD.shape[:2] == chosen.shape for h_BLD in streams)
            for line, key in enumerate(batch.keys):
                assert isinstance(key, tuple)
                own = chosen[line]
                yield key[0], key[1], [h_BLD[line][own] for h_BLD in streams], [g_BLD[line][own] for g_BLD in slopes]

    def _flat_rewards(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._rewards(**inputs).float().reshape(-1)

    def _check_layers(self) -> None:
        if not isinstance(getattr(self._body, "layers", None), torch.nn.ModuleList):
            raise UserError(f"{self._spec.place} is no causal language model with a head, and features are read in no other. Pass another --model.")  # fmt: skip

    def _batches(self, requests: Sequence[Request], sequences: list[list[Encoded]]) -> list[TokenBatch]:
        together: list[Row] = []
        alone: list[Row] = []
        for r, (request, encoded) in enumerate(zip(requests, sequences, strict=True)):
            rows = [answer_row((r, i), one.ids) for i, one in enumerate(encoded) if one.reason is None]
            (alone if request.alone else together).extend(rows)
        batches = token_batches(together, self._batch_tokens, self._pad_id(together), join=False)
        return batches + [batch for row in alone for batch in token_batches([row], 1, self._pad_id([row]), join=False)]

    def _inputs(self, batch: TokenBatch, sequences: list[list[Encoded]]) -> dict[str, torch.Tensor]:
        mask = (batch.segment_ids >= 0).long()
        for line, key in enumerate(batch.keys):
            assert isinstance(key, tuple)
            mask[line, : sequences[key[0]][key[1]].masked] = 0
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
        if self._layout is not None and self._layout.kind == "gated":
            inputs["gates"] = torch.tensor([sequences[key[0]][key[1]].gate for key in batch.keys if isinstance(key, tuple)])  # fmt: skip
        if self._positions != "all":
            inputs["places"] = self._places(batch, sequences, mask)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _places(self, batch: TokenBatch, sequences: list[list[Encoded]], mask: torch.Tensor) -> torch.Tensor:
        """The tokens [rows, columns] whose features are edited: the last of each row, or its answer's."""
        order = torch.arange(mask.shape[1])
        last = (mask * (order + 1)).argmax(-1)
        if self._positions == "rewarded":
            return order == last[:, None]
        return self._answers(batch, sequences, mask)

    def _answers(self, batch: TokenBatch, sequences: list[list[Encoded]], mask: torch.Tensor) -> torch.Tensor:
        """Which tokens [rows, columns] are the answer's, its end of turn included."""
        order = torch.arange(mask.shape[1])
        last = (mask * (order + 1)).argmax(-1)
        starts = torch.tensor([self._answer(sequences[key[0]][key[1]].ids) for key in batch.keys if isinstance(key, tuple)])  # fmt: skip
        return (order >= starts[:, None]) & (order <= last[:, None])

    def _pad_id(self, rows: Sequence[Row]) -> int:
        """A classifier that knows no padding looks for it by id: then one that ends no sequence. Where the mask decides, any will do."""
        if self._chat is not None:
            return self._chat.pad_id
        if self._layout is not None:
            return 0
        config = self._config
        known = self._tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        if known is None or config.pad_token_id is None:
            last = {row.ids[-1] for row in rows}
            known = known if known is not None and known not in last else next(i for i in range(len(last) + 1) if i not in last)  # fmt: skip
            config.pad_token_id = known
        return int(known)

    def _encode(self, prompt: list[Message], completion: str) -> Encoded:
        try:
            one = (self._official if self._spec.protocol == "official" else self._exact)(prompt, completion)
            return one._replace(gate=self._gate(one.ids))
        except ConversationError as error:
            return Encoded([], 0, False, error.reason)

    def _gate(self, ids: list[int]) -> int:
        """Where the prompt ends, for a head that reads it there. Raises ConversationError for a token without embedding, or where nothing opens an answer."""
        if beyond := [i for i in ids if i >= self._vocabulary]:
            raise ConversationError(f"token {beyond[0]} has no embedding", "not_encodable")
        if self._layout is None or self._layout.kind != "gated":
            return 0
        if (start := self._opened_at(ids)) is None:
            raise ConversationError("the prompt's end was cut off", "prompt_cut_off")
        return start

    def _opened_at(self, ids: list[int]) -> int | None:
        """Where the last opening of an answer begins, None where it was cut off."""
        opening = self._opening
        starts = reversed(range(len(ids) - len(opening) + 1))
        return next((start for start in starts if ids[start : start + len(opening)] == opening), None)

    def _answer(self, ids: list[int]) -> int:
        """The first token of the answer: where its opening was cut off, all that is left is answer."""
        start = self._opened_at(ids)
        return 0 if start is None else start + len(self._opening)

    @cached_property
    def _opening(self) -> list[int]:
        """The end of the user's turn and what opens an answer: the gate of ArmoRM reads the prompt where they begin, at their last place."""
        return gate_opening(self._tokenizer, self._spec.place)

    @cached_property
    def _appended(self) -> list[int]:
        return [self._tokenizer.cls_token_id] if self._layout is not None and self._layout.reads_cls else []

    @cached_property
    def _control(self) -> ControlTokens:
        """Of use to `exact` alone: `official` encodes by any tokenizer, as the benchmarks' code does."""
        try:
            return ControlTokens(self._tokenizer)
        except NotEncodableError as error:
            raise UserError(f"{error} Pass --protocol official, or another model.") from error

    def _exact(self, prompt: list[Message], completion: str) -> Encoded:
        if self._chat is not None:
            # As the SARM's own reader: white space behind its rewarded token takes no room where a conversation is cut.
            (tokens,) = self._chat.encode_responses(prompt, [completion])
            return Encoded(tokens.ids, 0, tokens.num_truncated > 0)
        conversation = self._turns(prompt, completion)
        try:
            rendered = self._control.render(conversation, self._apply, self._tokenizer.chat_template)
            ids, bos = self._control.encode([rendered])[0].ids, self._tokenizer.bos_token_id
        except NotEncodableError as error:
            raise ConversationError(str(error), "not_encodable") from error
        adds_bos = bos is not None and self._tokenizer("a").input_ids[0] == bos
        ids = ids[next((i for i, token in enumerate(ids) if token != bos), 0) :] if adds_bos else ids
        room = self._spec.max_length - adds_bos - len(self._appended)
        return Encoded([*([bos] if adds_bos else []), *ids[-room:], *self._appended], 0, len(ids) > room)

    def _official(self, prompt: list[Message], completion: str) -> Encoded:
        ids = [*self._tokenizer(self._render(prompt, completion)).input_ids, *self._appended]
        bos = self._tokenizer.bos_token_id
        limit, excess = self._spec.max_length, len(ids) - self._spec.max_length
        if excess > 0:
            ids = ids[excess:] if self._tokenizer.truncation_side == "left" else ids[:limit]
        doubled = bos is not None and len(ids) > 1 and ids[0] == bos == ids[1]
        return Encoded(ids, int(doubled), excess > 0)

    def _render(self, prompt: list[Message], completion: str) -> str:
        if self._chat is not None:
            return self._chat.render([*prompt, {"role": "assistant", "content": completion}])
        return self._apply(self._turns(prompt, completion))

    @cached_property
    def _says(self) -> frozenset[str]:
        return kinds_said(self._apply)

    def _turns(self, prompt: list[Message], completion: str) -> list[dict[str, Any]]:
        conversation = [*prompt, {"role": "assistant", "content": completion}]
        check_messages(conversation)
        return turns_of(conversation, lambda: self._says)

    def _apply(self, turns: Sequence[dict[str, Any]]) -> str:
        try:
            return apply_template(self._tokenizer, turns)
        except Exception as error:  # a template raises whatever its author chose
            raise ConversationError(f"the chat template refuses {[turn['role'] for turn in turns]}: {error}") from error
