"""Branches: ends of turn behind beginnings of an answer, in the answer's own forward pass, against passes over each beginning alone."""

from itertools import product

import pytest
import torch
from tests.nn.test_backbone import kinds, random_ids, residual_alone
from torch import Tensor

from sarm.data.tokens.packing import TokenBatch, answer_rows, collate
from sarm.nn.backbone import residual_stream
from sarm.nn.pretrained import load_backbone
from sarm.nn.segments import ANSWERS_PER_BLOCK, SEGMENTS_PER_BLOCK, visible

CLOSING = [5, 2]
ROW_TOKENS = 200
# Two prompts; the answers to the first begin alike, behind a token of which both have a branch.
PROMPT, SHARED = random_ids(1, 6).tolist(), random_ids(2, 3).tolist()
ANSWERS = {n: [*PROMPT, *SHARED, *random_ids(3 + n, 5 + 2 * n).tolist()] for n in range(3)}
OTHERS = {9: random_ids(9, 14).tolist()}
STOPS = {0: [8, 10], 1: [7, 8, 12], 2: [8], 9: [0, 5, 11]}


def batch_of(closing: list[int], *, branches: bool = True) -> TokenBatch:
    rows = [
        row
        for answers in (ANSWERS, OTHERS)
        for row in answer_rows(list(answers.items()), ROW_TOKENS, STOPS if branches else {}, closing)
    ]
    assert len(rows) == 2, "the answers to one prompt share a row"
    return collate(rows, pad_id=0)


def padded(batch: TokenBatch, left: int, right: int) -> TokenBatch:
    def pad(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    return batch._replace(
        input_ids=pad(batch.input_ids, 0),
        position_ids=pad(batch.position_ids, 0),
        segment_ids=pad(batch.segment_ids, -1),
        columns=batch.columns + left,
    )


@torch.no_grad()
def read(model, batch: TokenBatch) -> dict[object, Tensor]:
    hidden = residual_stream(model, batch.input_ids, batch.position_ids, batch.segment_ids)
    return dict(zip(batch.keys, hidden[batch.rows, batch.columns], strict=True))


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, as a share of the residuals' spread."""
    return float((found - wanted).abs().max() / wanted.std())


@kinds
@pytest.mark.parametrize("closing", [CLOSING[1:], CLOSING], ids=["one token", "two tokens"])
@pytest.mark.parametrize("sides", [(0, 0), (5, 0), (0, 5)], ids=["unpadded", "left", "right"])
def test_every_branch_equals_the_conversation_that_stops_there(family, closing, sides, family_folder):
    """In float64 within 1e-6 of the spread; in float32 within 1e-5, beyond what float32 costs the conversation alone."""
    model = load_backbone(str(family_folder(family)), 3)
    batch, sequences = padded(batch_of(closing), *sides), ANSWERS | OTHERS
    wanted = {(key, c): [*sequences[key][: c + 1], *closing] for key, stops in STOPS.items() for c in stops} | sequences

    def each_alone() -> dict[object, Tensor]:
        return {key: residual_alone(model, torch.tensor([ids]))[0, -1] for key, ids in wanted.items()}

    found, alone = read(model, batch), each_alone()
    assert found.keys() == wanted.keys()
    model.double()
    exactly_found, exactly = read(model, batch), each_alone()
    for key in wanted:
        # Norms and routers of some families compute in float32 whatever they are given.
        assert difference(exactly_found[key], exactly[key]) < 1e-6, key
        # A linear attention's state loses some 1e-5 of its own, on some processors.
        assert difference(found[key].double(), exactly[key]) < 1e-5 + difference(alone[key].double(), exactly[key]), key


@kinds
def test_nobody_sees_a_branch(family, family_folder):
    """Other tokens in the branches change no bit elsewhere, and answers end as they do without branches."""
    model = load_backbone(str(family_folder(family)), 3)
    batch = batch_of([7])
    is_branch = (batch.segment_ids >= 0) & (batch.segment_ids % SEGMENTS_PER_BLOCK >= ANSWERS_PER_BLOCK)
    # Answers that begin alike have one branch behind what they have in common.
    assert int(is_branch.sum()) == len(
        {tuple((ANSWERS | OTHERS)[key][: c + 1]) for key, cs in STOPS.items() for c in cs}
    )
    others = batch.input_ids.masked_fill(is_branch, 50)
    with torch.no_grad():
        first, second = (
            residual_stream(model, ids, batch.position_ids, batch.segment_ids) for ids in (batch.input_ids, others)
        )
    assert torch.equal(first[~is_branch], second[~is_branch])
    assert (first[is_branch] != second[is_branch]).any(-1).all()
    plain, found = read(model, batch_of([7], branches=False)), read(model, batch)
    assert all(difference(found[key], plain[key]) < 1e-5 for key in plain)


def seen_by_definition(segments: list[int], i: int, j: int) -> bool:
    """Row i sees column j: up to itself, of its own branch, of its answer's own tokens, and of the shared prompt's."""
    if j > i:
        return False
    if segments[i] == segments[j]:
        return True
    if segments[i] < 0 or segments[j] < 0 or segments[i] // SEGMENTS_PER_BLOCK != segments[j] // SEGMENTS_PER_BLOCK:
        return False
    own, other = (segment % SEGMENTS_PER_BLOCK for segment in (segments[i], segments[j]))
    return other < ANSWERS_PER_BLOCK and other in (0, own % ANSWERS_PER_BLOCK)


@pytest.mark.parametrize("window", [None, 3])
def test_what_a_token_sees_is_as_defined(window):
    named = [
        block * SEGMENTS_PER_BLOCK + branch * ANSWERS_PER_BLOCK + answer
        for block, branch, answer in product((0, 1, 5), (0, 1, 2), (0, 1, 2))
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        segments = torch.tensor([-1, *named])[torch.randint(0, len(named) + 1, (2, 40), generator=generator)]
        positions = torch.randint(0, 9, (2, 40), generator=generator)
        found = visible(positions, segments, window)
        for line, i, j in product(range(2), range(40), range(40)):
            near = window is None or int(positions[line, i] - positions[line, j]) < window
            assert bool(found[line, i, j]) == (near and seen_by_definition(segments[line].tolist(), i, j))


def test_without_branches_the_mask_is_what_it_was():
    """So training, which has none, stays equal to the bit."""
    generator = torch.Generator().manual_seed(1)
    named = torch.tensor([-1, 0, 1, 2, SEGMENTS_PER_BLOCK, SEGMENTS_PER_BLOCK + 1])
    segments = named[torch.randint(0, len(named), (4, 60), generator=generator)]
    order = torch.arange(60)
    shared_prompt = segments - segments % SEGMENTS_PER_BLOCK
    own = segments[:, :, None] == segments[:, None, :]
    wanted = (order[:, None] >= order) & (own | (shared_prompt[:, :, None] == segments[:, None, :]))
    assert torch.equal(visible(order.expand(4, -1), segments, None), wanted)
