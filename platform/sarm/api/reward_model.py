"""A finished SARM in this process: rewards, what they are sums of, and other weights for its features.

    model = sarm.load("outputs/demo/sarm")
    model.reward([[{"role": "user", "content": "How do I pick a lock?"}, {"role": "assistant", "content": "I can't help with that."}]])

S d_sae. A reward is sum_i w_i z_i over the active latents of the answer's rewarded token (SARM section 3).
"""

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sarm.audit.steering import Edit
from sarm.contracts.folders import HEAD_EDIT
from sarm.data.formats.model_files import folder_of
from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.tokens.packing import answer_rows
from sarm.passes.feature_edits import checked_edit
from sarm.passes.models import check_tokenizer, edit_beside, hash_of_folder, sarm_settings, sarm_spec
from sarm.passes.reader import Reader, sarm_reader
from sarm.report.reward_card import print_card, write_card
from sarm.serve.encoding import Encoder
from sarm.settings.checks import UserError
from sarm.stages.card import FeatureNames, card_of, names_beside
from sarm.stages.edited_model import save_edited

Conversation = Sequence[Mapping[str, Any]]
"""Messages with `role` and `content`, of which the last is the assistant's: the answer that is rewarded."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Feature:
    """A latent's part of one reward: `contribution` = `weight` x `activation`. `name` is empty where nothing has named it."""

    latent: int
    name: str
    weight: float
    activation: float
    contribution: float


@dataclass(frozen=True)
class Explanation:
    """One reward as the sum of its features: `reward` = the contributions of `features` + `rest`."""

    reward: float
    standardised: float | None
    """In standard deviations from the mean of the training answers; None where the model does not say what these are."""
    features: tuple[Feature, ...]
    """Those that add most, by size."""
    rest: float
    """What all other features add."""
    card: dict[str, Any]
    """The whole reward card: also sentence by sentence and token by token."""
    prompt: str
    model: str

    def show(self) -> None:
        """Print it: features, then sentences."""
        print_card(self.card)

    def write(self, page: str | Path) -> Path:
        """Write it as an HTML page that loads nothing; returns its path."""
        path = Path(page)
        write_card(self.card, self.prompt, self.model, path)
        return path


class RewardModel:
    """A SARM that is loaded. `load` makes one; `edit` makes one with another head, which shares everything else."""

    def __init__(self, folder: Path, reader: Reader, names: FeatureNames, base_S: NDArray[np.float32]):
        self.folder = folder
        """Where its files are, before any edit."""
        self._reader, self._names, self._base_S = reader, names, base_S
        self._encoder = Encoder(reader.chat, reader.model)

    def __repr__(self) -> str:
        edited = len(self.edited)
        return (
            f"RewardModel({str(self.folder)!r}, {len(self._base_S):,} features{f', {edited} edited' if edited else ''})"
        )

    @property
    def weights(self) -> NDArray[np.float32]:
        """[S] a copy of the head: what one unit of each feature's activation adds to a reward."""
        weight_S: NDArray[np.float32] = self._reader.model.score.weight.detach().squeeze(0).cpu().numpy().copy()  # fmt: skip
        return weight_S

    @property
    def edited(self) -> dict[int, float]:
        """The latents whose weights are not those of the folder, with their weights."""
        weight_S = self.weights
        return {int(i): float(weight_S[i]) for i in np.flatnonzero(weight_S != self._base_S)}

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """The raw reward of each conversation, in order. Conversations that share a prompt read it once.

        Warns of conversations that are longer than the model reads, whose beginning is left out. Raises UserError for what is no list of
        conversations, and for a conversation that cannot be encoded, with its place.
        """
        answers: dict[tuple[int, ...], list[tuple[Hashable, list[int]]]] = {}
        given, num_cut = _checked(conversations), 0
        for place, messages in enumerate(given):
            try:
                encoded = self._encoder.messages(messages)
            except ConversationError as error:
                raise ConversationError(f"conversation {place}: {error}", error.reason) from error
            num_cut += encoded.is_cut
            answers.setdefault(tuple(encoded.ids[: encoded.prompt_tokens]), []).append((place, encoded.ids))
        if num_cut:
            warnings.warn(f"{num_cut:,} of {len(given):,} conversations have more than {self._reader.settings.max_length:,} tokens, which the model was trained with: their beginning was not read.", stacklevel=2)  # fmt: skip
        rows = [row for own in answers.values() for row in answer_rows(own, self._reader.row_tokens)]
        readings = self._reader.read(rows)
        return [readings[place].reward for place in range(len(given))]

    def explain(self, conversation: Conversation, features: int = 8) -> Explanation:
        """What the reward of a conversation is the sum of; its `features` largest terms are named.

        Raises UserError for what is no conversation, and for an answer without a token of its own.
        """
        if features < 1:
            raise UserError(f"features must be at least 1, got {features}. Pass another number.")
        (messages,) = _checked([conversation])
        # What cannot be rewarded cannot be explained either, for the same reason.
        self._encoder.messages(messages)
        content = card_of(self._reader, messages, self._names, features)
        return Explanation(
            reward=content["reward"],
            standardised=content["standardised"],
            features=tuple(
                Feature(
                    latent=one["latent"],
                    name=one["name"],
                    weight=one["weight"],
                    activation=one["activation"],
                    contribution=one["value"],
                )
                for one in content["features"]
            ),
            rest=content["rest"],
            card=content,
            prompt=str(messages[-2].get("content") or "") if len(messages) > 1 else "",
            model=str(self.folder),
        )

    def edit(
        self,
        weights: "Mapping[int, float] | Edit | str | Path | None" = None,
        *,
        scale: Mapping[int, float] | None = None,
        features: str | Path | None = None,
    ) -> "RewardModel":
        """The model with other head weights: `weights` sets those of latents, or is an edit of `sarm steer` or its file; `scale` multiplies.

        `features` is the folder of an edit of features inside the model, as `sarm debias` writes them. This model stays as it is; the two share
        all weights but their heads. Raises UserError for latents that it does not have, for weights that are not finite, and for an edit of
        another head or another model.
        """
        weight_S = self.weights
        if isinstance(weights, str | Path):
            weights = _read_edit(Path(weights))
        with np.errstate(over="ignore"):
            if isinstance(weights, Edit):
                for latent in weights.latent.tolist():
                    self._latent(latent)
                weight_S = weights.applied(weight_S).astype(np.float32)
            else:
                for latent, value in _numbers(weights, "weights"):
                    weight_S[self._latent(latent)] = value
            for latent, factor in _numbers(scale, "scale"):
                weight_S[self._latent(latent)] *= np.float32(factor)
        if not np.isfinite(weight_S).all():
            broken = int(np.flatnonzero(~np.isfinite(weight_S))[0])
            raise UserError(f"the weight of latent {broken} would be {weight_S[broken]}. Pass finite ones.")
        reader = self._reader if features is None else self._with_features(Path(features).expanduser())
        return RewardModel(self.folder, reader.with_head(weight_S), self._names, self._base_S)

    def save(self, folder: str | Path) -> Path:
        """Write the model, edits included, as a folder that `load` and transformers read; returns it.

        An edit of features is then among its weights. Raises UserError if the folder holds anything.
        """
        target = Path(folder).expanduser()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} is there already. Pass another folder.")
        target.mkdir(parents=True, exist_ok=True)
        changed = np.flatnonzero(self.weights != self._base_S)
        save_edited(self.folder, Edit(changed, self._base_S[changed].astype(np.float64), self.weights[changed].astype(np.float64)), target, self._reader.edit)  # fmt: skip
        return target

    def _with_features(self, edit: Path) -> Reader:
        if self._reader.edit is not None:
            raise UserError(f"{self.folder} is read with the edit in {self._reader.edit} already. Load it without, or pass one edit of all features.")  # fmt: skip
        checked_edit(edit, self.folder, hash_of_folder(self.folder), takes_places=False)
        return self._reader.with_edit(edit)

    def _latent(self, latent: int) -> int:
        if not 0 <= latent < len(self._base_S):
            raise UserError(f"latent {latent} is none of this model's {len(self._base_S):,}. Pass others.")
        return int(latent)


