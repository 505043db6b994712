"""What an SAE learns from and is measured on, by the recipe: phases in their order, and the rows of the closing figures.

`papers`     sentence ends of texts, then the rewarded tokens of training pairs; standardised.
`turn_ends`  one phase: turn ends of training responses and of texts, mixed in fixed shares, each kind moved to the mean of the true ends,
             the direction of the reward stretched if asked for.

N rows, D d_in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sarm.contracts.tables import KINDS, TRUE_END
from sarm.data.store.activations import ActivationStore
from sarm.data.store.looked_groups import Workers
from sarm.data.store.mixed_rows import MixedRows, Stream
from sarm.data.store.shuffled_rows import ShuffledRows, memory_for_rows
from sarm.evaluate.reward_fidelity import chat_probe
from sarm.nn.sae import standardise
from sarm.settings.checks import UserError
from sarm.settings.sae import SaeSettings
from sarm.stages.plan import MORE_RESPONSES, RESPONSES
from sarm.training.recentred_rows import Recentred, kind_means, moved_store, recentred
from sarm.training.reward_aware import RewardMap, random_direction, reward_map
from sarm.training.sae import Phase

_SAMPLE_ROWS = 16 * 1024
_TRUE_END = KINDS.index(TRUE_END)

Read = Callable[[ActivationStore], ShuffledRows]
Parts = Callable[[slice], Iterator[Float[Tensor, "rows d_in"]]]


@dataclass(frozen=True)
class MeasuredRows:
    """Rows that a finished SAE is measured on, as it reads them: `all` for what fires (of the row groups in a slice), `heldout` for FVU."""

    all: Parts
    heldout: Float[Tensor, "rows d_in"]


@dataclass(frozen=True)
class SaeRows:
    """The rows of a training."""

    phases: list[Phase]
    samples: list[Float[Tensor, "rows d_in"]]
    """Of each phase, as the SAE reads them, for initialising."""
    measured: Mapping[str, MeasuredRows]
    """`text` and `chat`, as far as they are there."""
    rejected: Mapping[str, Mapping[str, list[int]]]
    """Ids of rows left out, by activations and reason."""
    reward_map: RewardMap | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What `cfg.json` says of the recipe."""
    figures: dict[str, float] = field(default_factory=dict)


def rows_of(
    sae: SaeSettings, activations: Mapping[str, Path], seed: int, device: torch.device, num_sharing: int = 1
) -> SaeRows:
    """Read and check the activations of a recipe; `num_sharing` processes fill the device's memory with them.

    Raises UserError if there are fewer rows than a batch, or the reward's direction is asked for and there are too few pairs.
    """
    stores = {name: ActivationStore(path) for name, path in activations.items()}

    def read(store: ActivationStore) -> ShuffledRows:
        return _training_rows(store, sae, device, num_sharing)

    return _papers(sae, stores, seed, read) if sae.recipe == "papers" else _turn_ends(sae, stores, seed, read, device)


def _papers(sae: SaeSettings, stores: Mapping[str, ActivationStore], seed: int, read: Read) -> SaeRows:
    rows = {name: read(store) for name, store in stores.items()}
    schedules = {"text": (sae.text_epochs, sae.lr), "chat": (sae.chat_epochs, sae.chat_lr)}
    return SaeRows(
        phases=[
            Phase(name, own, own.heldout, *schedule)
            for (name, own), schedule in zip(rows.items(), map(schedules.__getitem__, rows), strict=True)
        ],
        samples=[standardise(own.sample(seed, _SAMPLE_ROWS)) for own in rows.values()],
        measured={
            name: MeasuredRows(_standardised(stores[name]), standardise(own.heldout)) for name, own in rows.items()
        },
        rejected={name: own.rejected for name, own in rows.items() if own.rejected},
        about={"phases": list(stores)},
    )


