"""What actors compute for the unit `turn_end`: the rewarded token behind answers, behind their sentences and, if asked for, some words.

A branch in the answer's own forward pass each (`sarm.nn.backbone`), so that the tokens of the answer are computed once.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa

from sarm.contracts.ids import response_id_of, stable_int
from sarm.contracts.passes import Beat, Cost, Spelled, Tables
from sarm.contracts.tables import TRUE_END
from sarm.data.sources.conversations import ConversationError, Message, answer_text
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import Row, answer_rows
from sarm.data.tokens.turn_ends import AnswerEnds, Turn
from sarm.passes.activations import Backbone, ChatActivations, Keys, pair_records, pair_rejects
from sarm.settings.extraction import TURN_END

# In `side`, where pairs have chosen and rejected: a response may be both.
RESPONSE = "response"


class _Answer(NamedTuple):
    """One answer with the ends that are taken of it; `keys` are the key columns that they share."""

    key: Hashable
    tokens: Tokens
    branches: dict[int, str]
    """Kind of the end behind a column."""
    keys: Keys
    first: int = 0
    """Tokens of the document before the answer's."""
    spelled: Spelled = Spelled()

    def records(self, num_closing: int) -> list[tuple[Hashable, Keys]]:
        """(key of the wanted token, key columns) of each branch and of the answer's own end."""
        ends: list[tuple[Hashable, int, str]] = [
            ((self.key, column), column + num_closing, kind) for column, kind in self.branches.items()
        ]
        ends.append((self.key, len(self.tokens.ids) - 1, TRUE_END))
        common = {**self.keys, "token_id": self.tokens.ids[-1], "truncated": self.tokens.num_truncated > 0}
        return [
            (key, {**common, "position": self.first + place, "num_tokens": place + 1, "kind": kind})
            for key, place, kind in ends
        ]


class _Documents(NamedTuple):
    answers: list[_Answer]
    refused: dict[int, str]
    """Documents that give nothing, with the reason."""


class _Responses(NamedTuple):
    groups: list[PromptGroup]
    refused: dict[str, str]
    """Pairs that give nothing, with the reason."""
    answers: list[list[_Answer]]
    """Of each group, in the order of its responses."""
    lost: dict[int, str]
    """Responses that give nothing, with the reason."""


class _TakesEnds(Backbone):
    @cached_property
    def _ends(self) -> AnswerEnds:
        return AnswerEnds(self._chat, self._extraction.sentence_ends, self._extraction.word_share)


