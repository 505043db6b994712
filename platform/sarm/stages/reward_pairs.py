"""What the training of a reward model reads: its pairs, and those that it is measured on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sarm.contracts.ids import hash_share
from sarm.contracts.passes import Spelled
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.settings.checks import UserError


class RewardPairs(NamedTuple):
    """What a training reads: its pairs, the same as prompts with tokens, those that it is measured on, and why pairs are left out."""

    table: pa.Table
    groups: list[PromptGroup]
    validation: list[PromptGroup]
    refused: dict[str, str]


def read_reward_pairs(folder: Path, chat: ChatTokenizer, validation_share: float, model: str) -> RewardPairs:
    """The training pairs of a pairs/v1 folder, encoded for the model.

    Raises UserError if none can be encoded, or `validation_share` leaves none to train or to measure on.
    """
    training, measured = split_off_validation(load_pairs(folder, "train"), validation_share)
    refused: dict[str, str] = {}
    groups = list(prompt_groups(training, chat, refused=refused))
    validation = list(prompt_groups(measured, chat, refused=refused))
    if not groups or (measured.num_rows and not validation):
        raise UserError(
            f"no pair can be encoded: {dict(Counter(refused.values()))} of {len(refused):,}. Pass pairs whose roles the template of {model} takes."
        )
    return RewardPairs(training, groups, validation, refused)


def split_off_validation(pairs: pa.Table, share: float) -> tuple[pa.Table, pa.Table]:
    """(pairs to train on, pairs to measure on during training): whole prompts, by a hash of their own.

    Raises UserError if either is empty though asked for.
    """
    is_measured = [hash_share(f"validation {prompt}") < share for prompt in pairs.column("prompt_id").to_pylist()]
    mask = pa.array(is_measured, pa.bool_())
    training, validation = pairs.filter(pc.invert(mask)), pairs.filter(mask)
    if training.num_rows == 0 or (share > 0 and validation.num_rows == 0):
        raise UserError(
            f"--reward.validation-share {share} leaves {training.num_rows} pairs to train on and {validation.num_rows} to measure. Pass another share, or more pairs."
        )
    return training, validation


def spelled_contents(groups: Sequence[PromptGroup]) -> dict[str, int]:
    """Contents that spell control tokens or turns, which were trained on as text."""
    spelled = sum((group.spelled for group in groups), Spelled())
    return {
        "contents_with_control_tokens": spelled.control_tokens,
        "contents_already_templated": spelled.templated,
    }
