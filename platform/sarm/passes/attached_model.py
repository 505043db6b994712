"""Reward models that others trained, read by a dictionary at one of their layers: the model with its head, the SAE, and a reader of both.

h is `hidden_states[layer]`, z the codes of h at a token. A reward r is no sum over z: blocks and a norm lie between the two. The folder's linear
head w stands in for the terms that a SARM has (`reward_gradients.linear_head`): w_i z_i is what latent i adds to r to first order, on average over responses.

N tokens or answers, B rows, L columns, D d_in, S d_sae.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from sarm.data.formats.attached_folder import Attached, load_attached
from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.reward_classes import is_attached
from sarm.data.tokens.packing import TokenBatch
from sarm.nn.backbone import FAMILIES, attention_of, streams_at
from sarm.nn.sae import Codes
from sarm.nn.segments import visible_from
from sarm.nn.splice import Editing
from sarm.passes.feature_edits import checked_edit
from sarm.passes.foreign_models import load_foreign
from sarm.passes.models import hash_of_folder, sarm_settings
from sarm.passes.reader import Reader, Reading, sarm_reader
from sarm.passes.reward_heads import GatedHead, gate_opening
from sarm.passes.usage import device_of_worker
from sarm.settings.checks import UserError


class AttachedModel(nn.Module):
    """A classifier's body and head, and an SAE of one of its layers; all in evaluation mode, without gradients for weights.

    Raises UserError for a model whose tokens see what follows them, or that lacks the layer or its width.
    """

    def __init__(self, body: Any, head: nn.Module, attached: Attached):
        super().__init__()
        check_fits(body.config, attached.layer, attached.sae.d_in, str(attached.classifier))
        self.body, self.head, self.sae, self.layer = body, head, attached.sae, attached.layer
        self.body.set_attn_implementation(attention_of(body.config))
        self.score = nn.Linear(attached.sae.d_sae, 1, bias=False)
        self.score.weight.data.copy_(attached.weight[None])
        # What readers of a SARM ask its config.
        self.config = SimpleNamespace(provenance=attached.provenance, standardise=attached.sae.standardises, reward_mean=0.0, reward_std=0.0)  # fmt: skip
        self.requires_grad_(requires_grad=False).eval()

    @property
    def reads_gate(self) -> bool:
        """Whether the head has a gate that reads the prompt."""
        return isinstance(self.head, GatedHead)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device


def check_fits(config: Any, layer: int, d_in: int, model: str) -> None:
    """Raise UserError unless the model of a config is of a known family of causal models, has the layer, and is as wide as the SAE takes."""
    if config.model_type not in FAMILIES:
        raise UserError(f"{model} is a {config.model_type} model, of which no layer can be read; known are {', '.join(FAMILIES)}. Pass another --model.")  # fmt: skip
    if not 1 <= layer <= config.num_hidden_layers:
        raise UserError(f"layer {layer} is none of {model}, which has {config.num_hidden_layers} blocks. Pass --layer.")
    if config.hidden_size != d_in:
        raise UserError(f"the SAE takes activations of width {d_in}, {model} has {config.hidden_size}. Pass an SAE of that model.")  # fmt: skip


def load_attached_model(folder: Path, dtype: torch.dtype) -> AttachedModel:
    """The model of a folder, with weights from its classifier's files. Raises UserError as `load_attached`, `load_foreign` and the class do."""
    attached = load_attached(folder)
    return attach(attached, dtype)


def attach(attached: Attached, dtype: torch.dtype) -> AttachedModel:
    """The classifier with its dictionary. Raises UserError as `load_foreign` and `AttachedModel` do."""
    foreign = load_foreign(attached.classifier, dtype, attached.head)
    if foreign.head is None:
        raise UserError(f"{attached.classifier} is no causal language model with a head, so no layer of it can be read. Pass another --model.")  # fmt: skip
    return AttachedModel(foreign.body, foreign.head, attached)