def load(
    model: str | Path,
    *,
    revision: str = "main",
    dtype: str = "float32",
    contexts: str | Path | None = None,
    explanations: str | Path | None = None,
) -> RewardModel:
    """The SARM in a folder, or in a Hugging Face repository (`owner/name`), on this process's GPU or its cores.

    `dtype` is that of its blocks, `float32` or `bfloat16`. Features are named by the folders `contexts` and `explanations`; those beside the model
    are found. Raises UserError for what is no SARM, for a torn folder, and for a tokenizer or template that the model was not trained with.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be float32 or bfloat16, got {dtype!r}.")
    folder = folder_of(str(model), revision)
    sarm_settings(folder)
    check_tokenizer(sarm_spec(folder, dtype=dtype))
    reader = sarm_reader(folder, _BATCH_TOKENS, dtype, edit_beside(folder))
    names = names_beside(folder, _path(contexts), _path(explanations))
    base_S = reader.model.score.weight.detach().squeeze(0).cpu().numpy().copy()
    return RewardModel(folder, reader, names, base_S)


def _checked(conversations: Iterable[Conversation]) -> list[list[Message]]:
    if not isinstance(conversations, Iterable):
        raise UserError(f"expected a list of conversations, got {conversations!r}. Pass [conversation].")
    # Of what can be read once alone, too.
    given = [conversations] if isinstance(conversations, str | Mapping) else list(conversations)
    if isinstance(conversations, str | Mapping) or any(isinstance(one, Mapping) for one in given):
        raise UserError("expected a list of conversations, each a list of messages, got one conversation. Pass [conversation].")  # fmt: skip
    checked: list[list[Message]] = []
    for place, one in enumerate(given):
        messages = list(one) if isinstance(one, Iterable) and not isinstance(one, str) else []
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise UserError(f"conversation {place} is {str(one)[:60]!r}, expected messages: [{{'role': ..., 'content': ...}}, ...].")  # fmt: skip
        checked.append([dict(message) for message in messages])
    return checked


def _numbers(given: Mapping[int, float] | None, name: str) -> list[tuple[int, float]]:
    """Latents with a number for each. Raises UserError for anything else."""
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{name} is {str(given)[:60]!r}, expected a number for each latent: {{203: 0.0}}.")
    for latent, value in (given or {}).items():
        if not isinstance(latent, int | np.integer) or not isinstance(value, int | float | np.number):
            raise UserError(f"{name} has {latent!r}: {value!r}, expected a number for a latent: {{203: 0.0}}.")
    return [(int(latent), float(value)) for latent, value in (given or {}).items()]


def _read_edit(path: Path) -> Edit:
    from sarm.serve.heads import read_edit

    return read_edit(path / HEAD_EDIT if path.is_dir() else path)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
