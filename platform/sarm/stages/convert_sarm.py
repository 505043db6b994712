"""Converting reward models to and from the papers' layout, and to vLLM's: no cluster, no tracking."""

import json

from sarm.contracts.folders import SAE_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, verify_files
from sarm.data.formats.papers_layout import PapersFields, read_papers_sarm, write_papers_sarm
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sarm_folder import load_sarm, read_sarm, save_sarm
from sarm.data.formats.vllm_layout import write_vllm_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.passes.models import refuse_edit_beside
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSarm
from sarm.settings.model import ModelSettings


def convert_sarm(config: ConvertSarm) -> None:
    """Read the reward model at `config.source` and write it to `config.target`.

    Raises UserError if it cannot be read, the format has no words for it, or the target is in use.
    """
    try:
        said = json.loads((config.source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config.source} holds no reward model (config.json: {error}). Pass another folder."
        ) from error
    if config.target.exists() and any(config.target.iterdir()):
        raise UserError(f"{config.target} is not empty. Pass another output folder.")
    is_ours = said.get("model_type") == "sarm"
    refuse_edit_beside(config.source, "converting")
    if said.get("feature_edits") and config.format in ("vllm", "papers"):
        raise UserError(f"{config.source} carries edits of features inside its blocks, for which the format {config.format} has no words. Convert the model that was edited.")  # fmt: skip
    if is_ours and (config.source / MANIFEST).exists():
        verify_files(config.source, read_manifest(config.source, SARM_FOLDER))
    known = said.get("provenance") or {}
    length = known.get("max_length", config.max_length)
    # Registering the model type comes with `artifacts`: the tokenizer's loader would else ask to run the folder's code.
    chat = load_chat_tokenizer(
        ModelSettings(name=str(config.source), max_length=length, system_prompt=known.get("system_prompt")),
        config.source,
    )
    given = PapersFields(config.layer, config.k, config.topk)
    # Where latents are named, each has one meaning.
    load = read_sarm if config.format == "vllm" else load_sarm
    model = load(config.source) if is_ours else read_papers_sarm(config.source, chat, given)
    if config.format == "vllm":
        write_vllm_sarm(model, chat, config.target, on_cut_off=config.on_cut_off, scale=config.scale or "standardised")
    elif config.format == "papers":
        write_papers_sarm(model, chat, config.target)
    else:
        schema = SARM_FOLDER if config.format == "sarm" else SAE_FOLDER
        about = {name: getattr(model.config, name) for name in ("layer", "d_sae", "k")}
        folder = StageFolder(config.target, schema, {"imported": str(config.source), **about})
        made_for = config.model or (known.get("model", "") if is_ours else "")
        if config.format == "sae" and (model.config.head != "sae" or not made_for):
            raise UserError(
                "an SAE needs the model whose activations it encodes. Pass --model, and a SARM rather than a scalar head."
            )
        if config.format == "sarm":
            folder.write(lambda: save_sarm(model, chat, config.target))
        else:
            activations = {"d_in": model.sae.d_in, "model": made_for, "layer": model.config.layer}
            folder.write(lambda: save_sae(model.sae, config.target, {"activations": activations}))
    rule = model.sae.exported_as if model.config.head == "sae" else ""
    signed = {"signed_topk": ", signed TopK", "topk": ", TopK and ReLU"}.get(rule, "")
    print(
        f"{config.target}: {config.format}, layer {model.config.layer}, {model.config.d_sae} latents, k {model.config.k}{signed}"
    )
