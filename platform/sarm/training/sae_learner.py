"""One SAE in training: its step, its optimizer and its dead clock; plain torch, any number of workers.

B rows of a step over all workers, D d_in, S d_sae. Workers either deal the rows among them, or split the dictionary: then each
holds S / workers latents, all see the same rows, and what a step learns is what one worker with the whole dictionary learns.
"""

import copy
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sarm.nn.backends import backend_for
from sarm.nn.losses import reconstruction_loss
from sarm.nn.sae import Sae
from sarm.nn.selection import Reconstruction, Rule, Share
from sarm.nn.sparse import Plan, Workspace, reconstruct
from sarm.settings.checks import UserError
from sarm.settings.sae import SaeSettings

Split = Literal["rows", "latents"]
# Pre-activations at once on a CPU (64 MiB) and on a GPU (512 MiB): less would starve the matrix product.
_CHUNK_VALUES = (2**24, 2**27)


class Learner:
    """Adam on fp32 weights and moments, unit-norm decoder rows with the parallel gradient removed, AuxK for dead latents.

    A latent is dead once `config.dead_after_rows` rows, counted over all workers, have passed since it fired.
    """

    def __init__(self, sae: Sae, config: SaeSettings, device: torch.device | str = "cpu", split: Split = "rows"):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._whole, self._config = sae.to(device), config
        self._splits_latents = split == "latents" and self.world > 1
        self._group = dist.group.WORLD if self.world > 1 else None
        self.sae = shard_of(self._whole, self.rank, self.world) if self._splits_latents else self._whole
        self.first_latent = self.rank * self.sae.d_sae if self._splits_latents else 0
        learnt = dict(self.sae.named_parameters())
        self._W_enc_SD: nn.Parameter | None = None
        if (W_enc := learnt.pop("W_enc", None)) is not None:
            # A step reads whole latents, and Adam copies what is not contiguous; to it, W_enc and its transpose are the same.
            W_enc.data = W_enc.data.T.contiguous().T
            self._W_enc_SD = nn.Parameter(W_enc.data.T)
        encoder = [] if self._W_enc_SD is None else [self._W_enc_SD]
        self._optimizer = torch.optim.Adam([*encoder, *learnt.values()], fused=True)
        device = self.sae.W_dec.device
        self._workspace = Workspace(backend_for(device), _CHUNK_VALUES[device.type == "cuda"])
        self.rows_since_fired = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)

    @property
    def rows_of_a_batch(self) -> slice:
        """Which rows of a batch this worker learns from."""
        return slice(None) if self._splits_latents else slice(self.rank, None, self.world)

    def step(self, x_BD: Float[Tensor, "batch d_in"], lr: float, num_all_rows: int | None = None) -> Float[Tensor, ""]:
        """Learn from the rows of a step, standardised; returns the loss over all of them.

        They are the whole batch, the same on all workers, or this worker's `rows_of_a_batch` of `num_all_rows`.
        """
        if num_all_rows is None:
            size, x_BD = len(x_BD), x_BD[self.rows_of_a_batch]
        else:
            size = num_all_rows
        share = Share(len(x_BD), size, self._group, self._splits_latents)
        rule = self.sae.rule(share)
        loss = self._loss(x_BD, rule, share)
        loss.backward()
        if self._group is not None and not self._splits_latents:
            for parameter in self.sae.parameters():
                assert parameter.grad is not None
                # W_enc's gradient is a transpose, as W_enc is, and NCCL takes what is contiguous alone; gloo takes everything.
                grad = parameter.grad if parameter.grad.is_contiguous() else parameter.grad.T
                dist.all_reduce(grad, group=self._group)
        self.sae.remove_parallel_gradient_()
        if self._W_enc_SD is not None:
            assert self.sae.W_enc.grad is not None
            self._W_enc_SD.grad, self.sae.W_enc.grad = self.sae.W_enc.grad.T, None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.sae.normalise_decoder_()
        self.sae.after_step_(rule)
        return share.over_rows(loss.detach())

    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Whether each latent is dead."""
        return self.rows_since_fired >= self._config.dead_after_rows

    def dead_share(self) -> float:
        """Share of latents (of this worker) that are dead by the clock."""
        return float(self.dead().double().mean())

    def whole(self) -> Sae:
        """The SAE with all latents, also where the dictionary is split; every worker has to call it."""
        if not self._splits_latents:
            return self.sae
        with torch.no_grad():
            for (name, whole), part in zip(_tensors(self._whole), (t for _, t in _tensors(self.sae)), strict=True):
                if name == "b_dec":
                    whole.copy_(part)
                    continue
                mine = part.T.contiguous() if name == "W_enc" else part.contiguous()
                parts = [torch.empty_like(mine) for _ in range(self.world)]
                dist.all_gather(parts, mine, group=self._group)
                whole.copy_(torch.cat(parts).T if name == "W_enc" else torch.cat(parts))
        return self._whole

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, of this worker."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rows_since_fired": self.rows_since_fired,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.sae.load_state_dict(state["sae"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.rows_since_fired.copy_(state["rows_since_fired"])

    def _loss(self, x_BD: Float[Tensor, "batch d_in"], rule: Rule | None, share: Share) -> Float[Tensor, ""]:
        size = share.num_all_rows
        found = reconstruct(self.sae, x_BD, self._plan(rule, share))
        rows_B = torch.stack([reconstruction_loss(x_hat_BD, x_BD) for x_hat_BD in found.x_hat]).mean(0)
        loss = rows_B.sum() / size
        if found.error_hat is not None:
            error_BD = (x_BD - found.x_hat[-1]).detach()
            loss = loss + self._config.aux_coefficient * reconstruction_loss(found.error_hat, error_BD).sum() / size
        penalty = self.sae.penalty(found.l0, share)
        self._count(found, size)
        return loss if penalty is None else loss + penalty

    def _plan(self, rule: Rule | None, share: Share) -> Plan:
        plan = Plan(rule, self._workspace, share, prefixes=self.sae.prefixes, first_latent=self.first_latent)
        if self._config.aux_k == 0:
            return plan
        dead = self.dead().nonzero().flatten()
        num_dead = torch.tensor(len(dead), device=dead.device)
        if share.splits_latents:
            dist.all_reduce(num_dead, group=self._group)
        return plan._replace(dead=dead, aux_rule=self.sae.aux_rule(self._config.aux_k, share)) if num_dead > 0 else plan

    def _count(self, found: Reconstruction, size: int) -> None:
        has_fired = torch.zeros(self.sae.d_sae, dtype=torch.uint8, device=self.rows_since_fired.device)
        has_fired[found.entries.latents[found.entries.values != 0]] = 1
        if self._group is not None and not self._splits_latents:
            dist.all_reduce(has_fired, dist.ReduceOp.MAX, group=self._group)
        self.rows_since_fired.add_(size).mul_(has_fired == 0)


def shard_of(sae: Sae, rank: int, world: int) -> Sae:
    """A copy with the latents of one of `world` workers: every parameter's share, b_dec whole.

    Raises UserError unless the dictionary divides evenly.
    """
    if sae.d_sae % world:
        raise UserError(
            f"d_sae must be a multiple of the {world} workers that split it, got {sae.d_sae}. Pass --sae.d-sae."
        )
    shard = copy.deepcopy(sae)
    shard.d_sae = sae.d_sae // world
    mine = slice(rank * shard.d_sae, (rank + 1) * shard.d_sae)
    for name, tensor in _tensors(shard):
        if name == "W_enc":
            tensor.data = tensor.data.T[mine].clone().T
        elif name != "b_dec":
            tensor.data = tensor.data[mine].clone()
    return shard


def _tensors(sae: Sae) -> list[tuple[str, Tensor]]:
    return [*sae.named_parameters(), *sae.named_buffers()]
