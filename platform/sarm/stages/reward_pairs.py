"""What the training of a reward model reads: its pairs, and those that it is measured on.

They are tokenised once, into a file beside the training's states that all workers map, and that a training that goes on finds there.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed as dist

from sarm.contracts.ids import hash_share
from sarm.contracts.manifest import MANIFEST, sha256_of
from sarm.contracts.passes import Spelled
from sarm.data.store.checkpoints import Checkpoints
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.stored_groups import StoredGroups, StoredTokens, read_groups, write_groups
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError

_TRAIN, _VALIDATION = "train", "validation"


class RewardPairs(NamedTuple):
    """What a training reads: its prompts with tokens, those that it is measured on, why pairs are left out, and counts for its figures."""

    groups: StoredGroups
    validation: StoredGroups
    refused: dict[str, str]
    counts: dict[str, int]


def read_reward_pairs(
    folder: Path,
    chat: ChatTokenizer,
    validation_share: float,
    *,
    model: str,
    states: Checkpoints,
    may_write: bool = True,
) -> RewardPairs:
    """The training pairs of a pairs/v1 folder, encoded for the model; what is beside `states` already is only read.

    With `may_write`, they are tokenised and written there unless they are there whole. Raises UserError if none can be encoded, or
    `validation_share` leaves none to train or to measure on.
    """
    place = states.folder / "tokens"
    identity = {
        "pairs": _content(folder),
        "validation_share": validation_share,
        "template": chat.template_hash,
        "tokenizer": chat.tokenizer_hash,
        "max_length": chat.max_length,
        "system_prompt": chat.system_prompt,
        "protocol_version": PROTOCOL_VERSION,
    }
    stored = read_groups(place, identity, verify=may_write)
    if stored is None:
        assert may_write, (
            f"{place} is not of this training, or not to be seen: the folder must be one that all workers share."
        )
        stored = _written(place, identity, split_off_validation(load_pairs(folder, "train"), validation_share), chat)
    groups, validation, about = stored.groups[_TRAIN], stored.groups[_VALIDATION], stored.about
    refused: dict[str, str] = about["refused"]
    if not groups or (about["num_measured"] and not validation):
        raise UserError(
            f"no pair can be encoded: {dict(Counter(refused.values()))} of {len(refused):,}. Pass pairs whose roles the template of {model} takes."
        )
    return RewardPairs(groups, validation, refused, about["counts"])


def shared_reward_pairs(
    folder: Path, chat: ChatTokenizer, validation_share: float, *, model: str, states: Checkpoints
) -> RewardPairs:
    """`read_reward_pairs` in every worker: the first looks that what the stage wrote is whole, or writes it, and the others map it."""
    read = functools.partial(read_reward_pairs, folder, chat, validation_share, model=model, states=states)
    found = read(may_write=True) if dist.get_rank() == 0 else None
    dist.barrier()
    return found or read(may_write=False)


def _content(folder: Path) -> list[str]:
    """What tells these pairs from others."""
    manifest = folder / MANIFEST
    return [sha256_of(path) for path in ([manifest] if manifest.exists() else sorted(folder.glob("*.parquet")))]


def _written(
    place: Path, identity: dict[str, Any], tables: tuple[pa.Table, pa.Table], chat: ChatTokenizer
) -> StoredTokens:
    refused: dict[str, str] = {}
    # Contents that spell control tokens or turns are trained on as text.
    counts = {"truncated_responses": 0, "contents_with_control_tokens": 0, "contents_already_templated": 0}

    def counted(groups: Iterable[PromptGroup], *, is_training: bool) -> Iterator[PromptGroup]:
        for group in groups:
            spelled: Spelled = group.spelled
            counts["contents_with_control_tokens"] += spelled.control_tokens
            counts["contents_already_templated"] += spelled.templated
            counts["truncated_responses"] += is_training * sum(tokens.num_truncated > 0 for tokens in group.tokens)
            yield group

    training, measured = tables
    kinds = {
        _TRAIN: counted(prompt_groups(training, chat, refused=refused), is_training=True),
        _VALIDATION: counted(prompt_groups(measured, chat, refused=refused), is_training=False),
    }
    write_groups(place, identity, kinds, {"refused": refused, "counts": counts, "num_measured": measured.num_rows})
    stored = read_groups(place, identity, verify=False)
    assert stored is not None
    return stored


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