def _turn_ends(
    sae: SaeSettings, stores: Mapping[str, ActivationStore], seed: int, read: Read, device: torch.device
) -> SaeRows:
    of_responses, of_texts = sae.shares
    wanted = {RESPONSES: of_responses, MORE_RESPONSES: of_responses, "text": of_texts}
    rows = {name: read(stores[name]) for name, share in wanted.items() if share and name in stores}
    shares = _shares(sae, {name: own.num_rows for name, own in rows.items()})
    # Answers in pairs and others are of one kind: what tells their means apart is theirs to keep.
    sources: dict[bool, list[ShuffledRows]] = {}
    for name, own in rows.items():
        sources.setdefault(name == "text", []).append(own)
    means = {is_text: _agreed(kind_means(own), device) for is_text, own in sources.items()}
    centre_D = next(iter(means.values()))[_TRUE_END]
    streams = {name: recentred(own, means[name == "text"], centre_D) for name, own in rows.items()}
    stretch = _reward_map(sae, next(iter(streams.values())), stores["chat"], seed, device)
    prepare = _unchanged if stretch is None else stretch
    mixture = MixedRows([Stream(streams[name], share) for name, share in shares.items()], sae.steps * sae.batch_size, sae.batch_size)  # fmt: skip
    heldout = torch.cat([stream.heldout() for stream in streams.values()])
    first = next(iter(mixture.windows(seed, 0)))
    sample = first[torch.arange(min(_SAMPLE_ROWS, len(first)))].cpu()
    answers = streams.get(RESPONSES)
    unseen = standardise(read(stores["chat"]).heldout) if answers is None else answers.heldout_true_ends()
    measured = {"chat": MeasuredRows(_standardised(stores["chat"]), unseen)}
    if "text" in streams:
        text = streams["text"]
        measured["text"] = MeasuredRows(lambda share: moved_store(stores["text"], text.shift, share), text.heldout())
    passes = dict(zip(shares, mixture.passes(), strict=True))
    return SaeRows(
        phases=[Phase("turn_ends", mixture, heldout, epochs=1, lr=sae.lr, prepare=prepare)],
        samples=[prepare(sample)],
        measured=measured,
        rejected={name: own.rejected for name, own in rows.items() if own.rejected},
        reward_map=stretch,
        about={
            "phases": ["turn_ends"],
            "recipe": "turn_ends",
            "shares": list(sae.shares),
            "reward_share": sae.reward_share,
            "reward_direction": sae.reward_direction if sae.reward_share else None,
        },
        figures={"passes_text" if name == "text" else "passes_responses": number for name, number in passes.items()},
    )


def _shares(sae: SaeSettings, num_rows: Mapping[str, int]) -> dict[str, float]:
    """The share of each stream; responses in pairs and others share theirs by their rows, so that each row is seen as often."""
    of_responses, of_texts = sae.shares
    total = sum(number for name, number in num_rows.items() if name != "text")
    return {name: of_texts if name == "text" else of_responses * number / total for name, number in num_rows.items()}


def _reward_map(
    sae: SaeSettings, answers: Recentred, chat: ActivationStore, seed: int, device: torch.device
) -> RewardMap | None:
    if not sae.reward_share:
        return None
    if sae.reward_direction == "random":
        direction_D = random_direction(chat.d_in, seed)
    else:
        probe = chat_probe(chat, sae.heldout_share, seed)
        if probe is None:
            raise UserError(
                f"--sae.reward-share reads the direction of the reward from training pairs, and {chat.folder} has pairs of fewer than 3 prompts. Pass more --data.pairs, or --sae.reward-share 0."
            )
        direction_D = probe.weight
    found = reward_map(answers.true_ends(_SAMPLE_ROWS).cpu(), direction_D, sae.reward_share)
    stretch = float(_agreed(torch.tensor([found.stretch], dtype=torch.float64), device))
    return RewardMap(_agreed(found.centre, device), _agreed(found.direction, device), stretch)


def _training_rows(store: ActivationStore, sae: SaeSettings, device: torch.device, num_sharing: int) -> ShuffledRows:
    rows = ShuffledRows(
        store,
        sae.heldout_share,
        memory_bytes=memory_for_rows(device, num_sharing),
        device=device,
        workers=workers_together(),
    )
    if rows.num_rows < sae.batch_size:
        raise UserError(
            f"{store.folder} has {rows.num_rows} rows to train on ({rows.num_rejected} are constant, NaN or infinite), fewer than a batch of {sae.batch_size}. Add sources, or pass a smaller --sae.batch-size."
        )
    return rows


def workers_together() -> Workers:
    """All that train together."""
    if not dist.is_initialized():
        return Workers()

    def everyone(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return Workers(dist.get_rank(), dist.get_world_size(), everyone)


def _standardised(store: ActivationStore) -> Parts:
    return lambda share: map(standardise, store.usable_vectors(share))


def _unchanged(x_ND: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
    return x_ND


def _agreed(values: Tensor, device: torch.device) -> Tensor:
    """What worker 0 found: sums on other machines may round in another way."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    shared = values.to(device)
    dist.broadcast(shared, 0)
    return shared.to(values.device)
