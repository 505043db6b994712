"""Untrained reward models: a pretrained backbone, an SAE or none, a head at zero."""

from pathlib import Path

from sarm.config import Model, UserError
from sarm.data.artifacts import load_sae
from sarm.data.chat import ChatTokenizer
from sarm.nn.architectures import options_of
from sarm.nn.backbone import load_backbone
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification


def check_sae(folder: Path, model: Model) -> None:
    """Raise UserError unless the SAE was trained on activations of this model, layer and template."""
    _, metadata = load_sae(folder)
    made_for = metadata["activations"]
    for name, wanted in (("model", model.name), ("layer", model.layer)):
        if made_for[name] != wanted:
            raise UserError(
                f"the SAE in {folder} was trained on {name} {made_for[name]}, asked for {wanted}. Pass the --model it was trained on, or another --out."
            )


def build_model(
    model: Model, model_folder: str, sae_folder: Path | None, chat: ChatTokenizer
) -> SarmForSequenceClassification:
    """The reward model before its first step, fp32; without an SAE folder it has the scalar head."""
    backbone = load_backbone(model_folder, model.layer, revision=model.revision, gguf_file=model.gguf_file)
    sae = None if sae_folder is None else load_sae(sae_folder)[0]
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=model.layer,
        d_sae=0 if sae is None else sae.d_sae,
        k=0 if sae is None else sae.k,
        sae=None if sae is None else {"architecture": sae.architecture, **options_of(sae)},
        head="scalar" if sae is None else "sae",
        end_of_turn_id=chat.end_of_turn_id,
        provenance={
            "model": model.name,
            "revision": model.revision,
            "template": chat.template_hash,
            "tokenizer": chat.tokenizer_hash,
            "max_length": model.max_length,
            "system_prompt": model.system_prompt,
        },
    )
    return SarmForSequenceClassification(config, backbone, sae)
