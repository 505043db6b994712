"""The curves of `tests/bench/bench_data_efficiency.py` on a few made-up responses: nested subsets, every reader, and no look at held-out pairs."""

import numpy as np
import pytest
from tests.bench.bench_data_efficiency import READERS, Pairs, Pieces, curves, sizes_of, subsets

D_IN, D_SAE = 64, 48


def made(num: int, seed: int) -> Pairs:
    """Responses of which two latents decide; the dictionary's rows are orthogonal but for noise."""
    rng = np.random.default_rng(seed)
    z = (rng.random((2, num, D_SAE)) * (rng.random((2, num, D_SAE)) < 0.2)).astype(np.float32)
    margin = (z[0] - z[1])[:, :2] @ np.array([1.0, -1.0])
    z[:, margin < 0] = z[::-1, margin < 0]
    rows = z.reshape(2 * num, D_SAE)
    x = rows @ dictionary()
    prompts = np.array([f"p{n // 3}" for n in range(num)])
    return Pairs(x=x, h=10 * x + 1, z=rows, prompts=prompts, chosen=np.arange(num), rejected=np.arange(num) + num)


def dictionary() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(D_SAE, D_IN)).astype(np.float32)


def test_subsets_are_whole_prompts_each_a_part_of_the_next():
    train = made(120, 0)
    sizes = sizes_of(120, 16)
    assert sizes == [16, 32, 64, 120]
    parts = subsets(train.prompts, sizes, seed=1)
    for size, part, more in zip(sizes, parts, [*parts[1:], parts[-1]], strict=True):
        assert size - 3 < len(part) <= size
        assert set(part) <= set(more)
        own = set(train.prompts[part])
        assert part.tolist() == [n for n, prompt in enumerate(train.prompts) if prompt in own]
    assert len(parts[-1]) == 120
    assert not np.array_equal(parts[0], subsets(train.prompts, sizes, seed=2)[0])
    assert len({train.prompts[n] for n in subsets(train.prompts, [1], seed=0)[0]}) == 3


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return curves(made(240, 0), made(150, 1), dictionary(), [24, 240], seeds=(0, 1))


def test_every_reader_learns_from_more_pairs(rows):
    assert [(row["pairs"], row["reader"]) for row in rows] == [(size, name) for size in (24, 240) for name in READERS]
    few, many = rows[: len(READERS)], rows[len(READERS) :]
    for a, b in zip(few, many, strict=True):
        assert (a["seeds"], b["seeds"]) == (2, 1)
        assert b["accuracy"] > max(0.6, a["accuracy"])
        assert a["lowest"] <= a["accuracy"] <= a["highest"]


def test_a_run_that_was_stopped_goes_on_behind_its_last_piece_and_reads_none_of_other_data(tmp_path, monkeypatch):
    train, heldout, path, made_now = made(60, 0), made(40, 1), tmp_path / "pieces.jsonl", []

    def reader(train, own, heldout, _, seed):
        made_now.append((len(own), seed))
        return heldout.difference("x", np.arange(len(heldout.prompts))).sum(axis=1)

    for name in READERS:
        monkeypatch.setitem(READERS, name, reader)
    whole = curves(train, heldout, dictionary(), [24, 60], (0, 1), Pieces(path, "a"))
    assert len(made_now) == 3 * len(READERS)
    lines = path.read_text().split("\n\n")
    path.write_text("\n\n".join(lines[:-2]) + "\n\n" + lines[-2][:20])
    made_now.clear()
    again = curves(train, heldout, dictionary(), [24, 60], (0, 1), Pieces(path, "a"))
    assert len(made_now) == 2
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in whole]
    made_now.clear()
    curves(train, heldout, dictionary(), [24, 60], (0, 1), Pieces(path, "a"))
    assert made_now == []
    curves(train, heldout, dictionary(), [24, 60], (0, 1), Pieces(path, "b"))
    assert len(made_now) == 3 * len(READERS)


def test_labels_of_held_out_pairs_change_no_reader():
    train, heldout = made(60, 0), made(40, 1)
    turned = heldout._replace(chosen=heldout.rejected, rejected=heldout.chosen)
    for reader in READERS.values():
        own = np.arange(60)
        margins = reader(train, own, heldout, dictionary(), 0)
        np.testing.assert_allclose(reader(train, own, turned, dictionary(), 0), -margins, rtol=1e-5, atol=1e-5)
