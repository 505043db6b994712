"""Edits of features that a model carries: `feature_edits` of its config, and among its weights what they need of the SAEs.

Each is a `Splice`, at every token: h' = h + s (decode(z') - decode(z)), so that what the SAE does not explain is passed on. A record of the
config names layer, SAE and edited latents; its weights are the encoder (of an SAE with thresholds the edited columns alone) and the decoder
rows of the edited latents. An edit folder holds the same (`sarm.data.formats.feature_edit`).
N tokens, D d_in, S d_sae, E edited latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import build_sae
from .sae import Sae
from .splice import LatentEdit, Splice, blocks_of, check_sites, edited_output

Record = Mapping[str, Any]
"""`layer`, `sae` (what `build_sae` takes, `standardises`, and the hash of its `weights`) and `edits`: JSON values."""


def record_of(splice: Splice, weights: str) -> dict[str, Any]:
    """The record of a splice, whose SAE's weights have this hash."""
    sae = splice.sae
    said = {"weights": weights, "standardises": sae.standardises, "d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k}
    edits = [one._asdict() for one in splice.edits]
    return {"layer": splice.layer, "sae": {**said, **sae.describe()}, "edits": edits}


def needed_of(splice: Splice) -> dict[str, Tensor]:
    """What of the SAE's weights the splice needs, by name, on the CPU."""
    return {
        name: (tensor[splice.own_latents] if _is_cut(name, splice.sae) else tensor).detach().cpu().contiguous().clone()
        for name, tensor in splice.sae.state_dict().items()
    }


@torch.no_grad()
def splice_of(record: Record, tensors: Mapping[str, Tensor]) -> Splice:
    """The splice of a record and the weights that it needs.

    Raises KeyError, TypeError or ValueError for a record that describes none, and for weights of other shapes.
    """
    splice = _empty_splice(record)
    shapes = _shapes(splice)
    for name, tensor in splice.sae.state_dict().items():
        if name not in tensors or tuple(tensors[name].shape) != shapes[name]:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"there is {found} for {name}, expected {shapes[name]}")
        given = tensors[name].to(tensor.device, tensor.dtype)
        if _is_cut(name, splice.sae):
            tensor.zero_()
            tensor[splice.own_latents] = given
        else:
            tensor.copy_(given)
    return splice


class CarriedSplice(nn.Module):
    """One record with its weights as a part of a model, applied behind the block that it names.

    Raises as `splice_of` does for a record that describes none, and ValueError for one of another width or of a layer that is not there.
    """

    def __init__(self, record: Record, backbone: nn.Module):
        super().__init__()
        self.record = dict(record)
        with torch.device("meta"):
            empty = _empty_splice(record)
        config: Any = backbone.config
        blocks = blocks_of(backbone)
        check_sites([empty], len(blocks), config.hidden_size)
        self.tensors = nn.ParameterDict()
        for name, shape in _shapes(empty).items():
            self.tensors[name] = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        self._splice: Splice | None = None
        # Without an edited latent nothing is hooked, and the pass is the plain one to the bit.
        if empty.edits:
            blocks[empty.layer - 1].register_forward_hook(self.hook)

    @property
    def splice(self) -> Splice:
        """Made when it is first needed: a model is built before its weights are there, and on a device where nothing is."""
        if self._splice is None:
            self._splice = splice_of(self.record, {name: tensor.float() for name, tensor in self.tensors.items()})
        return self._splice

    def hook(self, _block: nn.Module, _inputs: Any, output: Any) -> Any:
        """What a block gives, edited at all tokens."""
        return edited_output(self.splice, output)

    @torch.no_grad()
    def fill_(self, splice: Splice) -> None:
        """Take the weights of a splice."""
        for name, tensor in needed_of(splice).items():
            self.tensors[name].copy_(tensor)
        self._splice = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._splice = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._splice = None
        super()._load_from_state_dict(*args, **kwargs)


class CarriedEdits(nn.ModuleList):
    """All that a model carries, in the order in which they are applied where they share a block."""

    def __init__(self, records: Sequence[Record], backbone: nn.Module):
        """Raises ValueError for a record that describes no edit, or none of this backbone."""
        try:
            carried = [CarriedSplice(record, backbone) for record in records]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"feature_edits of the config describe no edit of features: {type(error).__name__}: {error}.") from error  # fmt: skip
        super().__init__(carried)

    def add_(self, splice: Splice, weights: str, backbone: nn.Module) -> dict[str, Any]:
        """Apply one more from now on; returns its record, for the config. Raises ValueError for one of another model."""
        record = record_of(splice, weights)
        carried = CarriedSplice(record, backbone).to(next(backbone.parameters()).device)
        carried.fill_(splice)
        self.append(carried)
        return record


def _empty_splice(record: Record) -> Splice:
    """The splice without its weights."""
    said = dict(record["sae"])
    said.pop("weights", None)
    standardises = said.pop("standardises")
    if not isinstance(standardises, bool):
        raise ValueError(f"standardises is {standardises!r}, expected true or false")
    edits = [LatentEdit(int(one["latent"]), one["kind"], float(one["value"])) for one in record["edits"]]
    sae = build_sae(**said)
    sae.standardises = standardises
    return Splice.of_rows(sae, int(record["layer"]), edits)


def _is_cut(name: str, sae: Sae) -> bool:
    return name == "W_dec" and not sae.is_tied


def _shapes(splice: Splice) -> dict[str, tuple[int, ...]]:
    num = len(splice.own_latents)
    return {
        name: (num, *tensor.shape[1:]) if _is_cut(name, splice.sae) else tuple(tensor.shape)
        for name, tensor in splice.sae.state_dict().items()
    }
