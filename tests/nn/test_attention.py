"""Attention without masks, with blocks of one and in parts, against passes over each answer alone and against whole masks."""

import copy
import itertools

import pytest
import torch
from tests.nn.family_options import WINDOW
from tests.nn.test_backbone import families, random_ids, residual_alone
from tests.nn.test_branches import ANSWERS, CLOSING, OTHERS, STOPS, batch_of, difference, padded, read
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sarm.data.tokens.packing import answer_rows, collate, text_row
from sarm.nn import attention, backbone, rows_apart
from sarm.nn.attention import block_mask, in_parts, takes_every_mask_, whole_mask
from sarm.nn.backbone import FAMILIES, residual_stream, residuals_at
from sarm.nn.pretrained import load_backbone
from sarm.nn.segments import visible

LONG = attention.DENSE_TOKENS + 60
kinds = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2", "gpt_oss"])


@pytest.fixture
def whole_masks_of_8_tokens(monkeypatch):
    for module in (attention, backbone, rows_apart):
        monkeypatch.setattr(module, "DENSE_TOKENS", 8)


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """As on CUDA, but not compiled: the reference of `flex_attention`, which needs no compiler."""
    monkeypatch.setattr(backbone, "flex_works", lambda *_: True)
    with torch.compiler.set_stance("force_eager"):
        yield


def one_by_one(model) -> dict[object, Tensor]:
    sequences = ANSWERS | OTHERS
    wanted = {(key, c): [*sequences[key][: c + 1], *CLOSING] for key, stops in STOPS.items() for c in stops} | sequences
    return {key: residual_alone(model, torch.tensor([ids]))[0, -1] for key, ids in wanted.items()}


