"""SARM as a `transformers` model: reward = sum_i w_i z_i over the active SAE latents of one token (SARM section 3).

Importing this module teaches `AutoModelForSequenceClassification` the model type `sarm`. It uses only torch and transformers,
and imports its neighbours relatively, so that a saved model can carry copies for readers who do not have this package.
N rewarded tokens, K active latents, S d_sae.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .architectures import build_sae
from .backbone import residual_stream, without_final_norm
from .losses import reconstruction_loss
from .sae import Codes, Sae, standardise


class SarmConfig(PretrainedConfig):
    """`head` is "sae" (SARM) or "scalar" (a linear head on the same standardised activation)."""

    model_type = "sarm"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        layer: int = 0,
        d_sae: int = 0,
        k: int = 0,
        sae: dict[str, Any] | None = None,
        head: str = "sae",
        end_of_turn_id: int | None = None,
        reward_mean: float = 0.0,
        reward_std: float = 1.0,
        standardise: bool = True,
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.backbone, self.layer, self.d_sae, self.k, self.head = backbone or {}, layer, d_sae, k, head
        # Off in one baseline of the papers alone.
        self.standardise = standardise
        # Architecture and options of the SAE (`architectures.options_of`).
        self.sae = sae or {"architecture": "topk"}
        self.end_of_turn_id, self.reward_mean, self.reward_std = end_of_turn_id, reward_mean, reward_std
        self.provenance = provenance or {}
        kwargs["num_labels"] = 1
        # A pipeline for text classification gives the reward as it is, not its sigmoid.
        kwargs |= {"problem_type": "regression", "id2label": {0: "reward"}, "label2id": {"reward": 0}}
        super().__init__(**kwargs)


@dataclass
class SarmOutput(ModelOutput):
    """`logits` [N, 1] raw rewards; with TopK or thresholds, `latent_values` and `latent_indices` [N, K] whose weighted sum they are.

    `reconstruction_loss` [N] is there where it was asked for.
    """

    logits: Tensor | None = None
    latent_values: Tensor | None = None
    latent_indices: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class SparseLinear(nn.Module):
    """`weight` [1, S] over sparse codes: a sum of K products."""

    def __init__(self, d_sae: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, d_sae, dtype=torch.float32))

    def forward(self, codes: Codes) -> Tensor:
        return F.embedding_bag(codes.indices, self.weight.T, per_sample_weights=codes.values, mode="sum")


class SarmForSequenceClassification(PreTrainedModel):
    """Truncated backbone, standardise, SAE encoder, linear head; the last three in float32 and at rewarded tokens only."""

    config_class = SarmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["sae", "score"]  # noqa: RUF012

    def __init__(self, config: SarmConfig, backbone: PreTrainedModel | None = None, sae: Sae | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = backbone if backbone is not None else _empty_backbone(config)
        d_in = self.model.config.hidden_size
        if config.head == "sae":
            self.sae = sae if sae is not None else build_sae(d_in=d_in, d_sae=config.d_sae, k=config.k, **config.sae)
            # DeepSpeed broadcasts parameters as bytes, which a transposed one is not.
            self.sae.W_enc.data = self.sae.W_enc.data.contiguous()
            self.score: SparseLinear | nn.Linear = SparseLinear(config.d_sae)
        elif config.head == "scalar":
            self.score = nn.Linear(d_in, 1, bias=False, dtype=torch.float32)
            nn.init.zeros_(self.score.weight)
        else:
            raise ValueError(f"head must be 'sae' or 'scalar', got {config.head!r}.")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a backbone, an SAE or a checkpoint; the head starts at zero."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        rewarded_rows: Tensor | None = None,
        rewarded_columns: Tensor | None = None,
        reconstruct: bool = False,
        recon_detached: bool = True,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SarmOutput:
        """Rewards of one sequence a row, padded on either side; or of several answers a row, given segments and rewarded places."""
        if segment_ids is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            segment_ids = mask - 1
            position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
            rewarded_rows = torch.arange(input_ids.shape[0], device=input_ids.device)
            rewarded_columns = self.rewarded_columns(input_ids, mask)
        assert position_ids is not None
        hidden = residual_stream(self.model, input_ids, position_ids, segment_ids)
        h_ND = hidden[rewarded_rows, rewarded_columns]
        with torch.autocast(h_ND.device.type, enabled=False):
            x_ND = standardise(h_ND) if self.config.standardise else h_ND.float()
            if self.config.head == "scalar":
                return SarmOutput(logits=self.score(x_ND))
            codes = self.sae(x_ND)
            output = SarmOutput(logits=self.score(codes))
            if self.config.sae["architecture"] != "dense":
                output.latent_values, output.latent_indices = codes.values, codes.indices
            if reconstruct:
                # Detached, it trains the SAE alone: a pass of its own, since the reward's gradient goes on to the blocks.
                seen_ND, seen = (x_ND.detach(), self.sae(x_ND.detach())) if recon_detached else (x_ND, codes)
                output.reconstruction_loss = reconstruction_loss(self.sae(seen), seen_ND)
            return output

    def rewarded_columns(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The last end-of-turn token that the mask shows, else the last token it shows: padding may be the same token."""
        shown = mask.bool()
        if self.config.end_of_turn_id is not None:
            ends = shown & (input_ids == self.config.end_of_turn_id)
            shown = torch.where(ends.any(-1, keepdim=True), ends, shown)
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (shown * (order + 1)).argmax(-1)


def _empty_backbone(config: SarmConfig) -> PreTrainedModel:
    fields = {key: value for key, value in config.backbone.items() if key not in ("model_type", "dtype")}
    backbone = AutoConfig.for_model(config.backbone["model_type"], **fields)
    softcap = getattr(backbone, "attn_logit_softcapping", None)
    return without_final_norm(AutoModel.from_config(backbone, attn_implementation="eager" if softcap else "sdpa"))


AutoConfig.register("sarm", SarmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(SarmConfig, SarmForSequenceClassification, exist_ok=True)
