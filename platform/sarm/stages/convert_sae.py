"""Converting an SAE between this platform and other libraries: no cluster, no tracking."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sarm.contracts.folders import SAE_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, verify_files
from sarm.data.formats.model_shapes import shape_of
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sae_formats import export_sae, import_sae, with_relu
from sarm.data.formats.sae_hub import fetch_sae, is_named
from sarm.data.formats.sae_place import is_same_model
from sarm.data.formats.sae_weights import STANDARDISED, SaeWeights, sae_of
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae
from sarm.settings.model import ModelSettings


def convert_sae(config: ConvertSae) -> None:
    """Read the SAE at `config.source` and write it to `config.target`.

    Raises UserError if it cannot be read, the format cannot hold it, or the target is in use.
    """
    if (config.format == "attached") != (config.pairs is not None):
        raise UserError("--pairs FOLDER and --format attached go together: the model's rewards are approximated on these pairs.")  # fmt: skip
    if is_named(config.source):
        config = replace(config, source=fetch_sae(config.source))
    if (config.source / MANIFEST).exists():
        verify_files(config.source, read_manifest(config.source, SAE_FOLDER))
    weights = import_sae(config.source, config.from_format, config.k)
    weights = with_relu(weights) if config.relu else weights
    weights = replace(weights, input=STANDARDISED) if config.standardised else weights
    if made_for := _made_for(weights, config):
        weights = replace(
            weights,
            metadata={**weights.metadata, "activations": {**weights.metadata.get("activations", {}), **made_for}},
        )
    if config.format == "sarm":
        _write_stage_folder(weights, config)
    elif config.format == "attached":
        from sarm.stages.attach_sae import attach_sae

        attach_sae(weights, config)
    else:
        export_sae(weights, config.target, config.format)
    is_standardised = weights.input == STANDARDISED
    rows = "standardised rows, sarm.nn.sae.standardise(h)" if is_standardised else "residuals as they are"
    rows = "residuals, which it standardises itself" if config.format == "saelens_residual" else rows
    active = f"k {weights.k}" if weights.threshold is None else "thresholds"
    print(f"{config.target}: {config.format}, {weights.d_in} x {weights.d_sae}, {active}; takes {rows}")


def _made_for(weights: SaeWeights, config: ConvertSae) -> dict[str, Any]:
    """Model and layer by the flags, where the file does not say otherwise.

    Raises UserError where it does, and where the model is too small or of another width.
    """
    said = weights.metadata.get("activations", {})
    if config.layer and said.get("layer", config.layer) != config.layer:
        hook = weights.metadata.get("hook_name")
        raise UserError(
            f"{config.source} is of layer {said['layer']}{f' ({hook})' if hook else ''}, got --layer {config.layer}. Leave --layer out, or pass the SAE of that layer."
        )
    if config.model and said.get("model") and not config.other_model and not _may_be_same(said["model"], config):
        raise UserError(f"{config.source} is of the model {said['model']}, got --model {config.model}. Pass that model, or --other-model if its activations are to be encoded all the same.")  # fmt: skip
    model, layer = config.model or said.get("model"), config.layer or said.get("layer")
    if model and layer:
        shape = shape_of(ModelSettings(name=model, layer=layer))
        if shape is not None and (shape.d_in != weights.d_in or layer > shape.num_blocks):
            raise UserError(f"{config.source} is {weights.d_in} wide and of layer {layer}, {model} is {shape.d_in} wide with {shape.num_blocks} blocks. Pass the --model that it was trained on.")  # fmt: skip
    flags = {"model": config.model, "layer": config.layer}
    return {name: value for name, value in flags.items() if value}


def _may_be_same(said: str, config: ConvertSae) -> bool:
    """Whether the model that the file names may be --model. A folder may be a copy of any; but rewards are read through the model itself."""
    folder, known = (Path(name).expanduser().absolute() for name in (config.model, said))
    if not folder.is_dir():
        return is_same_model(said, config.model)
    if config.format != "attached":
        return True
    return known == folder if known.is_dir() else is_same_model(said, config.model)


def _write_stage_folder(weights: SaeWeights, config: ConvertSae) -> None:
    made_for = weights.metadata.get("activations", {})
    if not made_for.get("model") or not made_for.get("layer"):
        raise UserError(f"{config.source} does not say which model and layer its SAE is for. Pass --model and --layer.")
    if not config.model and "imported_from" in weights.metadata and "/" not in made_for["model"]:
        raise UserError(f"{config.source} calls its model {made_for['model']}, which is no Hugging Face id. Pass --model OWNER/NAME, or its folder.")  # fmt: skip
    folder = StageFolder(
        config.target, SAE_FOLDER, {"imported": str(config.source), "d_sae": weights.d_sae, "k": weights.k}
    )
    metadata = {**weights.metadata, "activations": {"d_in": weights.d_in, **made_for}}
    folder.write(lambda: save_sae(sae_of(weights), config.target, metadata))