def assert_same(found: dict[object, Tensor], wanted: dict[object, Tensor], limit: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    assert max(difference(found[key], wanted[key]) for key in wanted) < limit


@families
@pytest.mark.parametrize("sides", [(0, 0), (5, 0), (0, 5)], ids=["unpadded", "left", "right"])
def test_rows_beyond_whole_masks_equal_passes_one_by_one(family, sides, family_folder, monkeypatch):
    model = load_backbone(str(family_folder(family)), 3)
    wanted = one_by_one(model)
    for module in (attention, backbone, rows_apart):
        monkeypatch.setattr(module, "DENSE_TOKENS", 8)
    monkeypatch.setattr(backbone, "whole_mask", None)
    assert_same(read(model, padded(batch_of(CLOSING), *sides)), wanted)


@kinds
def test_prompts_that_fit_a_shorter_row_are_not_taken_apart_further(family, family_folder, monkeypatch):
    model = load_backbone(str(family_folder(family)), 3)
    batch, wanted = batch_of(CLOSING), one_by_one(model)
    longest = max(len(row.ids) for answers in (ANSWERS, OTHERS) for row in answer_rows(list(answers.items()), 200, STOPS, CLOSING))  # fmt: skip
    assert batch.input_ids.shape[1] > longest, "else they stand in rows of their own already"
    for module in (attention, backbone, rows_apart):
        monkeypatch.setattr(module, "DENSE_TOKENS", longest)
    monkeypatch.setattr(rows_apart, "as_sequences", None)
    assert_same(read(model, batch), wanted)


@families
def test_a_long_sequence_attended_to_in_parts_is_what_it_was(
    family, family_folder, whole_masks_of_8_tokens, monkeypatch
):
    model, ids = load_backbone(str(family_folder(family)), 3), random_ids(7, 2, 40)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(input_ids=ids, use_cache=False).last_hidden_state
    monkeypatch.setattr(attention, "_QUERIES_A_PART", 7)
    assert 2 * WINDOW < 40, "else no window is felt"
    assert difference(residual_alone(model, ids), wanted) < 2e-5
    rows, columns = torch.tensor([0, 1]), torch.tensor([39, 20])
    with torch.no_grad():
        (found,) = residuals_at(model, [3], rows, columns, ids)
    assert difference(found, wanted[rows, columns]) < 2e-5


@kinds
def test_no_mask_is_made_for_rows_of_one_sequence_whichever_side_is_padded(family, family_folder, monkeypatch):
    model = load_backbone(str(family_folder(family)), 2)
    given: list[object] = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: given.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    for name in ("whole_mask", "block_mask", "part_mask"):
        monkeypatch.setattr(backbone, name, None)
    rows = [text_row("a", random_ids(1, 30).tolist(), [29]), text_row("b", random_ids(2, 17).tolist(), [16])]
    batch = collate(rows, 0, join=False)
    found = read(model, batch)
    ids = torch.stack([batch.input_ids[0], batch.input_ids[1].roll(13)])
    segments = torch.stack([batch.segment_ids[0], batch.segment_ids[1].roll(13)])
    positions = torch.stack([batch.position_ids[0], batch.position_ids[1].roll(13)])
    with torch.no_grad():
        left = residual_stream(model, ids, positions, segments)[:, -1]
    assert given == [None, None]
    for number, key in enumerate((("a", 29), ("b", 16))):
        assert difference(left[number], found[key]) < 1e-5


class NoSquares(TorchDispatchMode):
    """Refuses tensors with two dimensions of a long row's length."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                assert sum(size > attention.DENSE_TOKENS - 60 for size in tensor.shape) < 2, f"{func}: {tensor.shape}"
        return result


@kinds
@pytest.mark.parametrize("rows", ["one sequence", "one prompt", "several prompts"])
def test_nothing_of_length_times_length_is_made_for_long_rows(family, rows, family_folder):
    model = load_backbone(str(family_folder(family)), 1)
    long = random_ids(3, LONG // 2).tolist()
    answers = [(n, [*long, *random_ids(4 + n, LONG // 2).tolist()]) for n in range(2)]
    texts = [answer_rows([(n, random_ids(20 + n, LONG // 4).tolist())], LONG)[0] for n in range(5)]
    packed = {"one sequence": answer_rows(answers[:1], LONG), "one prompt": answer_rows(answers, 2 * LONG), "several prompts": texts}  # fmt: skip
    batch = collate(packed[rows], 0)
    if rows == "several prompts":
        batch = collate([*texts, *answer_rows([(9, random_ids(30, attention.DENSE_TOKENS - 70).tolist())], LONG)], 0)
    assert batch.input_ids.shape[1] >= attention.DENSE_TOKENS - 70
    with NoSquares():
        found = read(model, batch)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("window", [None, 4, 50])
def test_block_masks_show_what_whole_masks_show(window, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 16)
    batch = padded(batch_of(CLOSING), 3, 9)
    positions, segments = batch.position_ids, batch.segment_ids
    mask = block_mask(positions, segments, window)
    rows, length = segments.shape
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
    by_rule = mask.mask_mod(b, torch.zeros_like(b), q, k)
    in_blocks = mask.to_dense().repeat_interleave(16, 2).repeat_interleave(16, 3)[:, 0, :length, :length].bool()
    wanted = visible(positions, segments, window)
    assert torch.equal(by_rule, wanted)
    assert not (wanted & ~in_blocks).any(), "what is seen is in a block that is looked at"
    assert in_blocks.float().mean() < 0.75, "and some blocks are not"
    query, key = torch.randn(2, rows, 2, length, 8, dtype=torch.float64)
    found = flex_attention(query, key, key, block_mask=mask)
    dense = whole_mask(positions, segments, window, torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=dense)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", sorted({"llama", "mistral", "gemma2", "qwen2", "phi", "gemma3_text", "cohere2"} & FAMILIES.keys()))  # fmt: skip
def test_with_block_masks_answers_equal_passes_one_by_one(family, family_folder, flex_on_the_cpu):
    model = load_backbone(str(family_folder(family)), 3)
    wanted = one_by_one(model)
    assert_same(read(model, padded(batch_of(CLOSING), 5, 0)), wanted)
    assert model.config._attn_implementation.startswith("sarm_")
    assert_same(one_by_one(model), wanted)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_in_parts_and_its_gradients_equal_plain_attention_in_float64(softcap, has_sinks, window, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_A_PART", 6)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 33, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, 33, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64, generator=generator) if has_sinks else None
    found = in_parts(q, k, v, window, scaling=0.3, softcap=softcap, sinks=sinks)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    behind = torch.arange(33)[:, None] - torch.arange(33)
    scores = scores.masked_fill((behind < 0) | (behind >= (window or 99)), -torch.inf).exp()
    total = scores.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().reshape(1, 4, 1, 1))
    wanted = ((scores / total) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    # Sinks go through a softmax in float32, as theirs do.
    close = 1e-12 if softcap is None and sinks is None else 1e-6
    torch.testing.assert_close(found, wanted, rtol=0, atol=close)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for own, expected in zip(gradients, torch.autograd.grad((wanted * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=10 * close)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_checkpointed_blocks_give_the_gradients_of_a_pass_in_parts(family, family_folder, whole_masks_of_8_tokens):
    gradients = []
    for checkpointed in (False, True):
        model = load_backbone(str(family_folder(family)), 2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        ids = random_ids(5, 1, 30)
        positions = torch.arange(30)[None]
        residual_stream(model, ids, positions, torch.zeros_like(ids)).square().sum().backward()
        # A short row in between, as micro-batches come, finds the attention that it needs.
        residual_stream(
            model, ids[:, :6], positions[:, :6], torch.tensor([[0, 0, 1, 1, 2, 2]])
        ).square().sum().backward()
        gradients.append(model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_taking_every_mask_twice_is_taking_it_once(family_folder):
    model = load_backbone(str(family_folder("llama")), 1)
    for _ in range(2):
        takes_every_mask_(model)
    assert model.config._attn_implementation == "sarm_sdpa"


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_flex_attention_is_tried_forward_and_backward_whatever_pass_comes_first(around, monkeypatch):
    backward: list[str] = []

    def masked(module, q, k, v, mask, *, scaling):
        q.register_hook(lambda _: backward.append("q"))
        rows = torch.arange(q.shape[2])
        seen = mask.mask_mod(torch.arange(len(q))[:, None, None, None], 0, rows[:, None], rows[None, :])
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
        return found.transpose(1, 2), None

    monkeypatch.setattr(attention, "flex_attention_forward", masked)
    attention._tried.cache_clear()
    with around():
        works = attention._tried(4, 2, 16, torch.device("cpu"), torch.float32)
        assert torch.is_grad_enabled() == (around is torch.enable_grad)
    attention._tried.cache_clear()
    assert works
    assert backward == ["q", "q"], "for one row, and for several of another length"


def test_rows_of_any_shape_have_a_compiled_kernel(monkeypatch):
    """Traced as on CUDA, and the graphs run as they are: what torch's limit of kernels leaves out would make whole scores."""
    from transformers.integrations import flex_attention as theirs

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(flex_attention, backend=lambda graph, _: graph.forward)
    monkeypatch.setattr(theirs, "WrappedFlexAttention", lambda _training: lambda: compiled)
    attention.keep_every_kernel_()
    for window, around in itertools.product((None, 50), (torch.inference_mode, torch.no_grad)):
        for rows, length in [(1, 257), (2, 300), (1, 700), (3, 511), (5, 64), (7, 200), (1, 90), (1, 128)]:
            segments = (torch.arange(length) // 40).repeat(rows, 1)
            q, k, v = (torch.zeros(rows, heads, length, 16) for heads in (4, 2, 2))
            with around():
                mask = block_mask(torch.arange(length).expand(rows, length), segments, window)
                theirs.flex_attention_forward(torch.nn.Identity().eval(), q, k, v, mask, scaling=0.25)
    frames = torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()
    assert frames["total"] == frames["ok"] > 8
