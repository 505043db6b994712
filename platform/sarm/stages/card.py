"""`jobs/reward_card.py`: a SARM, one conversation, and names for its features -> a card."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from sarm.contracts.untrusted import read_json
from sarm.data.sources.conversations import ConversationError, Message, check_messages
from sarm.data.tokens.packing import Row
from sarm.interpret.context_store import load_contexts
from sarm.interpret.feature_data import feature_names
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.models import hash_of_folder
from sarm.passes.reader import Reader, sarm_reader
from sarm.report.reward_card import Prefixes, card, print_card, write_card
from sarm.settings.card import RewardCard
from sarm.settings.checks import UserError
from sarm.settings.results_root import absolute_out


def make_card(settings: RewardCard) -> dict[str, Any]:
    """Print the card, write its page, and return its content.

    Raises UserError for a folder that holds no SARM, names of another model, or a conversation without an answer.
    """
    folder = settings.model.expanduser().absolute()
    reader = sarm_reader(folder)
    messages = _conversation(settings)
    contexts = _beside(folder, settings.contexts, "contexts")
    store = load_contexts(contexts, hash_of_folder(folder)) if contexts else None
    prefixes = read_prefixes(reader, messages)
    active = np.flatnonzero((prefixes.contribution != 0).any(0)).tolist()
    names = feature_names(store, active, _beside(folder, settings.explanations, "explanations"))
    weight_S, config = reader.model.score.weight.detach().squeeze(0).cpu().numpy(), reader.model.config
    content = card(prefixes, weight_S, names, settings.features, (config.reward_mean, config.reward_std))
    spelled = reader.chat.spelled_in(message["content"] for message in messages)
    content |= {
        "protocol_version": PROTOCOL_VERSION,
        "contents_with_control_tokens": spelled.control_tokens,
        "contents_already_templated": spelled.templated,
    }
    if spelled.control_tokens:
        print(f"{spelled.control_tokens} contents spell control tokens, which are scored as text")
    if spelled.templated:
        print(f"{spelled.templated} contents spell the turns of a chat template: they may have been templated before")
    print_card(content)
    out = absolute_out(settings.out)
    write_card(content, messages[-2]["content"] if len(messages) > 1 else "", str(settings.model), out)
    print(f"\ncard  {out}")
    return content


def read_prefixes(reader: Reader, messages: list[Message]) -> Prefixes:
    """The reward's terms after every token of the answer, in one forward pass.

    The answer is segment 0; after each of its tokens, and before the first, stands an end of turn in a segment of its own, which sees
    what precedes it and is seen by nothing. So each end is what it would be had the answer stopped there.

    Raises UserError if the answer has no token of its own.
    """
    response = messages[-1]["content"]
    (tokens,) = reader.chat.encode_responses(messages[:-1], [response], offsets=True)
    own = [column for column, (start, end) in enumerate(tokens.offsets) if start < end]
    if not own:
        raise UserError(
            "the answer has no token of its own, so there is nothing to show. Pass a --response with text in it."
        )
    tail = tokens.ids[own[-1] + 1 :]
    ids, segments, positions = list(tokens.ids[: own[0]]), [0] * own[0], list(range(own[0]))
    taken: list[tuple[Hashable, int]] = []
    for branch, column in enumerate([own[0] - 1, *range(own[0], own[-1] + 1)], start=1):
        if branch > 1:
            ids, segments, positions = [*ids, tokens.ids[column]], [*segments, 0], [*positions, column]
        if branch == 1 or column in own:
            ids += tail
            segments += [branch] * len(tail)
            positions += range(column + 1, column + 1 + len(tail))
            taken.append((branch, len(ids) - 1))
    readings = reader.read([Row(ids, segments, positions, taken)])
    weight_S = reader.model.score.weight.detach().squeeze(0).cpu().double().numpy()
    contribution = np.zeros((len(readings), len(weight_S)))
    for row_S, reading in zip(contribution, readings.values(), strict=True):
        row_S[reading.latents] = reading.values * weight_S[reading.latents]
    return Prefixes(response, [tokens.offsets[column][1] for column in own], contribution)


def _conversation(settings: RewardCard) -> list[Message]:
    if settings.conversation is None:
        return [{"role": "user", "content": settings.prompt}, {"role": "assistant", "content": settings.response}]
    path = settings.conversation
    try:
        messages = read_json(path, max_bytes=1 << 20)
        if messages:
            check_messages(messages)
        found = [{"role": m["role"], "content": m["content"]} for m in messages]
    except ConversationError as error:
        raise UserError(f"{path} is no conversation ({error.reason}): {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no conversation ({type(error).__name__}: {error}). Write a list of {{role, content}}.") from error  # fmt: skip
    if not found or found[-1]["role"] != "assistant":
        raise UserError(f"{path} ends with {found[-1]['role'] if found else 'nothing'}, expected the assistant's turn, which is what is rewarded.")  # fmt: skip
    return found


def _beside(model: Path, given: Path | None, name: str) -> Path | None:
    """The folder that was named, else one beside the model if it is finished."""
    if given is not None:
        return given.expanduser().absolute()
    known = model.parent / name
    return known if (known / "manifest.json").exists() else None