def check_attached(folder: Path) -> Attached:
    """The dictionary of a folder, once its classifier has been found to have the bytes that it was attached to. Raises UserError otherwise."""
    attached = load_attached(folder)
    if not attached.classifier.is_dir():
        raise UserError(f"{folder} reads {attached.classifier}, which is not there. Attach the dictionary again.")
    if hash_of_folder(attached.classifier) != attached.identity:
        raise UserError(f"{attached.classifier} has changed since {folder} was made for it. Attach the dictionary again.")  # fmt: skip
    return attached


class AttachedReader(Reader):
    """A classifier with a dictionary as a reader: its own reward, and the codes and residual of the dictionary's layer at every wanted token."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AttachedReader, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def model(self) -> AttachedModel:  # type: ignore[override]
        """The classifier and the dictionary."""
        model = load_attached_model(self.folder, getattr(torch, self.dtype)).to(device_of_worker())
        if self.edit is not None:
            Editing(model.body, load_edit(self.edit).splices)
        return model

    @cached_property
    def opening(self) -> list[int]:
        """Where a gate reads the prompt, for a head that has one; empty for others."""
        return gate_opening(self.chat.tokenizer, str(self.folder)) if self.model.reads_gate else []

    # Not in inference mode: what is loaded here, patching takes gradients through.
    @torch.no_grad()
    def _forward(self, batch: TokenBatch, *, residuals: bool) -> list[Reading]:
        inputs = batch.model_inputs(self.model.device)
        rows, columns = inputs["rewarded_rows"], inputs["rewarded_columns"]
        gates = self._gates(batch)
        h_ND, last_ND = streams_at(
            model=self.model.body,
            layer=self.model.layer,
            rows=torch.cat([rows, rows[: len(gates)]]),
            columns=torch.cat([columns, torch.tensor([gate or 0 for gate in gates]).to(columns)]),
            input_ids=inputs["input_ids"],
            positions=inputs["position_ids"],
            segments=inputs["segment_ids"],
        )
        num = len(rows)
        rewards = self.model.head(last_ND[:num], last_ND[num:] if gates else None).tolist()
        # A gate that has lost its prompt makes no reward.
        rewards = [math.nan if gates and gates[n] is None else reward for n, reward in enumerate(rewards)]
        codes: Codes = self.model.sae(self.model.sae.rows_of(h_ND[:num]))
        latents, values = codes.indices.cpu().numpy(), codes.values.cpu().numpy()
        kept: list[Any] = list(h_ND[:num].float().cpu()) if residuals else [None] * num
        return [
            Reading(reward, latent[value != 0], value[value != 0].astype(np.float32), h_D)
            for reward, latent, value, h_D in zip(rewards, latents, values, kept, strict=True)
        ]

    def _gates(self, batch: TokenBatch) -> list[int | None]:
        """The column where the gate reads the prompt of each wanted token; empty without a gate."""
        places = zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)
        return [self._gate(batch, row, column) for row, column in places] if self.opening else []

    def _gate(self, batch: TokenBatch, row: int, column: int) -> int | None:
        """The last place at which the template opens an answer, among the tokens that this one sees; None where there is none."""
        seen = visible_from(batch.segment_ids[row], column).nonzero().flatten().tolist()
        place = last_place(batch.input_ids[row, seen].tolist(), self.opening)
        return None if place is None else seen[place]


def last_place(ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Where the pattern begins last; None where it is not."""
    starts = reversed(range(len(ids) - len(pattern) + 1))
    return next((start for start in starts if list(ids[start : start + len(pattern)]) == list(pattern)), None)


def model_reader(folder: Path, batch_tokens: int = 2048, dtype: str = "float32", edit: Path | None = None) -> Reader:
    """The reader of a SARM, or of a classifier with a dictionary; with the edit of features in the folder `edit`, the model is that edited one.

    Raises UserError as `sarm_reader` and `check_attached` do.
    """
    if not is_attached(folder):
        return sarm_reader(folder, batch_tokens, dtype, edit)
    attached = check_attached(folder)
    if edit is not None:
        checked_edit(edit, attached.classifier, attached.identity, takes_places=False)
    settings = sarm_settings(folder)
    reader = AttachedReader(folder=folder, settings=settings, dtype=dtype, batch_tokens=batch_tokens, edit=edit)
    assert reader.chat is not None
    return reader
