"""SAE files of other libraries, both ways: SAELens, sparsify, dictionary_learning, and the papers' `.pt`; and published suites, which are read.

Each format is a reader and a writer of `SaeWeights`, a suite a reader alone. Layers count blocks that are kept, as in `hidden_states[layer]`, so the
other libraries' hook on block n is layer n + 1. None of the formats but SAELens' can say that rows are standardised first:
readers of the others must be handed `sarm.nn.sae.standardise(h)`.
"""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from sarm.data.formats.sae_layouts import (
    read_dictionary_learning,
    read_sparsify,
    write_dictionary_learning,
    write_sparsify,
)
from sarm.data.formats.sae_lens_layout import (
    CONFIG,
    HELD,
    WEIGHTS,
    read_sae_lens,
    write_sae_lens,
    write_sae_lens_on_residuals,
)
from sarm.data.formats.sae_pt import read_pt, write_pt
from sarm.data.formats.sae_suites import (
    GEMMA_1,
    GEMMA_2,
    LLAMA,
    LLAMA_WEIGHTS,
    read_gemma_scope,
    read_llama_scope,
)
from sarm.data.formats.sae_weights import SaeWeights
from sarm.settings.checks import UserError


class Format(NamedTuple):
    """One library's files: whether a path holds them, how they are read, and how an SAE of the rules in `holds` is written into an empty folder."""

    is_at: Callable[[Path], bool]
    read: Callable[[Path, int | None], SaeWeights]
    write: Callable[[SaeWeights, Path], None]
    holds: tuple[str, ...]
    """Rules (`Sae.exported_as`) that the library's files have words for; an SAE of any other is refused."""


class Suite(NamedTuple):
    """Files that a suite was published as: whether a path holds them, and how they are read."""

    is_at: Callable[[Path], bool]
    read: Callable[[Path, int | None], SaeWeights]


def import_sae(path: Path, format: str = "auto", k: int | None = None) -> SaeWeights:
    """Read an SAE of any known format; `k` is for files that do not say it.

    Raises UserError if there is none, it is torn, of an architecture without an equal here, or not finite, or if it says another k.
    """
    if not path.exists():
        raise UserError(f"there is no SAE at {path}. Pass a folder, or a .pt file.")
    readers: dict[str, Format | Suite] = {**SUITES, **FORMATS}
    name = next((name for name, known in readers.items() if known.is_at(path)), None) if format == "auto" else format
    if name is None:
        raise UserError(
            f"{path} holds no known SAE: no cfg.json with sae_weights.safetensors (saelens) or sae.safetensors (sparsify), no "
            "config.json with ae.pt (dictionary_learning), no params.npz or params.safetensors (gemma_scope), no hyperparams.json "
            "(llama_scope), and it is no .pt file. Pass the folder that holds the weights."
        )
    try:
        return _with_k(readers[name].read(path, k), k, path).checked(str(path))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is torn; it was not opened, since that could run its code."
        ) from error
    except KeyError as error:
        raise UserError(
            f"{path} is not a {name} SAE: {error} is missing. Pass --from-format, or another path."
        ) from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not a readable {name} SAE: {reason}. Get another copy, or pass --from-format."
        ) from error


def export_sae(weights: SaeWeights, folder: Path, format: str) -> None:
    """Write a folder that the library's own loader takes; it appears whole or not at all.

    Raises UserError if the folder is in use, or the format has no words for this SAE.
    """
    _refuse_unknown_rule(weights, format)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Pass another output folder.")
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        FORMATS[format].write(weights.checked("the SAE"), temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _with_k(weights: SaeWeights, given: int | None, path: Path) -> SaeWeights:
    # Thresholds decide without it.
    if given is None or weights.rule == "jumprelu":
        return weights
    if weights.k not in (None, given):
        raise UserError(f"{path} says k={weights.k}, got k={given}. Leave --k out.")
    return replace(weights, k=given)


def with_relu(weights: SaeWeights) -> SaeWeights:
    """A signed TopK SAE as its readers use it that drop latents of value 0 and below."""
    if weights.rule != "signed_topk":
        return weights
    said = weights.metadata.get("sae")
    return replace(
        weights, rule="topk", metadata=weights.metadata | ({"sae": {**said, "signed": False}} if said else {})
    )


def _refuse_unknown_rule(weights: SaeWeights, format: str) -> None:
    holds = FORMATS[format].holds
    if weights.rule in holds:
        return
    library = format.removesuffix("_residual")
    if weights.rule == "signed_topk":
        raise UserError(
            f"{library} puts a ReLU behind TopK, this SAE keeps negative latents. Pass --format pt, or --relu to drop them as the ReLU does."
        )
    known = ", ".join(dict.fromkeys(_NAMES[rule] for rule in holds))
    others = [name for name, other in FORMATS.items() if weights.rule in other.holds and not name.endswith("_residual")]
    advice = f"Pass --format {' or '.join(others)}." if others else "Only this platform's own folders hold it."
    raise UserError(f"{library} knows only {known}, this SAE's rule is {_NAMES.get(weights.rule, weights.rule)}. {advice}")  # fmt: skip


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda path: all((path / name).is_file() for name in names)


_NAMES = {"topk": "TopK", "signed_topk": "TopK", "jumprelu": "thresholds", "matching_pursuit": "matching pursuit"}  # fmt: skip
FORMATS: dict[str, Format] = {
    "saelens": Format(_holds(CONFIG, WEIGHTS), read_sae_lens, write_sae_lens, HELD),
    "saelens_residual": Format(lambda path: False, read_sae_lens, write_sae_lens_on_residuals, HELD),
    "sparsify": Format(_holds("cfg.json", "sae.safetensors"), read_sparsify, write_sparsify, ("topk",)),
    "dictionary_learning": Format(
        _holds("config.json", "ae.pt"), read_dictionary_learning, write_dictionary_learning, ("topk", "jumprelu")
    ),
    "pt": Format(
        lambda path: path.suffix in (".pt", ".pth") or (path / "sae.pt").is_file(),
        read_pt,
        write_pt,
        ("topk", "signed_topk"),
    ),
}
"""Formats by their names on the command line."""
SUITES: dict[str, Suite] = {
    "gemma_scope": Suite(lambda path: any((path / name).is_file() for name in (GEMMA_1, GEMMA_2)), read_gemma_scope),
    "llama_scope": Suite(_holds(LLAMA, LLAMA_WEIGHTS), read_llama_scope),
}
"""Suites by their names on the command line."""
