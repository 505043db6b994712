"""SARM as a `transformers` model: reward = sum_i w_i z_i over the active SAE latents of one token (SARM section 3).

Importing this module teaches `AutoModelForSequenceClassification` the model type `sarm`. It uses only torch and transformers,
and imports its neighbours relatively, so that a saved model can carry copies for readers who do not have this package.
B rows, L columns, N rewarded tokens, K active latents, S d_sae.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .answer_places import Places, closed, find_places, without_padding
from .architectures import ARCHITECTURE_FILES, build_sae
from .backbone import attention_of, residual_stream, restore_scales_, without_final_norm
from .carried_edits import CarriedEdits
from .heads import ScalarHead, SparseLinear
from .loading_report import faults
from .losses import reconstruction_loss
from .protocol import PROTOCOL_VERSION
from .sae import Sae
from .sarm_output import SarmOutput as SarmOutput

# All of them are imported here or by each other: what is not, `trust_remote_code` does not fetch.
_SHARED_FILES = ("modeling_sarm.py", "answer_places.py", "attention.py", "backbone.py", "rows_apart.py", "segments.py", "heads.py", "loading_report.py", "losses.py", "protocol.py", "architectures.py", "precision.py", "selection.py", "carried_edits.py", "sarm_output.py", "splice.py")  # fmt: skip
CODE_FILES = (*_SHARED_FILES, *ARCHITECTURE_FILES)
ON_CUT_OFF = ("close", "refuse", "penalise")
# A penalised answer gets what one in a few hundred gets, unless the config says what.
_PENALTY_STDS = 3.0
logger = logging.get_logger(__name__)


class SarmConfig(PretrainedConfig):
    """`head` is "sae" (SARM) or "scalar" (a linear head on the standardised activation).

    `standardise` says whether the SAE, or the scalar head, takes the standardised activation or the activation itself, as most published
    SAEs do. Configs from before it was written down lack it: theirs are standardised.

    `answer_place` says where the template opens answers (`ChatTokenizer.answer_place`): `opening`, the ids that every answer follows; `turns`,
    control tokens that no answer holds; `first`, the id that conversations begin with. `on_cut_off` is what `forward` does with an answer that
    has no end of turn: "close" it and flag it, "refuse" it, or "penalise" it with the reward `cut_off_reward` (None: three standard
    deviations below the mean). A config without `answer_place` is of protocol 1: the last end of turn is rewarded, whosever it is.

    `feature_edits` are the records of the edits inside the blocks that the model carries (`sarm.nn.carried_edits`).
    """

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
        standardise: Any = True,
        provenance: dict[str, Any] | None = None,
        protocol_version: int = 1,
        answer_place: dict[str, Any] | None = None,
        on_cut_off: str = "close",
        cut_off_reward: float | None = None,
        feature_edits: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if on_cut_off not in ON_CUT_OFF:
            raise ValueError(f"on_cut_off must be one of {', '.join(ON_CUT_OFF)}, got {on_cut_off!r}.")
        if not isinstance(standardise, bool):
            raise ValueError(f"standardise must be true or false, got {standardise!r}.")
        self.protocol_version, self.answer_place = protocol_version, answer_place
        self.on_cut_off, self.cut_off_reward = on_cut_off, cut_off_reward
        self.backbone, self.layer, self.d_sae, self.k, self.head = backbone or {}, layer, d_sae, k, head
        self.standardise = standardise
        # Architecture and options of the SAE (`Sae.describe`).
        self.sae = sae or {"architecture": "topk"}
        self.end_of_turn_id, self.reward_mean, self.reward_std = end_of_turn_id, reward_mean, reward_std
        self.provenance, self.feature_edits = provenance or {}, feature_edits or []
        kwargs["num_labels"] = 1
        # So that a text-classification pipeline gives the reward itself, under its name, and no sigmoid of it.
        kwargs |= {"problem_type": "regression", "id2label": {0: "reward"}, "label2id": {"reward": 0}}
        super().__init__(**kwargs)

    @property
    def penalty(self) -> float:
        """The raw reward of an answer that was cut off, where such are penalised."""
        lowest = self.reward_mean - _PENALTY_STDS * (self.reward_std if self.reward_std > 0 else 1.0)
        return float(lowest if self.cut_off_reward is None else self.cut_off_reward)


class SarmForSequenceClassification(PreTrainedModel):
    """Truncated backbone, standardise unless the SAE takes activations as they are, SAE encoder, linear head.

    All but the backbone is in float32 and at rewarded tokens only.
    """

    config_class = SarmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["sae", "score", "feature_edits"]  # noqa: RUF012

    def __init__(
        self,
        config: SarmConfig,
        backbone: PreTrainedModel | None = None,
        sae: Sae | None = None,
        feature_edits: CarriedEdits | None = None,
    ):
        """`feature_edits` are those that the backbone has been given already, of a model that it is shared with."""
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = backbone if backbone is not None else _empty_backbone(config)
        self.feature_edits = CarriedEdits(config.feature_edits, self.model) if feature_edits is None else feature_edits
        d_in = self.model.config.hidden_size
        if config.head == "sae":
            self.sae = sae if sae is not None else build_sae(d_in=d_in, d_sae=config.d_sae, k=config.k, **config.sae)
            self.sae.standardises = config.standardise
            for parameter in self.sae.parameters():
                # DeepSpeed broadcasts parameters as bytes, which a transposed one is not.
                parameter.data = parameter.data.contiguous()
            self.score: SparseLinear | ScalarHead = SparseLinear(config.d_sae)
            # What RL libraries call with the hidden states of `self.model`, as they do with an ordinary classifier's head.
            self.score.rewards_of = self._rewards_of
        elif config.head == "scalar":
            self.score = ScalarHead(d_in, 1, bias=False, dtype=torch.float32)
            self.score.standardise = config.standardise
            nn.init.zeros_(self.score.weight)
        else:
            raise ValueError(f"head must be 'sae' or 'scalar', got {config.head!r}.")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a backbone, an SAE or a checkpoint; the head starts at zero."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        rewarded_rows: Tensor | None = None,
        rewarded_columns: Tensor | None = None,
        reconstruct: bool = False,
        recon_detached: bool = True,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        on_cut_off: str | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SarmOutput | tuple[Any, ...]:
        """Rewards of one sequence a row, padded on either side; or of several answers a row, given segments and rewarded places.

        `labels` [B] are rewards to regress on. Raises ValueError without `input_ids`, since the rewarded token is found by its id, and for an
        answer without an end of turn if `on_cut_off` (the config's, unless given) is "refuse".
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a SARM finds the rewarded token by its id: pass input_ids, not inputs_embeds.")
        places = None
        if segment_ids is None:
            places = self.answer_places(input_ids, attention_mask, on_cut_off)
            input_ids, segment_ids = places.input_ids, places.mask - 1
            position_ids = (places.mask.cumsum(-1) - 1).clamp_min(0)
            rewarded_rows = torch.arange(input_ids.shape[0], device=input_ids.device)
            rewarded_columns = places.columns
        assert position_ids is not None
        hidden = residual_stream(self.model, input_ids, position_ids, segment_ids)
        h_ND = hidden[rewarded_rows, rewarded_columns]
        with torch.autocast(h_ND.device.type, enabled=False):
            output = self._read(h_ND, reconstruct, recon_detached)
        if places is not None and self.config.answer_place:
            output.cut_off, output.unopened, output.unscored = places.cut_off, places.unopened, places.unscored
            if (on_cut_off or self.config.on_cut_off) == "penalise" and output.logits is not None:
                output.logits = output.logits.masked_fill(places.cut_off[:, None], self.config.penalty)
        if labels is not None and output.logits is not None:
            output.loss = F.mse_loss(output.logits.squeeze(-1), labels.reshape(-1).float())
        return output if return_dict is not False else output.to_tuple()

    def _rewards_of(self, hidden: Tensor) -> Tensor:
        """[..., 1] rewards of the residual stream [..., D] after the last block (`hidden_states[-1]` of `self.model`), at whichever tokens."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self._read(hidden.reshape(-1, hidden.shape[-1]), False, True).logits
        assert logits is not None
        return logits.reshape(*hidden.shape[:-1], 1)

    def _read(self, h_ND: Tensor, reconstruct: bool, recon_detached: bool) -> SarmOutput:
        if self.config.head == "scalar":
            return SarmOutput(logits=self.score(h_ND))
        x_ND = self.sae.rows_of(h_ND)
        codes = self.sae(x_ND)
        output = SarmOutput(logits=self.score(codes))
        if self.config.sae["architecture"] != "dense":
            output.latent_values, output.latent_indices = codes.values, codes.indices
        if reconstruct:
            # Detached, it trains the SAE alone: a pass of its own, since the reward's gradient goes on to the blocks.
            seen_ND, seen = (x_ND.detach(), self.sae(x_ND.detach())) if recon_detached else (x_ND, codes)
            output.reconstruction_loss = reconstruction_loss(self.sae(seen), seen_ND)
        return output

    def answer_places(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, on_cut_off: str | None = None
    ) -> Places:
        """Where each row's answer is rewarded: the first end of turn behind the last place where the template opens an answer.

        An answer that was cut off before it is closed with one, so that no row is rewarded at its prompt. Without a mask, what stands before
        the beginning of a conversation is taken for padding, and so is a run of the pad token or of the end of turn. Raises ValueError as `forward` does.
        """
        end_id = self.config.end_of_turn_id
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not self.config.answer_place:
            if end_id is not None:
                logger.warning_once(f"This SARM was exported under protocol {self.config.protocol_version}, before {PROTOCOL_VERSION}: an answer that was cut off gets its prompt's reward. Export it again to mend that.")  # fmt: skip
            none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            return Places(
                input_ids=input_ids,
                mask=mask,
                columns=self.rewarded_columns(input_ids, mask),
                cut_off=none,
                unopened=none,
                unscored=none,
            )
        pad_id = getattr(self.config, "pad_token_id", None)
        if attention_mask is None:
            mask = without_padding(input_ids, self.config.answer_place["first"], end_id, pad_id)
        places = find_places(input_ids, mask, self.config.answer_place, end_id)
        if places.unopened.any():
            logger.warning_once("The template opens no answer in some rows: they are plain strings, prompts or texts in another template, and their rewards mean little. Render messages with the tokenizer of this model.")  # fmt: skip
        if places.unscored.any():
            logger.warning_once("In some rows text follows the rewarded end of turn, and has no part in the reward: the conversation goes on, or the answer holds an end of turn. Their `unscored` is true.")  # fmt: skip
        if places.cut_off.any() and (on_cut_off or self.config.on_cut_off) == "refuse":
            raise ValueError(f"rows {places.cut_off.nonzero().flatten().tolist()} have no end of turn behind the answer's opening: the answer was cut off. Close it, or pass on_cut_off='close'.")  # fmt: skip
        return closed(places, end_id)

    def rewarded_columns(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Protocol 1: the last end-of-turn token that the mask shows, else the last token it shows: padding may be the same token."""
        shown = mask.bool()
        if self.config.end_of_turn_id is not None:
            ends = shown & (input_ids == self.config.end_of_turn_id)
            shown = torch.where(ends.any(-1, keepdim=True), ends, shown)
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (shown * (order + 1)).argmax(-1)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As every model's. Raises ValueError unless every weight comes from the files: none is drawn at random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, report = loaded
        if wrong := faults(report):
            raise ValueError(f"{args[0] if args else 'the model'} {wrong}. Get another copy, or export it again.")
        restore_scales_(model.model)
        return (model, report) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """As every model's, with the code that reads it beside it, so that the folder loads where this package is not installed."""
        self.config.auto_map = {
            "AutoConfig": "modeling_sarm.SarmConfig",
            "AutoModelForSequenceClassification": "modeling_sarm.SarmForSequenceClassification",
        }
        super().save_pretrained(save_directory, **kwargs)
        own, target = Path(__file__).parent, Path(save_directory)
        for name in CODE_FILES:
            if (own / name).resolve() != (target / name).resolve():
                shutil.copyfile(own / name, target / name)


def _empty_backbone(config: SarmConfig) -> PreTrainedModel:
    fields = {key: value for key, value in config.backbone.items() if key not in ("model_type", "dtype")}
    backbone = AutoConfig.for_model(config.backbone["model_type"], **fields)
    return without_final_norm(AutoModel.from_config(backbone, attn_implementation=attention_of(backbone)))


# A copy of this file, which an exported folder carries, leaves the name to the package where that is loaded.
if __name__ == "sarm.nn.modeling_sarm" or "sarm" not in CONFIG_MAPPING:
    AutoConfig.register("sarm", SarmConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(SarmConfig, SarmForSequenceClassification, exist_ok=True)
