"""How much of a language model's prediction survives the SAE.

Behind block `layer` the residual stream h of every token is replaced by what the SAE makes of it, brought back to h's scale:
h_hat = x_hat (std h + 1e-6) + mean h, or x_hat where the SAE does not standardise. For comparison it is replaced by 0. CE is the mean negative log-likelihood of the next token in
nats; recovered = (CE_zero - CE_hat) / (CE_zero - CE): 1 where nothing is lost, 0 where the SAE is as bad as no stream at all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sarm.nn.sae import STANDARDISE_EPS, Sae


class CrossEntropies(NamedTuple):
    """Means over all predicted tokens: of the model as it is, with the SAE spliced in, with the stream set to 0."""

    clean: float
    spliced: float
    zero: float
    num_tokens: int

    def recovered(self) -> float:
        return (self.zero - self.spliced) / (self.zero - self.clean)


@torch.no_grad()
def cross_entropies(model: nn.Module, layer: int, sae: Sae, texts: Sequence[Sequence[int]]) -> CrossEntropies:
    """Measure a causal language model (blocks in `model.model.layers`) on token ids, text by text; one of a single token has none to predict."""
    device = next(model.parameters()).device
    splices: list[Callable[[Tensor], Tensor]] = [lambda h: h, lambda h: reconstructed(sae, h), torch.zeros_like]
    totals, num_tokens = [0.0, 0.0, 0.0], 0
    for ids in texts:
        if len(ids) < 2:
            continue
        ids_1L = torch.tensor([list(ids)], device=device)
        for number, splice in enumerate(splices):
            with _Spliced(model, layer, splice):
                logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1]
            totals[number] += float(F.cross_entropy(logits_LV.float(), ids_1L[0, 1:], reduction="sum"))
        num_tokens += len(ids) - 1
    if num_tokens == 0:
        raise ValueError("cross-entropy needs a text of two tokens or more, got none. Pass more texts.")
    clean, spliced, zero = (total / num_tokens for total in totals)
    return CrossEntropies(clean, spliced, zero, num_tokens)


def reconstructed(sae: Sae, h: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
    """What the SAE makes of residual vectors [..., d_in], on their own scale and in their dtype."""
    flat_ND = h.reshape(-1, h.shape[-1]).float()
    x_hat_ND = sae.decode(sae(sae.rows_of(flat_ND)))
    if not sae.standardises:
        return x_hat_ND.to(h.dtype).reshape(h.shape)
    std_N1, mean_N1 = torch.std_mean(flat_ND, dim=-1, keepdim=True)
    return (x_hat_ND * (std_N1 + STANDARDISE_EPS) + mean_N1).to(h.dtype).reshape(h.shape)


class _Spliced:
    """The model with the output of block `layer` replaced, while the body runs."""

    def __init__(self, model: nn.Module, layer: int, splice: Callable[[Tensor], Tensor]):
        self._block: nn.Module = model.get_submodule(f"model.layers.{layer - 1}")
        self._splice = splice

    def __enter__(self) -> None:
        self._handle = self._block.register_forward_hook(self._replace)

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _replace(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._splice(output[0]), *output[1:])
        return self._splice(output)
