"""One reader of reward models: rows of tokens in; the reward, active latents and residual at every wanted token out.

Answers to one prompt share a row, in which the prompt is read once (`Reader.row_tokens`); rows of like length share a forward pass.
A active latents, D d_in.
"""

import copy
import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from sarm.contracts.passes import Beat, Cost
from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.sarm_folder import read_sarm
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.packing import Row, TokenBatch, collate, row_batches
from sarm.nn.backbone import residual_stream
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.sae import Codes, standardise
from sarm.nn.splice import Editing
from sarm.passes.feature_edits import checked_edit
from sarm.passes.models import hash_of_folder, sarm_settings
from sarm.passes.usage import device_of_worker
from sarm.settings.model import ModelSettings


class Reading(NamedTuple):
    """What a reward model says at one token. A head without latents leaves `latents` and `values` empty."""

    reward: float
    latents: Int64[NDArray[np.int64], " active"]
    """[A], those whose value is not 0, in the order that the SAE gives them."""
    values: Float32[NDArray[np.float32], " active"]
    """[A]"""
    residual: Float[Tensor, " d_in"] | None = None
    """The residual stream that the head reads, in float32 on the CPU, where it was asked for."""
    unexplained: float | None = None
    """Share of the squared standardised activation that the dictionary leaves out, for readers that look."""


@dataclass(frozen=True)
class Reader:
    """A reward model on this process's GPU, else on its cores. What it loads is loaded when it is first needed, and is not pickled."""

    folder: Path
    settings: ModelSettings
    """How messages become tokens: the length and the system prompt."""
    dtype: str = "float32"
    batch_tokens: int = 2048
    """Tokens of one forward pass, padding included."""
    tokenizer: Path | None = None
    """Folder of the tokenizer and its template; None: the model's own."""
    looks_unexplained: bool = False
    """Whether readings say what share of the activation the dictionary leaves out."""
    edit: Path | None = None
    """Folder of an edit of features inside the model."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer and template."""
        chat = load_chat_tokenizer(self.settings, self.tokenizer or self.folder)
        # Texts are cut by their readers; the tokenizer would warn of each long one.
        chat.tokenizer.model_max_length = 1 << 30
        return chat

    @cached_property
    def model(self) -> SarmForSequenceClassification:
        """The reward model, in evaluation mode; its latents have one meaning each (`read_sarm`)."""
        model: SarmForSequenceClassification = read_sarm(self.folder, getattr(torch, self.dtype)).to(device_of_worker())  # type: ignore[arg-type]
        if self.edit is not None:
            Editing(model.model, load_edit(self.edit).splices)
        return model

    @property
    def row_tokens(self) -> int:
        """How long a row may be in which answers share their prompt (`answer_rows`): two make a forward pass."""
        return max(self.settings.max_length, self.batch_tokens // 2)

    @torch.no_grad()
    def with_head(self, weight_S: Float[NDArray[np.floating], " d_sae"]) -> "Reader":
        """The same reader under a head of other weights. Blocks, dictionary and tokenizer are shared and not copied."""
        own = self.model
        config: Any = copy.deepcopy(own.config)
        model = SarmForSequenceClassification(config, own.model, own.sae, own.feature_edits)
        model.score.weight.data = torch.as_tensor(weight_S, dtype=torch.float32, device=own.device)[None].clone()
        other = Reader(*(getattr(self, field.name) for field in fields(self)))
        # Where `cached_property` keeps what it has made.
        vars(other).update(model=model.eval(), chat=self.chat)
        return other

    def with_edit(self, edit: Path) -> "Reader":
        """The same reader with features edited inside the model. Weights and tokenizer are shared and not copied."""
        own = self.model
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*own.parameters(), *own.buffers())}
        model = copy.deepcopy(own, shared)
        Editing(model.model, load_edit(edit).splices)
        other = replace(self, edit=edit)
        vars(other).update(model=model, chat=self.chat)
        return other

    def ready(self, threads: int) -> "Reader":
        """The reader with everything loaded, in a worker of so many threads."""
        torch.set_num_threads(threads)
        assert self.model is not None
        assert self.chat is not None
        return self

    def read(
        self, rows: Iterable[Row], cost: Cost | None = None, beat: Beat | None = None, *, residuals: bool = False
    ) -> dict[Hashable, Reading]:
        """The reading of every key of the rows; what it took is added to `cost`, and `beat` is called after each forward pass."""
        readings: dict[Hashable, Reading] = {}
        for members in row_batches((row for row in rows if row.taken), self.batch_tokens):
            batch = collate(members, self.chat.pad_id)
            started = time.perf_counter()
            readings.update(zip(batch.keys, self._forward(batch, residuals=residuals), strict=True))
            if cost is not None:
                cost.tokens += sum(len(row.ids) for row in members)
                cost.padded_tokens += batch.input_ids.numel()
                cost.forward_seconds += time.perf_counter() - started
            if beat is not None:
                beat()
        return readings

    @torch.inference_mode()
    def _forward(self, batch: TokenBatch, *, residuals: bool) -> list[Reading]:
        inputs = batch.model_inputs(self.model.device)
        # As `forward` does with rows that say where their rewarded tokens are, but the residuals stay at hand.
        hidden_BLD = residual_stream(
            self.model.model, inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
        )
        h_ND = hidden_BLD[inputs["rewarded_rows"], inputs["rewarded_columns"]]
        output = self.model._read(h_ND, reconstruct=False, recon_detached=False)
        assert output.logits is not None
        rewards = output.logits.squeeze(-1).tolist()
        kept: list[Any] = list(h_ND.float().cpu()) if residuals else [None] * len(rewards)
        if output.latent_values is None or output.latent_indices is None:
            none = np.zeros(0, np.int64), np.zeros(0, np.float32)
            return [Reading(reward, *none, h_D) for reward, h_D in zip(rewards, kept, strict=True)]
        missing: list[float | None] = [None] * len(rewards)
        if self.looks_unexplained:
            x_ND = standardise(h_ND) if self.model.config.standardise else h_ND.float()
            error_ND = x_ND - self.model.sae(Codes(output.latent_values, output.latent_indices))
            missing = (error_ND.square().sum(-1) / x_ND.square().sum(-1).clamp_min(1e-12)).tolist()
        latents, values = output.latent_indices.cpu().numpy(), output.latent_values.cpu().numpy()
        return [
            Reading(reward, latent[value != 0], value[value != 0], h_D, share)
            for reward, latent, value, h_D, share in zip(rewards, latents, values, kept, missing, strict=True)
        ]


def sarm_reader(folder: Path, batch_tokens: int = 2048, dtype: str = "float32", edit: Path | None = None) -> Reader:
    """The reader of a SARM with its own tokenizer, and the length and system prompt that it was trained with.

    Raises UserError if the folder holds no reward model with latents, its tokenizer cannot be loaded, or the edit is of another model.
    """
    settings = sarm_settings(folder)
    if edit is not None:
        checked_edit(edit, folder, hash_of_folder(folder), takes_places=False)
    reader = Reader(folder=folder, settings=settings, dtype=dtype, batch_tokens=batch_tokens, edit=edit)
    assert reader.chat is not None
    return reader
