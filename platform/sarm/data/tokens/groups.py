"""Prompts with all their distinct responses: what shares a forward pass, and what a split or an interval must keep together."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sarm.contracts.ids import prompt_key_of
from sarm.contracts.passes import Spelled
from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.tokens.chat import ChatTokenizer, Tokens
from sarm.data.tokens.packing import Row, answer_rows, padded_tokens


class PairOfGroup(NamedTuple):
    """A preference pair by the places of its responses in its group."""

    pair_id: str
    chosen: int
    rejected: int
    margin: float | None
    subset: str | None


class PromptGroup(NamedTuple):
    """One prompt, its distinct responses with their tokens, and the pairs among them.

    A prompt is what its id says: its spellings may differ in case or white space, and a response to two spellings stands here twice.
    """

    prompt_id: str
    responses: list[str]
    tokens: list[Tokens]
    pairs: list[PairOfGroup]
    spelled: Spelled = Spelled()
    """Contents, of the prompt and of the responses, that spell control tokens or turns."""

    def rows(
        self,
        row_tokens: int,
        columns: Mapping[Hashable, Sequence[int]] | None = None,
        closing: Sequence[int] = (),
    ) -> list[Row]:
        """The responses packed into rows, keyed (prompt_id, place of the response); the rest as `answer_rows` takes it."""
        answers = [((self.prompt_id, i), t.ids) for i, t in enumerate(self.tokens)]
        return answer_rows(answers, row_tokens, columns, closing)


def prompt_groups(
    pairs: pa.Table, chat: ChatTokenizer, *, offsets: bool = False, refused: dict[str, str] | None = None
) -> Iterator[PromptGroup]:
    """The groups of a pairs/v1 table, in order of first appearance; each distinct response is tokenised once.

    With `offsets`, the tokens say which characters of the response they cover. Pairs that cannot be encoded are left out, and their ids put
    into `refused` with the reason word; without it, the first of them raises ConversationError.
    """
    members: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs.select(["pair_id", "prompt_id", "prompt", "chosen", "rejected", "margin", "subset"]).to_pylist():
        members.setdefault(pair["prompt_id"], []).append(pair)
    for prompt_id, prompt_pairs in members.items():
        spellings: dict[str, list[dict[str, Any]]] = {}
        for pair in prompt_pairs:
            spellings.setdefault(prompt_key_of(pair["prompt"]), []).append(pair)
        responses: list[str] = []
        tokens: list[Tokens] = []
        of_pair: dict[str, PairOfGroup] = {}
        spelled = Spelled()
        for spelt in spellings.values():
            encoded = _encoded(spelt, chat, offsets=offsets, refused=refused)
            usable = [pair for pair in spelt if pair["chosen"] in encoded and pair["rejected"] in encoded]
            if not usable:
                continue
            needed = dict.fromkeys(pair[side] for pair in usable for side in ("chosen", "rejected"))
            places = {text: len(responses) + place for place, text in enumerate(needed)}
            tokens += [encoded[text] for text in needed]
            responses += needed
            spelled += chat.spelled_in([*(message["content"] for message in spelt[0]["prompt"]), *needed])
            for p in usable:
                of_pair[p["pair_id"]] = PairOfGroup(pair_id=p["pair_id"], chosen=places[p["chosen"]], rejected=places[p["rejected"]], margin=p["margin"], subset=p["subset"])  # fmt: skip
        if of_pair:
            in_order = [of_pair[pair["pair_id"]] for pair in prompt_pairs if pair["pair_id"] in of_pair]
            yield PromptGroup(prompt_id=prompt_id, responses=responses, tokens=tokens, pairs=in_order, spelled=spelled)


def _encoded(
    pairs: Sequence[Mapping[str, Any]], chat: ChatTokenizer, *, offsets: bool, refused: dict[str, str] | None
) -> dict[str, Tokens]:
    """The responses of one spelling of a prompt that can be encoded, in order; pairs with another are put into `refused`."""
    prompt = pairs[0]["prompt"]
    responses = list(dict.fromkeys(pair[side] for pair in pairs for side in ("chosen", "rejected")))
    try:
        return dict(zip(responses, chat.encode_responses(prompt, responses, offsets=offsets), strict=True))
    except ConversationError:
        if refused is None:
            raise
    usable, reasons = _one_by_one(chat, prompt, responses, offsets=offsets)
    for pair in pairs:
        if reason := reasons.get(pair["chosen"]) or reasons.get(pair["rejected"]):
            refused[pair["pair_id"]] = reason
    return usable


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
