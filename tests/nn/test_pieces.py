"""How the entries of latents are dealt out in pieces: every entry once, no piece too large, in the entries' order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sarm.nn.bags import pieces_of


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 9))
def test_every_entry_is_in_one_piece_of_its_latent(latents: list[int], size: int) -> None:
    num_latents = 7
    sorted_N = torch.tensor(sorted(latents), dtype=torch.int64)
    found = pieces_of(sorted_N, num_latents, size)
    taken: dict[int, list[int]] = {}
    for start, stop, target in zip(*(part.tolist() for part in found[:3]), strict=True):
        assert stop - start <= size
        assert target < found.num_targets
        if target == found.num_targets - 1:
            assert start == stop, "what stands for nothing has no entries"
        else:
            assert target not in taken
            taken[target] = list(range(start, stop))
    of_latents = []
    for latent in range(num_latents):
        further = range(num_latents + int(found.more[latent]), num_latents + int(found.more[latent + 1]))
        of_latents.append([entry for target in (latent, *further) for entry in taken.pop(target)])
    assert not taken
    assert of_latents == [
        [n for n, own in enumerate(sorted(latents)) if own == latent] for latent in range(num_latents)
    ]
