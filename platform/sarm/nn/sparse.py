"""One sparse training step: x_hat and all gradients of an SAE from its active latents alone.

B rows, D d_in, S d_sae, K active latents a row, N entries (about B K), G nested dictionaries, C rows of a chunk.
Cost 2BDS for the pre-activations (half of it where `screening` helps), 8BDK for the rest (dense autograd: 12BDS). Beyond weights, gradients and what is B x D or N
long, memory is one C x S chunk of pre-activations: nothing is B x S, nothing is N x D.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import Backend
from .bags import Bags
from .precision import deciding
from .sae import Sae
from .screening import Screen, is_worth_it
from .selection import Entries, LargestRule, PreActs, Reconstruction, Rule, Share


@dataclass
class Workspace:
    """What a step keeps for the next one, so that its pages are not made anew every time: the chunk of pre-activations."""

    backend: Backend
    chunk_values: int = 2**24
    """Pre-activations of one chunk at most (but one row at least)."""
    screen: Screen = field(default_factory=Screen, init=False)
    _kept: Tensor | None = field(default=None, init=False)

    def chunk(self, num_rows: int, like: Tensor, num_latents: int) -> Tensor:
        """An uninitialised `num_rows` x `num_latents` tensor."""
        size = num_rows * num_latents
        if (
            self._kept is None
            or self._kept.numel() < size
            or self._kept.dtype != like.dtype
            or self._kept.device != like.device
        ):
            self._kept = like.new_empty(size)
        return self._kept[:size].view(num_rows, num_latents)

    def rows(self, num_rows: int, num_latents: int) -> int:
        """Rows of one chunk, so that a batch of `num_rows` falls into equal chunks."""
        num_chunks = -(-num_rows // max(1, self.chunk_values // num_latents))
        return max(1, -(-num_rows // max(1, num_chunks)))


class Plan(NamedTuple):
    """One step's choices."""

    rule: Rule | None
    workspace: Workspace
    share: Share
    prefixes: tuple[int, ...] = ()
    """Sizes of the nested dictionaries before the whole one (Matryoshka)."""
    first_latent: int = 0
    """Number, in the whole dictionary, of this worker's first latent."""
    dead: Tensor | None = None
    """Numbers of dead latents, for AuxK."""
    aux_rule: Rule | None = None
    """Which of the dead latents AuxK takes; None: there is no AuxK in this step."""


def reconstruct(sae: Sae, x_BD: Tensor, plan: Plan) -> Reconstruction:
    """Encode and decode rows with sparse gradients to all parameters (and to x, if asked for)."""
    if plan.rule is None:
        return _pursue(sae, x_BD, plan)
    # A buffer is not learnt by gradients.
    threshold = dict(sae.named_parameters()).get("threshold")
    seen: list[Entries] = []
    hat_GBD, l0 = _Autoencode.apply(x_BD, sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, threshold, plan, seen.append)
    num_nested = len(plan.prefixes) + 1
    x_hat_GBD = hat_GBD[:num_nested]
    if num_nested > 1:
        x_hat_GBD = x_hat_GBD.cumsum(0)
    error_hat = hat_GBD[num_nested] if len(hat_GBD) > num_nested else None
    return Reconstruction(x_hat_GBD + sae.b_dec, error_hat, l0, seen[0])


def _pursue(sae: Sae, x_BD: Tensor, plan: Plan) -> Reconstruction:
    """An encoder that selects latents one after the other; AuxK's project what it has left of the rows."""
    found, rest_BD = sae.pursue(x_BD, plan.share)
    if plan.aux_rule is None:
        return found
    none_S, none_D = x_BD.new_zeros(sae.d_sae), x_BD.new_zeros(sae.d_in)
    hat_GBD, _ = _Autoencode.apply(
        rest_BD.detach(), sae.W_enc.T, none_S, sae.W_dec, none_D, None, plan, lambda entries: None
    )
    return found._replace(error_hat=hat_GBD[-1])


