"""What each rank of a ZeRO engine holds of the trained weights and Adam's moments, as pieces of named parameters.

A piece is a range of a parameter's flattened values. Pieces that n ranks saved are read by any number of ranks, each taking the
ranges that it now holds, so a state is not bound to the number of workers that wrote it. Written for DeepSpeed 0.19.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sarm.data.store.checkpoints import Checkpoint
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.settings.checks import UserError

_MOMENTS = ("exp_avg", "exp_avg_sq")
Shards = dict[str, dict[str, Any]]


class _Piece(NamedTuple):
    """`numel` values of a parameter from `start`, which lie in the optimizer's tensor `flat` from `offset`."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.offset : self.offset + self.numel]


def shards(engine: ZeroEngine) -> Shards:
    """This rank's weights and moments (views of what training changes), together with the other ranks' each value once."""
    states = _adam(engine).state
    return {
        piece.name: {
            "start": piece.start,
            "weight": piece.of(piece.flat.detach()),
            **{key: piece.of(states[piece.flat][key]) for key in _MOMENTS},
        }
        for piece in _saved_pieces(engine)
    }


def weights(engine: ZeroEngine) -> Shards:
    """A copy in host memory of this rank's weights, without moments."""
    return {
        piece.name: {"start": piece.start, "weight": piece.of(piece.flat.detach()).to("cpu", copy=True)}
        for piece in _saved_pieces(engine)
    }


def reshard(engine: ZeroEngine, found: Checkpoint, kind: str) -> Shards:
    """What `weights` gave when the state was saved, dealt to the ranks there are now; empty if there was nothing yet."""
    dealt: Shards = {
        piece.name: {"start": piece.start, "weight": torch.zeros(piece.numel)} for piece in _saved_pieces(engine)
    }
    is_empty = True
    for part in _parts(found, kind):
        is_empty = is_empty and not part
        for name in part.keys() & dealt.keys():
            target = dealt[name]
            _copy(
                target=target["weight"],
                start=target["start"],
                numel=len(target["weight"]),
                shard=part[name],
                key="weight",
            )
    return {} if is_empty else dealt


def load_weights_(model: nn.Module, found: Checkpoint, kind: str) -> None:
    """Put the trained weights of a state's `kind` (one of the dicts that workers saved) into a model that is not sharded.

    Raises UserError unless every trained parameter is there whole.
    """
    parameters = {name: p.data for name, p in model.named_parameters()}
    missing = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    for part in _parts(found, kind):
        for name, shard in part.items():
            _copy(target=parameters[name], start=0, numel=parameters[name].numel(), shard=shard, key="weight")
            missing[name] -= shard["weight"].numel()
    _refuse_missing(found, missing)


def load_moments_(engine: ZeroEngine, found: Checkpoint, kind: str, num_steps: int) -> None:
    """Put Adam's moments of a state into this rank's shards; the weights it was made with are those of the state already.

    Raises UserError unless all of this rank's values are there.
    """
    adam, pieces = _adam(engine), {piece.name: piece for piece in _pieces(engine)}
    for piece in pieces.values():
        if not adam.state.get(piece.flat):
            moments = {key: torch.zeros_like(piece.flat) for key in _MOMENTS}
            # Fused AdamW wants its count of steps where the weights are.
            step = torch.tensor(float(num_steps), device=piece.flat.device)
            adam.state[piece.flat] = {"step": step, **moments}
    missing = {piece.name: piece.numel for piece in pieces.values()}
    for part in _parts(found, kind):
        for name, shard in part.items():
            if name in pieces:
                piece = pieces[name]
                for key in _MOMENTS:
                    copied = _copy(
                        target=piece.of(adam.state[piece.flat][key]),
                        start=piece.start,
                        numel=piece.numel,
                        shard=shard,
                        key=key,
                    )
                missing[name] -= copied
    _refuse_missing(found, missing)


def _saved_pieces(engine: ZeroEngine) -> Iterator[_Piece]:
    """The pieces that this rank saves: all its own, or its share of them in stage 0, where every rank has all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, piece in enumerate(_pieces(engine)):
        if engine.stage > 0 or number % world == rank:
            yield piece


def _pieces(engine: ZeroEngine) -> Iterator[_Piece]:
    """The pieces of all trained parameters that this rank's optimizer holds; padding is left out."""
    optimizer = engine.deepspeed.optimizer
    # What DeepSpeed hangs on parameters has no types.
    parameters: Iterator[tuple[str, Any]] = engine.model.named_parameters()
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if engine.stage == 0:
            yield _Piece(name=name, start=0, numel=parameter.numel(), flat=parameter, offset=0)
        elif engine.stage < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield _Piece(name=name, start=low.start, numel=high.numel, flat=flat, offset=high.start)
        else:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * size
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                yield _Piece(
                    name=name,
                    start=start,
                    numel=numel,
                    flat=optimizer.fp32_partitioned_groups_flat[group],
                    offset=offset,
                )


def _adam(engine: ZeroEngine) -> torch.optim.Optimizer:
    adam: torch.optim.Optimizer = engine.deepspeed.basic_optimizer
    return adam


def _parts(found: Checkpoint, kind: str) -> Iterator[Mapping[str, Any]]:
    """What each worker saved, one after another: together they may be more than one machine holds."""
    for part in found.parts:
        if part.startswith("rank-"):
            yield found.read(part)["state"][kind]


def _copy(target: Tensor, start: int, numel: int, shard: Mapping[str, Any], key: str) -> int:
    """Copy what the shard has of a parameter's values from `start` on into their place; returns how many."""
    values: Tensor = shard[key]
    begin: int = shard["start"]
    first, last = max(start, begin), min(start + numel, begin + len(values))
    if first < last:
        target.view(-1)[first - start : last - start].copy_(values[first - begin : last - begin])
    return max(0, last - first)


def _refuse_missing(found: Checkpoint, missing: Mapping[str, int]) -> None:
    if wrong := sorted(name for name, numel in missing.items() if numel):
        raise UserError(
            f"the training state in {found.folder} is not of this model: {len(wrong)} parameters differ, first {wrong[0]}. Delete it to start over."
        )
