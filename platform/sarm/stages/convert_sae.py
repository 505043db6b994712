"""Converting an SAE between this platform and other libraries: no cluster, no tracking."""

from dataclasses import replace

from sarm.contracts.folders import SAE_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, verify_files
from sarm.data.formats.sae_folder import save_sae
from sarm.data.formats.sae_formats import export_sae, import_sae, with_relu
from sarm.data.formats.sae_weights import STANDARDISED, SaeWeights, sae_of
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae


def convert_sae(config: ConvertSae) -> None:
    """Read the SAE at `config.source` and write it to `config.target`.

    Raises UserError if it cannot be read, the format cannot hold it, or the target is in use.
    """
    if (config.source / MANIFEST).exists():
        verify_files(config.source, read_manifest(config.source, SAE_FOLDER))
    weights = import_sae(config.source, config.from_format, config.k)
    weights = with_relu(weights) if config.relu else weights
    made_for = {"model": config.model, "layer": config.layer} if config.model and config.layer else {}
    if made_for:
        weights = replace(
            weights,
            metadata={**weights.metadata, "activations": {**weights.metadata.get("activations", {}), **made_for}},
        )
    if config.format == "sarm":
        _write_stage_folder(weights, config)
    else:
        export_sae(weights, config.target, config.format)
    rows = "standardised rows, sarm.nn.sae.standardise(h)" if weights.input == STANDARDISED else "residuals as they are"
    rows = "residuals, which it standardises itself" if config.format == "saelens_residual" else rows
    active = f"k {weights.k}" if weights.threshold is None else "thresholds"
    print(f"{config.target}: {config.format}, {weights.d_in} x {weights.d_sae}, {active}; takes {rows}")


def _write_stage_folder(weights: SaeWeights, config: ConvertSae) -> None:
    if weights.input != STANDARDISED and not config.standardised:
        raise UserError(
            f"{config.source} does not say that its SAE takes standardised rows, and the reward model feeds it those. Pass --standardised if it was trained on them."
        )
    made_for = weights.metadata.get("activations", {})
    if not made_for.get("model") or not made_for.get("layer"):
        raise UserError(f"{config.source} does not say which model and layer its SAE is for. Pass --model and --layer.")
    folder = StageFolder(config.target, SAE_FOLDER, {"imported": str(config.source), "k": weights.k})
    metadata = {**weights.metadata, "input": STANDARDISED, "activations": {"d_in": weights.d_in, **made_for}}
    folder.write(lambda: save_sae(sae_of(weights), config.target, metadata))