class _Autoencode(torch.autograd.Function):
    """Sum of values times decoder rows for every nested dictionary (each without the ones before it), then AuxK's."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_SD: Tensor,
        b_enc_S: Tensor,
        W_dec_SD: Tensor,
        b_dec_D: Tensor,
        threshold_S: Tensor | None,
        plan: Plan,
        report: Callable[[Entries], None],
    ) -> tuple[Tensor, Tensor]:
        centred_BD = x_BD - b_dec_D
        active, aux = _select(centred_BD, W_enc_SD, b_enc_S, plan)
        report(active)
        num_rows = len(x_BD)
        entries, bags, num_groups = _bags(active, aux, num_rows, plan)
        hat = plan.workspace.backend.decode(W_dec_SD, entries.values, bags)
        l0 = hat.new_zeros(num_rows).index_add_(0, active.rows, (active.values != 0).to(hat.dtype))
        if plan.share.latent_group is not None:
            dist.all_reduce(hat, group=plan.share.latent_group)
            dist.all_reduce(l0, group=plan.share.latent_group)
        ctx.save_for_backward(centred_BD, W_enc_SD, W_dec_SD, threshold_S, *entries, *bags)
        ctx.plan = plan
        return hat.view(num_groups, num_rows, x_BD.shape[1]), l0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred_BD, W_enc_SD, W_dec_SD, threshold_S, *saved = ctx.saved_tensors
        entries, bags = Entries(*saved[: len(Entries._fields)]), Bags(*saved[len(Entries._fields) :])
        plan, (grad_GBD, grad_l0) = ctx.plan, grads
        grad_GD = grad_GBD.reshape(-1, grad_GBD.shape[-1])
        backend = plan.workspace.backend
        value_grads = backend.value_gradients(grad_GD, W_dec_SD, bags)
        pre_grads = value_grads * entries.is_on
        grad_W_enc, grad_b_enc, grad_W_dec = backend.weight_gradients(
            centred_BD, grad_GD, pre_grads, entries.values, bags, len(W_enc_SD)
        )
        grad_b_dec = -(grad_b_enc @ W_enc_SD)
        if plan.share.latent_group is not None:
            dist.all_reduce(grad_b_dec, group=plan.share.latent_group)
        grad_threshold = None
        if entries.is_edge is not None and ctx.needs_input_grad[5]:
            # Rajamanoharan et al. 2024, equations 11 and 12: a rectangle of width `bandwidth` in place of Dirac's delta.
            pull = threshold_S[bags.latents] * value_grads + grad_l0[bags.rows]
            grad_threshold = torch.zeros_like(threshold_S).index_add_(
                0, bags.latents, -pull * entries.is_edge / plan.rule.bandwidth
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows, order = torch.sort(bags.rows, stable=True)
            by_row = Bags(bags.latents[order], rows, rows, _offsets(rows, len(centred_BD)))
            grad_x = backend.decode(W_enc_SD, pre_grads[order], by_row)
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, grad_threshold, None, None


def _select(centred_BD: Tensor, W_SD: Tensor, b_S: Tensor, plan: Plan) -> tuple[Entries, Entries | None]:
    """The rule's entries and AuxK's, of dead latents alone."""

    def again(rows: Tensor) -> Tensor:
        with deciding():
            return torch.addmm(b_S, centred_BD[rows], W_SD.T)

    aux = None
    if plan.aux_rule is not None and plan.dead is not None:
        _see(
            rule=plan.aux_rule,
            centred_BD=centred_BD,
            W_SD=W_SD[plan.dead],
            b_S=b_S[plan.dead],
            workspace=plan.workspace,
        )
        aux = plan.aux_rule.entries(again)
        aux = aux._replace(latents=plan.dead[aux.latents])
    return _active(centred_BD=centred_BD, W_SD=W_SD, b_S=b_S, plan=plan, again=again), aux


def _active(centred_BD: Tensor, W_SD: Tensor, b_S: Tensor, plan: Plan, again: PreActs) -> Entries:
    """The rule's entries; without a rule, none."""
    rule, screened = plan.rule, None
    if rule is None:
        none = torch.empty(0, dtype=torch.long, device=centred_BD.device)
        return Entries(centred_BD.new_empty(0), none, none, none.bool())
    if isinstance(rule, LargestRule) and is_worth_it(W_SD, rule.width):
        screened = plan.workspace.screen.largest(centred_BD, W_SD, b_S, rule.width)
        if screened is not None:
            rule.take(*screened, len(W_SD))
    if screened is None:
        _see(rule=rule, centred_BD=centred_BD, W_SD=W_SD, b_S=b_S, workspace=plan.workspace)
    return rule.entries(again)


def _see(rule: Rule, centred_BD: Tensor, W_SD: Tensor, b_S: Tensor, workspace: Workspace) -> None:
    """Show the rule every pre-activation, a chunk of rows at a time."""
    num_latents = len(W_SD)
    for rows in centred_BD.split(workspace.rows(len(centred_BD), max(1, num_latents))):
        with deciding():
            pre_activations = torch.addmm(b_S, rows, W_SD.T, out=workspace.chunk(len(rows), rows, num_latents))
        rule.see(pre_activations)


def _bags(active: Entries, aux: Entries | None, num_rows: int, plan: Plan) -> tuple[Entries, Bags, int]:
    """All entries in the order of their bags: nested dictionary after nested dictionary, row after row, AuxK's last."""
    num_groups = len(plan.prefixes) + 1
    bags = active.rows
    if plan.prefixes:
        ends = torch.tensor(plan.prefixes, device=bags.device)
        bags = bags + num_rows * torch.bucketize(active.latents + plan.first_latent, ends, right=True)
        order = torch.argsort(bags, stable=True)
        bags = bags[order]
        active = active.at(order)
    if aux is not None:
        bags = torch.cat([bags, aux.rows + num_groups * num_rows])
        num_groups += 1
        edge = None
        if active.is_edge is not None:
            edge = torch.cat([active.is_edge, torch.zeros_like(aux.is_on)])
        values, latents, rows, is_on = (torch.cat(pair) for pair in zip(active[:4], aux[:4], strict=True))
        active = Entries(values=values, latents=latents, rows=rows, is_on=is_on, is_edge=edge)
    offsets = _offsets(bags, num_groups * num_rows)
    return active, Bags(active.latents, active.rows, bags, offsets), num_groups


def _offsets(bags_N: Tensor, num_bags: int) -> Tensor:
    """Where each bag begins in the sorted numbers of bags."""
    return torch.searchsorted(bags_N, torch.arange(num_bags, device=bags_N.device))
