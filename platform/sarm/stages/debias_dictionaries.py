"""The SAEs of `jobs/debias.py`: read, and held against the model whose features they are to give."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sarm.data.formats.sae_folder import load_sae
from sarm.data.formats.sae_place import is_same_model
from sarm.passes.edited_scores import Dictionary
from sarm.passes.feature_edits import check_family, shape_of_body
from sarm.passes.models import ModelSpec
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias


def dictionaries_of(settings: Debias, spec: ModelSpec) -> list[Dictionary]:
    """The dictionaries by their layers, latents numbered through.

    Raises UserError for a model whose layers cannot be read, and for one that was trained on another model (unless that is allowed), layer or width, or that does not say on what, and
    for two of one layer.
    """
    check_family(Path(spec.place))
    num_blocks, d_in = shape_of_body(Path(spec.place))
    found: list[tuple[int, Path, int]] = []
    for folder in settings.sae:
        sae, metadata = load_sae(folder)
        made_for = metadata.get("activations") or {}
        layer, model = made_for.get("layer"), made_for.get("model")
        if not isinstance(layer, int):
            raise UserError(f"the SAE in {folder} does not say which layer it reads. Pass one that was trained or converted here.")  # fmt: skip
        if not settings.other_model and not _is_of(str(model), settings.model, spec.place):
            raise UserError(f"the SAE in {folder} was trained on {model}, asked for {settings.model}. Pass an SAE of this model, or --other-model.")  # fmt: skip
        if not 1 <= layer <= num_blocks:
            raise UserError(f"the SAE in {folder} reads layer {layer}, {settings.model} has {num_blocks} blocks. Pass an SAE of this model.")  # fmt: skip
        if sae.d_in != d_in:
            raise UserError(f"the SAE in {folder} takes activations of width {sae.d_in}, {settings.model} has {d_in}. Pass an SAE of this model.")  # fmt: skip
        if twin := [path for other, path, _ in found if other == layer]:
            raise UserError(f"the SAEs in {twin[0]} and {folder} both read layer {layer}. Pass one of them.")
        found.append((layer, folder, sae.d_sae))
    dictionaries, first = [], 0
    for layer, folder, d_sae in sorted(found):
        dictionaries.append(Dictionary(folder, layer, first))
        first += d_sae
    return dictionaries


def norms_of(dictionaries: list[Dictionary]) -> NDArray[np.float64]:
    """The lengths of all decoder rows, in the order in which latents are numbered through [latents]."""
    rows = [load_sae(one.folder)[0].W_dec.detach().double().norm(dim=1).numpy() for one in dictionaries]
    return np.concatenate(rows)


def _is_of(trained_on: str, asked: str, place: str) -> bool:
    """Whether the name that an SAE gives is that of the model: two folders are one model if they are one folder."""
    theirs = Path(trained_on).expanduser()
    if theirs.is_dir():
        # Adapters are read from where they were merged, and SAEs name the adapters' own folder.
        return theirs.resolve() in (Path(place).resolve(), Path(asked).expanduser().resolve())
    return trained_on == asked or (not Path(asked).is_dir() and is_same_model(trained_on, asked))
