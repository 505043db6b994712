"""Prompts with all their distinct responses: what shares a forward pass, and what a split or an interval must keep together."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from sarm.data.chat import ChatTokenizer, Spelled, Tokens
from sarm.data.conversations import ConversationError, Message
from sarm.data.packing import Row, answer_rows, padded_tokens


class PairOfGroup(NamedTuple):
    """A preference pair by the places of its responses in its group."""

    pair_id: str
    chosen: int
    rejected: int
    margin: float | None
    subset: str | None


class PromptGroup(NamedTuple):
    """One prompt, its distinct responses with their tokens, and the pairs among them."""

    prompt_id: str
    responses: list[str]
    tokens: list[Tokens]
    pairs: list[PairOfGroup]
    spelled: Spelled = Spelled()
    """Contents, of the prompt and of the responses, that spell control tokens or turns."""

    def rows(self, row_tokens: int, columns: Mapping[Hashable, Sequence[int]] | None = None) -> list[Row]:
        """The responses packed into rows, keyed (prompt_id, place of the response); `columns` as `answer_rows` takes them."""
        return answer_rows([((self.prompt_id, i), t.ids) for i, t in enumerate(self.tokens)], row_tokens, columns)


def prompt_groups(
    pairs: pa.Table, chat: ChatTokenizer, *, offsets: bool = False, refused: dict[str, str] | None = None
) -> Iterator[PromptGroup]:
    """The groups of a pairs/v1 table, in order of first appearance; each distinct response is tokenised once.

    With `offsets`, the tokens say which characters of the response they cover. Pairs that cannot be encoded are left out, and their ids put
    into `refused` with the reason word; without it, the first of them raises ConversationError.
    """
    members: dict[str, list[dict]] = {}
    for pair in pairs.select(["pair_id", "prompt_id", "prompt", "chosen", "rejected", "margin", "subset"]).to_pylist():
        members.setdefault(pair["prompt_id"], []).append(pair)
    for prompt_id, prompt_pairs in members.items():
        prompt = prompt_pairs[0]["prompt"]
        responses = list(dict.fromkeys(pair[side] for pair in prompt_pairs for side in ("chosen", "rejected")))
        try:
            tokens = chat.encode_responses(prompt, responses, offsets=offsets)
        except ConversationError:
            if refused is None:
                raise
            usable, reasons = _one_by_one(chat, prompt, responses, offsets=offsets)
            for pair in prompt_pairs:
                if reason := reasons.get(pair["chosen"]) or reasons.get(pair["rejected"]):
                    refused[pair["pair_id"]] = reason
            prompt_pairs = [pair for pair in prompt_pairs if pair["pair_id"] not in refused]
            if not prompt_pairs:
                continue
            needed = {pair[side] for pair in prompt_pairs for side in ("chosen", "rejected")}
            responses = [text for text in responses if text in needed]
            tokens = [usable[text] for text in responses]
        places = {text: place for place, text in enumerate(responses)}
        yield PromptGroup(
            prompt_id=prompt_id,
            responses=responses,
            tokens=tokens,
            pairs=[
                PairOfGroup(p["pair_id"], places[p["chosen"]], places[p["rejected"]], p["margin"], p["subset"])
                for p in prompt_pairs
            ],
            spelled=chat.spelled_in([*(message["content"] for message in prompt), *responses]),
        )


def _one_by_one(
    chat: ChatTokenizer, prompt: Sequence[Message], responses: Sequence[str], *, offsets: bool
) -> tuple[dict[str, Tokens], dict[str, str]]:
    """The responses that can be encoded with their tokens, and the others with the reason word."""
    usable: dict[str, Tokens] = {}
    reasons: dict[str, str] = {}
    for text in responses:
        try:
            (usable[text],) = chat.encode_responses(prompt, [text], offsets=offsets)
        except ConversationError as error:
            reasons[text] = error.reason
    return usable, reasons


def split_group(group: PromptGroup, row_tokens: int, batch_tokens: int) -> list[PromptGroup]:
    """The group, or parts of it small enough for one forward and backward pass.

    A pair's loss needs both rewards in one pass, so pairs are dealt to parts in order and a response may be in two parts.
    """
    if _cost(group, row_tokens) <= batch_tokens:
        return [group]
    parts: list[list[PairOfGroup]] = []
    for pair in sorted(group.pairs, key=lambda pair: (pair.chosen, pair.rejected)):
        if parts and _cost(_restrict(group, [*parts[-1], pair]), row_tokens) <= batch_tokens:
            parts[-1].append(pair)
        else:
            parts.append([pair])
    return [_restrict(group, part) for part in parts]


def _cost(group: PromptGroup, row_tokens: int) -> int:
    return padded_tokens(group.rows(row_tokens))


def _restrict(group: PromptGroup, pairs: Sequence[PairOfGroup]) -> PromptGroup:
    kept = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
    new_place = {old: new for new, old in enumerate(kept)}
    return PromptGroup(
        prompt_id=group.prompt_id,
        responses=[group.responses[i] for i in kept],
        tokens=[group.tokens[i] for i in kept],
        pairs=[p._replace(chosen=new_place[p.chosen], rejected=new_place[p.rejected]) for p in pairs],
    )
