"""Which experts a model sends each token to, as its own blocks decide it. T tokens, B rows of L columns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Weights closer than this are those of one choice; a gate that is cut off at a threshold, as PhiMoE's, jumps by more.
_ONE_CHOICE = 0.1


@contextmanager
def routes_of(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Experts [T, K] and their weights [T, K] of every block with experts, in order, while the model runs."""
    found: list[tuple[Tensor, Tensor]] = []

    def chosen(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [one.detach().clone() for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if indices := [one for one in given if one.dtype in (torch.int64, torch.int32)]:
            (weights,) = [one for one in given if one.is_floating_point() and one.shape == indices[0].shape]
            found.append((indices[0], weights.float()))

    def scored(_module: nn.Module, _args: tuple, output: tuple) -> None:
        weights, experts = output[0].detach().float().topk(1)
        found.append((experts, weights))

    hooks = []
    for module in model.modules():
        if type(module).__name__ == "Llama4Router":
            hooks.append(module.register_forward_hook(scored))
        elif type(module).__name__.endswith(("Experts", "MoE", "Moe")):
            hooks.append(module.register_forward_pre_hook(chosen, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def agree(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """[B, L]: whether both models chose the same experts for a token, at nearly the same weights, in every block."""
    assert len(one) == len(other) > 0
    same = torch.ones(len(one[0][0]), dtype=torch.bool)
    for (experts, weights), (others, theirs) in zip(one, other, strict=True):
        same &= (experts == others).all(1) & ((weights - theirs).abs() < _ONE_CHOICE).all(1)
    return same.reshape(rows, -1)


def undisturbed(same_BL: Tensor) -> Tensor:
    """[B, L]: whether a token and all that it sees went to the same experts: others' choices reach it by attention."""
    return same_BL.long().cumprod(1).bool()
