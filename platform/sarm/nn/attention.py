"""Who sees whom in rows of tokens, in the form that costs least: no mask, blocks of one, a whole one, or one made in parts.

B rows, L columns, N blocks of _BLOCK columns. `sarm.nn.backbone` says what segments are. A row that is one sequence needs no mask: attention
takes its causal kernel. On CUDA other rows go through `flex_attention`, which skips blocks that nobody sees (Dong et al. 2024). Elsewhere their mask is
whole, [B, 1, L, L], up to DENSE_TOKENS columns; longer rows are taken apart before (`sarm.nn.rows_apart`). A long sequence of a family whose attention has a
window, caps or sinks is attended to in parts: transformers would make a whole mask for it.
"""

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from .segments import seen_segments, visible

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DENSE_TOKENS = 2048
"""A whole mask of a longer row would take more memory than its activations."""
_BLOCK = 128
_QUERIES_A_PART = 512
# torch compiles a kernel of `flex_attention` for one row and several, one block and several, each window, each dtype, with gradients and without: 23 were
# counted. Beyond its limit, 8 by default, it falls back without an error to scores of [L, L] in float32.
_MOST_KERNELS = 64


def whole_mask(positions: Tensor, segments: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, L], to be added to scores."""
    seen = visible(positions, segments, window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def block_mask(positions: Tensor, segments: Tensor, window: int | None) -> BlockMask:
    """`visible` for `flex_attention`: which blocks hold a pair that may be seen, and a rule for the pairs in them. No [L, L] is made."""
    num_rows, length = segments.shape
    num_blocks = -(-length // _BLOCK)
    own, answer, prompt = seen_segments(segments)
    numbers = torch.unique(torch.stack([own, answer, prompt]))
    holds, wants = (torch.zeros(num_rows, num_blocks, len(numbers), device=segments.device) for _ in range(2))
    block = (torch.arange(length, device=segments.device) // _BLOCK).expand_as(segments)
    row = torch.arange(num_rows, device=segments.device)[:, None].expand_as(segments)
    holds[row, block, torch.searchsorted(numbers, own)] = 1
    for seen in (own, answer, prompt):
        wants[row, block, torch.searchsorted(numbers, seen)] = 1
    is_seen = torch.tril(wants @ holds.mT > 0).int()
    order = torch.argsort(is_seen, dim=-1, descending=True, stable=True).int()

    # Without names and annotations: they are compiled into the kernel, and run by tracers that take no checks of shapes.
    rule: Any = lambda b, _head, q, k: (  # noqa: E731
        (q >= k) & ((own[b, k] == own[b, q]) | (own[b, k] == answer[b, q]) | (own[b, k] == prompt[b, q]))
    )
    if window is not None:
        windowless: Any = rule
        rule = lambda b, head, q, k: windowless(b, head, q, k) & (positions[b, q] - positions[b, k] < window)  # noqa: E731
    blocks: Any = BlockMask
    mask: BlockMask = blocks.from_kv_blocks(
        is_seen.sum(-1)[:, None].int(), order[:, None], BLOCK_SIZE=_BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )
    return mask


def part_mask(window: int | None, device: torch.device) -> Tensor:
    """Stands for the mask of rows of one sequence that is made in parts: [1, 1, 1, 1], the window or 0. A whole number, which no other mask is."""
    return torch.full((1, 1, 1, 1), window or 0, dtype=torch.long, device=device)


def in_parts(query: Tensor, key: Tensor, value: Tensor, window: int | None, *, scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
    """Causal attention, [B, L, heads, d], of some queries at a time to what they see. Caps as in Gemma 2, sinks as in gpt-oss."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for start in range(0, query.shape[2], _QUERIES_A_PART):
        stop = min(start + _QUERIES_A_PART, query.shape[2])
        first = 0 if window is None else max(0, start - window + 1)
        behind = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(first, stop, device=query.device)  # fmt: skip
        seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        q, k, v = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        if softcap is None and sinks is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling))
            continue
        scores = q @ k.mT * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores).reshape(1, -1, 1, 1).expand(len(q), -1, stop - start, 1)], -1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(v.dtype)
        outputs.append(weights @ v)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def takes_every_mask_(model: "PreTrainedModel") -> None:
    """Let the model's attention take block masks and masks in parts too, for good: checkpointed blocks attend again in the backward pass."""
    name = model.config._attn_implementation
    if not name.startswith(_PREFIX):
        model.config._attn_implementation = f"{_PREFIX}{name}"


def flex_works(model: "PreTrainedModel", device: torch.device) -> bool:
    """Whether `flex_attention` runs here, forward and backward, with heads of the model's shape; warns with the reason if it should and does not."""
    config = model.config
    if device.type != "cuda" or not model._supports_flex_attn or hasattr(config, "v_head_dim"):
        return False
    is_cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_cast else next(model.parameters()).dtype
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _tried(heads, getattr(config, "num_key_value_heads", None) or heads, d_head, device, dtype)


# The first pass of a process is often one without gradients, in which no backward pass can be tried.
@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def _tried(heads: int, key_heads: int, d_head: int, device: torch.device, dtype: torch.dtype) -> bool:
    keep_every_kernel_()
    generator = torch.Generator().manual_seed(0)
    groups, reason = heads // key_heads, ""
    # The second kernel takes every length, as the first does not.
    for num_rows, length in ((1, 2 * _BLOCK + 1), (2, 3 * _BLOCK)):
        segments = torch.tensor([0] * 100 + [1] * 80 + [2] * (length - 180), device=device).repeat(num_rows, 1)
        positions = torch.tensor([*range(180), *range(100, length - 80)], device=device).repeat(num_rows, 1)
        q, k, v = (
            torch.randn(num_rows, number, length, d_head, generator=generator).to(device, dtype).requires_grad_()
            for number in (heads, key_heads, key_heads)
        )
        wanted = F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible(positions, segments, None)[:, None])  # fmt: skip
        try:
            found, _ = flex_attention_forward(
                torch.nn.Identity(), q, k, v, block_mask(positions, segments, None), scaling=d_head**-0.5
            )
            found.sum().backward()
            if not torch.allclose(found.transpose(1, 2), wanted, atol=2e-2):
                reason = "a first product came out wrong"
        except Exception as error:  # whatever a compiler or driver raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if reason:
            warnings.warn(f"attention to shared prompts makes whole masks, since flex_attention does not run here: {reason.rstrip('.')}.", stacklevel=2)  # fmt: skip
            return False
    return True


def keep_every_kernel_() -> None:
    """Let this process compile as many kernels of `flex_attention` as rows of all shapes want."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_KERNELS)


def makes_mask(config: "PretrainedConfig", length: int, window: int | None) -> bool:
    """Whether transformers makes a whole mask for rows of one sequence of this length."""
    return config._attn_implementation.removeprefix(_PREFIX) != "sdpa" or (window is not None and window < length)


_PREFIX = "sarm_"


def _attend(name: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:  # fmt: skip
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.long:
        caps = {"scaling": options.get("scaling"), "softcap": options.get("softcap"), "sinks": options.get("s_aux")}
        return in_parts(query, key, value, int(attention_mask) or None, **caps), None
    own: Any = sdpa_attention_forward if name == "sdpa" else sys.modules[type(module).__module__].eager_attention_forward  # fmt: skip
    return own(module, query, key, value, attention_mask, **options)


for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"{_PREFIX}{_name}", functools.partial(_attend, _name))
    AttentionMaskInterface.register(f"{_PREFIX}{_name}", _mask)
