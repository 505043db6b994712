"""Prompts with all their distinct responses: what shares a forward pass, and what a split or an interval must keep together."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from sarm.data.chat import ChatTokenizer, Tokens
from sarm.data.packing import Row, answer_rows, padded_tokens
from sarm.schema import prompt_key


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

    def rows(self, row_tokens: int, columns: Mapping[Hashable, Sequence[int]] | None = None) -> list[Row]:
        """The responses packed into rows, keyed (prompt_id, place of the response); `columns` as `answer_rows` takes them."""
        return answer_rows([((self.prompt_id, i), t.ids) for i, t in enumerate(self.tokens)], row_tokens, columns)


def prompt_groups(pairs: pa.Table, chat: ChatTokenizer, *, offsets: bool = False) -> Iterator[PromptGroup]:
    """The groups of a pairs/v1 table, in order of first appearance; each distinct response is tokenised once.

    With `offsets`, the tokens say which characters of the response they cover.
    """
    members: dict[str, list[dict]] = {}
    for pair in pairs.select(["pair_id", "prompt_id", "prompt", "chosen", "rejected", "margin", "subset"]).to_pylist():
        members.setdefault(pair["prompt_id"], []).append(pair)
    for prompt_id, prompt_pairs in members.items():
        spellings: dict[str, list[dict]] = {}
        for pair in prompt_pairs:
            spellings.setdefault(prompt_key(pair["prompt"]), []).append(pair)
        responses: list[str] = []
        tokens: list[Tokens] = []
        of_pair: dict[str, PairOfGroup] = {}
        for spelt in spellings.values():
            places: dict[str, int] = {}
            for pair in spelt:
                for side in ("chosen", "rejected"):
                    places.setdefault(pair[side], len(responses) + len(places))
            tokens += chat.encode_responses(spelt[0]["prompt"], list(places), offsets=offsets)
            responses += places
            for p in spelt:
                of_pair[p["pair_id"]] = PairOfGroup(p["pair_id"], places[p["chosen"]], places[p["rejected"]], p["margin"], p["subset"])  # fmt: skip
        yield PromptGroup(prompt_id, responses, tokens, [of_pair[pair["pair_id"]] for pair in prompt_pairs])


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
