"""`jobs/reward_card.py`: a SARM, one conversation, and names for its features -> a card."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarm.contracts.untrusted import read_json
from sarm.data.sources.conversations import ConversationError, Message, check_messages
from sarm.data.sources.tool_turns import more_of
from sarm.data.tokens.beginnings import beginnings_of
from sarm.data.tokens.packing import answer_rows
from sarm.interpret.context_store import load_contexts
from sarm.interpret.feature_data import feature_names
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.attached_model import AttachedReader, model_reader
from sarm.passes.models import edit_beside
from sarm.passes.name_folders import name_folders
from sarm.passes.reader import Reader
from sarm.report.dictionary_note import dictionary_note
from sarm.report.reward_card import Prefixes, card, print_card, write_card
from sarm.settings.card import RewardCard
from sarm.settings.checks import UserError


def make_card(settings: RewardCard) -> dict[str, Any]:
    """Print the card, write its page, and return its content.

    Raises UserError for a folder that holds no SARM, names of another model, or a conversation without an answer.
    """
    folder = settings.model
    reader = model_reader(folder, edit=settings.edit or edit_beside(folder))
    messages = _conversation(settings)
    names = names_beside(folder, settings.contexts, settings.explanations)
    content = card_of(reader, messages, names, settings.features)
    if num := content["contents_with_control_tokens"]:
        print(f"{num} contents spell control tokens, which are scored as text")
    if num := content["contents_already_templated"]:
        print(f"{num} contents spell the turns of a chat template: they may have been templated before")
    print_card(content)
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    write_card(content, messages[-2]["content"] if len(messages) > 1 else "", str(shown), settings.out)
    print(f"\ncard  {settings.out}")
    return content


FeatureNames = Callable[[Sequence[int]], dict[int, str]]
"""What latents are called, of those that are asked for."""


def names_beside(model: Path, contexts: Path | None = None, explanations: Path | None = None) -> FeatureNames:
    """The names of a model's features by its contexts and explanations. Raises UserError as `name_folders`."""
    found = name_folders(model, contexts, explanations)
    store = load_contexts(found.contexts) if found.contexts else None
    return lambda latents: feature_names(store, latents, found.explanations)


def card_of(reader: Reader, messages: list[Message], names: FeatureNames, num_features: int) -> dict[str, Any]:
    """What a card says of a conversation that ends with the answer.

    Raises UserError if the answer has no token of its own, or calls tools, since the card would be of its text alone.
    """
    if more_of(messages[-1]).keys() - {"name"}:
        raise UserError("the answer calls tools, and a card is of an answer's text alone: its reward would be another one. Leave the calls out.")  # fmt: skip
    prefixes = read_prefixes(reader, messages)
    weight_S, config = reader.model.score.weight.detach().squeeze(0).cpu().numpy(), reader.model.config
    content = card(
        prefixes=prefixes,
        weight_S=weight_S,
        names=names(np.flatnonzero((prefixes.contribution != 0).any(0)).tolist()),
        num_features=num_features,
        mean_and_std=(config.reward_mean, config.reward_std),
    )
    spelled = reader.chat.spelled_in(message["content"] for message in messages)
    return content | {
        "protocol_version": PROTOCOL_VERSION,
        "contents_with_control_tokens": spelled.control_tokens,
        "contents_already_templated": spelled.templated,
        "notes": dictionary_note(config.provenance),
    }


def read_prefixes(reader: Reader, messages: list[Message]) -> Prefixes:
    """The reward's terms after every token of the answer, in one forward pass.

    After each of the answer's tokens, and before the first, stands an end of turn as a branch. So each end is what it would be had the answer
    stopped there.

    Raises UserError if the answer has no token of its own.
    """
    response = messages[-1]["content"]
    (tokens,) = reader.chat.encode_responses(messages[:-1], [response], offsets=True)
    beginnings = beginnings_of(tokens)
    if beginnings is None:
        raise UserError(
            "the answer has no token of its own, so there is nothing to show. Pass a --response with text in it."
        )
    columns: dict[Hashable, Sequence[int]] = {"answer": beginnings.columns}
    readings = reader.read(answer_rows([("answer", tokens.ids)], len(tokens.ids), columns, closing=beginnings.closing))
    weight_S = reader.model.score.weight.detach().squeeze(0).cpu().double().numpy()
    contribution = np.zeros((len(readings), len(weight_S)))
    for row_S, reading in zip(contribution, readings.values(), strict=True):
        row_S[reading.latents] = reading.values * weight_S[reading.latents]
    # A classifier's own: they are no sums of terms.
    own_rewards = np.array([one.reward for one in readings.values()]) if isinstance(reader, AttachedReader) else None
    return Prefixes(response, list(beginnings.ends), contribution, own_rewards)


def _conversation(settings: RewardCard) -> list[Message]:
    if settings.conversation is None:
        return [{"role": "user", "content": settings.prompt}, {"role": "assistant", "content": settings.response}]
    path = settings.conversation
    try:
        messages = read_json(path, max_bytes=1 << 20)
        if messages:
            check_messages(messages)
        found = [{"role": m["role"], "content": m["content"] or "", **more_of(m)} for m in messages]
    except ConversationError as error:
        raise UserError(f"{path} is no conversation ({error.reason}): {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no conversation ({type(error).__name__}: {error}). Write a list of {{role, content}}.") from error  # fmt: skip
    if not found or found[-1]["role"] != "assistant":
        raise UserError(f"{path} ends with {found[-1]['role'] if found else 'nothing'}, expected the assistant's turn, which is what is rewarded.")  # fmt: skip
    return found