class TextTurnEnds(_TakesEnds):
    """A table of corpus/v1 in; its documents as answers, of conversations the last one, a row for each end."""

    def prepare(self, table: pa.Table) -> _Documents:
        """The answers that the documents become."""
        row_ids, texts = table.column("row_id").to_pylist(), table.column("text").to_pylist()
        has_messages = "messages" in table.column_names
        conversations = table.column("messages").to_pylist() if has_messages else [None] * len(texts)
        # Of responses in no pair, it says which prompt's they are: prompts are held out, not responses.
        has_prompts = "prompt_id" in table.column_names
        prompts = table.column("prompt_id").to_pylist() if has_prompts else [None] * len(texts)
        answers: list[_Answer] = []
        refused: dict[int, str] = {}
        for row_id, text, messages, prompt_id in zip(row_ids, texts, conversations, prompts, strict=True):
            try:
                answers += self._answers(row_id, self._turns(row_id, text, messages), prompt_id)
            except ConversationError as error:
                refused[row_id] = error.reason
        return _Documents(answers, refused)

    def compute(self, prepared: _Documents, beat: Beat) -> tuple[Tables, Cost]:
        """The tables of all targets, texts in their order."""
        answers, refused = prepared
        closing, cost = self._chat.closing_ids, Cost()
        cost.note(answer.spelled for answer in answers)
        rows: list[Row] = []
        for answer in answers:
            columns = {answer.key: list(answer.branches)}
            rows += answer_rows([(answer.key, answer.tokens.ids)], self._max_length, columns, closing)
        read = self._read(rows, cost, beat)
        records = [record for answer in answers for record in answer.records(len(closing))]
        left_out = [_lost(*one) for one in refused.items()]
        return {target: self._of_records(target, records, read, left_out) for target in self._schemas}, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of texts that cannot be computed."""
        rows = [_lost(row_id, reason) for row_id in table.column("row_id").to_pylist()]
        return {target: self._blank(target, rows) for target in self._schemas}

    def _turns(self, row_id: int, text: str, messages: list[Message] | None) -> list[Turn]:
        answer = answer_text(messages[-1]) if messages and messages[-1]["role"] == "assistant" else None
        if messages and answer is not None:
            return [Turn(messages[:-1], answer)]
        return self._ends.turns(text, _name(row_id))

    def _answers(self, row_id: int, turns: Sequence[Turn], prompt_id: str | None = None) -> list[_Answer]:
        found: list[_Answer] = []
        own = {"doc_id": prompt_id or _name(row_id), "side": RESPONSE if prompt_id else "text"}
        first = 0
        for number, turn in enumerate(turns):
            (tokens,) = self._chat.encode_responses(turn.prompt, [turn.answer], offsets=True)
            first += tokens.num_truncated
            found.append(
                _Answer(
                    key=(row_id, number),
                    tokens=tokens,
                    branches=self._ends.branches(turn.answer, tokens, f"{_name(row_id)}:{number}"),
                    keys={"row_id": row_id, **own},
                    first=first,
                    spelled=self._chat.spelled_in([*(message["content"] for message in turn.prompt), turn.answer]),
                )
            )
            first += len(tokens.ids)
        return found


class PairTurnEnds(_TakesEnds, ChatActivations):
    """A table of pairs/v1 in; for targets of `turn_end` a row for each end of each distinct response, for others what `ChatActivations` gives."""

    def prepare(self, table: pa.Table) -> _Responses:  # type: ignore[override]
        """The prompts with their responses and the ends of these."""
        refused: dict[str, str] = {}
        groups = list(prompt_groups(table, self._chat, offsets=True, refused=refused))
        ids = response_ids(table)
        answers = [self._answers(group, ids) for group in groups]
        found = {answer.keys["row_id"] for own in answers for answer in own}
        lost = {row_id: reason for pair, reason in refused.items() for row_id in ids[pair] if row_id not in found}
        return _Responses(groups, refused, answers, lost)

    def compute(self, prepared: _Responses, beat: Beat) -> tuple[Tables, Cost]:  # type: ignore[override]
        """The tables of all targets, prompt by prompt."""
        groups, refused, answers, lost = prepared
        closing, cost = self._chat.closing_ids, Cost()
        cost.note(group.spelled for group in groups)
        rows: list[Row] = []
        for group, own in zip(groups, answers, strict=True):
            rows += group.rows(self._max_length, {answer.key: list(answer.branches) for answer in own}, closing)
        read = self._read(rows, cost, beat)
        of_pairs = [record for group in groups for record in pair_records(group)]
        of_responses = [record for own in answers for answer in own for record in answer.records(len(closing))]
        left_out = [_lost(*one) for one in lost.items()]
        tables = {
            target: self._of_records(target, of_responses, read, left_out)
            if target.unit == TURN_END
            else self._of_records(target, of_pairs, read, pair_rejects(refused))
            for target in self._schemas
        }
        return tables, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be computed."""
        tables = super().rejected(table, reason)
        rows = [_lost(row_id, reason) for row_id in dict.fromkeys(response_row_ids(table))]
        return {target: self._blank(target, rows) if target.unit == TURN_END else own for target, own in tables.items()}

    def _answers(self, group: PromptGroup, ids: Mapping[str, tuple[int, int]]) -> list[_Answer]:
        row_ids: dict[int, int] = {}
        for pair in group.pairs:
            row_ids[pair.chosen], row_ids[pair.rejected] = ids[pair.pair_id]
        return [
            _Answer(
                key=(group.prompt_id, place),
                tokens=tokens,
                branches=self._ends.branches(response, tokens, _name(row_ids[place])),
                keys={"row_id": row_ids[place], "doc_id": group.prompt_id, "side": RESPONSE},
            )
            for place, (response, tokens) in enumerate(zip(group.responses, group.tokens, strict=True))
        ]


def response_ids(pairs: pa.Table) -> dict[str, tuple[int, int]]:
    """The `row_id` of both responses of each pair, chosen first, by the pair's id."""
    rows = pairs.select(["pair_id", "prompt", "chosen", "rejected"]).to_pylist()
    return {row["pair_id"]: (_response_id(row, "chosen"), _response_id(row, "rejected")) for row in rows}


def response_row_ids(pairs: pa.Table) -> list[int]:
    """The `row_id` of the responses of a pairs/v1 table, as often as they are in pairs."""
    return [row_id for both in response_ids(pairs).values() for row_id in both]


def _response_id(pair: Mapping[str, Any], side: str) -> int:
    return stable_int(response_id_of(pair["prompt"], pair[side]))


def _lost(row_id: int, reason: str) -> Keys:
    return {"row_id": row_id, "reject": reason}


def _name(row_id: int) -> str:
    """What documents are called by, as in the activations of other units."""
    return f"{row_id:016x}"
