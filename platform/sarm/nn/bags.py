"""Which latents of which rows a sparse product reads."""

from typing import NamedTuple

from torch import Tensor


class Bags(NamedTuple):
    """Entries grouped into bags, each bag the sum of values[n] * W_dec[latents[n]]: one bag a row and nested dictionary."""

    latents: Tensor
    rows: Tensor
    bags: Tensor
    offsets: Tensor
