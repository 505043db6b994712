"""FLOPs, bytes of memory and bytes on disk of the stages, from the sizes of the sources and the model's dimensions.

FLOPs are those of matrix products. B weights of the blocks that are kept, T tokens, N rows, D d_in, S d_sae: a forward pass 2 B T,
reward training 6 B T an epoch (8 with gradient checkpointing), an SAE at most 6 N D S an epoch (2 of it for the encoder, which matching pursuit runs K times), and 6 N D A more with A latents of AuxK:
that is what cores take, and `scaling` has what GPUs do.
Attention scores come on top and are left out: 2 % at 1,000 tokens. A trained weight takes 16 bytes: itself, its gradient, two moments.
"""

from typing import NamedTuple

from sarm.data.formats.model_shapes import Shape
from sarm.data.sources.built_in import TOKENS_A_SENTENCE
from sarm.settings.budget import Size, pass_gb, training_gb
from sarm.settings.extraction import TURN_END
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.sae import SaeSettings
from sarm.stages.dry_run.source_sizes import Pairs, Texts

_GB = 1e9
_KEY_BYTES = 60
_WORDS_A_TOKEN = 0.75


class Extracted(NamedTuple):
    """Rows and FLOPs of an extraction, and its bytes on disk."""

    rows: dict[str, float]
    layers: int
    flops: float
    disk_bytes: float


def text_rows(texts: Texts, unit: str, word_share: float | None = None) -> float:
    """Rows that a unit takes of the texts."""
    words = (word_share or 0.0) * _WORDS_A_TOKEN * texts.tokens
    # An end for each text, behind its last sentence, and one for each that comes before.
    of_turns = max(texts.rows, texts.sentences) + words
    return {"token": texts.tokens, "chat": texts.rows, TURN_END: of_turns}.get(unit, texts.sentences)


def response_rows(pairs: Pairs, word_share: float | None = None) -> float:
    """Rows of `turn_end` that the training responses give at most: as many where each is in one pair."""
    tokens = pairs.train * pairs.tokens_a_pair
    words = (word_share or 0.0) * _WORDS_A_TOKEN * tokens
    return max(2 * pairs.train, tokens / TOKENS_A_SENTENCE) + words


def extracted(
    shape: Shape,
    texts: Texts | None,
    pairs: Pairs | None,
    units: tuple[str, ...],
    layers: set[int],
    word_share: float | None = None,
) -> Extracted:
    """All units of the texts, both chat ends of each pair, and the ends of their responses, at all layers of one forward pass."""
    rows: dict[str, float] = {}
    flops_a_token = 2.0 * shape.weights_a_block * max(layers)
    flops = 0.0
    if texts is not None:
        rows |= {unit: text_rows(texts, unit, word_share) for unit in units}
        # Sentences alone are another pass than documents, conversations a third, and texts as answers a fourth, with a token an end.
        passes = len({unit if unit in ("sentence", "chat", TURN_END) else "whole" for unit in units})
        flops += flops_a_token * (texts.tokens * passes + rows.get(TURN_END, 0.0))
    if pairs is not None:
        both = pairs.train + pairs.heldout
        rows["chat end"] = 2 * both
        flops += flops_a_token * both * pairs.tokens_a_pair
        if TURN_END in units:
            rows["turn_end of responses"] = response_rows(pairs, word_share)
            flops += flops_a_token * rows["turn_end of responses"]
    disk = sum(rows.values()) * len(layers) * (2 * shape.d_in + _KEY_BYTES)
    return Extracted(rows, len(layers), flops, disk)


def size_of(shape: Shape, depth: int, d_sae: int = 0) -> Size:
    """The first blocks of a model and its embedding, beside an SAE of so many latents."""
    return Size(shape.backbone(depth), shape.d_in, shape.d_ff, depth, beside=2 * shape.d_in * d_sae)


def forward_gb(shape: Shape, depth: int, dtype: str, batch_tokens: int) -> float:
    """Weights of the blocks and the embedding, and what one batch holds inside a block."""
    return pass_gb(size_of(shape, depth), dtype, batch_tokens)


def sae_rows(sae: SaeSettings, text_rows: float, chat_rows: float) -> float:
    """Rows that an SAE learns from, each as often as it does."""
    if sae.recipe == "turn_ends":
        return float(sae.steps * sae.batch_size)
    return sae.text_epochs * text_rows + sae.chat_epochs * chat_rows


def sae_flops(d_in: int, sae: SaeSettings, rows: float) -> float:
    """Of learning from so many rows."""
    return 6.0 * rows * d_in * (sae.d_sae + sae.aux_k) + 2.0 * rows * d_in * (sae.encoder_passes - 1) * sae.d_sae


def reward_depths(model: ModelSettings, reward: RewardSettings, shape: Shape) -> list[int]:
    """Blocks of each reward model that the settings train: the SARM and its baselines."""
    return [model.layer, *(shape.num_blocks if name == "scalar_full" else model.layer for name in reward.baselines)]


def reward_flops(shape: Shape, depth: int, reward: RewardSettings, tokens: float) -> float:
    """Of all epochs over the training pairs."""
    trains_blocks = reward.train_backbone and reward.lr > 0
    # Frozen blocks have no backward pass; adapters need the gradients of activations and not those of weights.
    passes = 2 if not trains_blocks else 4 if reward.lora_rank else 6
    passes += 2 if reward.gradient_checkpointing and trains_blocks else 0
    return float(passes) * shape.weights_a_block * depth * tokens * reward.epochs


def reward_gb(shape: Shape, depth: int, reward: RewardSettings, workers: int) -> float:
    """Weights, gradients, AdamW's moments and activations of one worker."""
    return training_gb(
        size_of(shape, depth),
        reward.precision,
        reward.batch_tokens,
        workers,
        reward.zero_stage,
        checkpointing=reward.gradient_checkpointing,
        trains=trains_weights(reward),
    )


def trains_weights(reward: RewardSettings) -> bool:
    """Whether the blocks' own weights are trained, and not adapters of them or nothing."""
    return reward.train_backbone and reward.lr > 0 and not reward.lora_rank
