"""The random encoder beside a pretrained SAE: treated alike where the rows shift, and at the head's start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.store.activation_stores import table_of, write_store

from sarm.contracts.folders import BASELINES
from sarm.data.formats.sae_folder import save_sae
from sarm.data.store.activations import ActivationStore
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae, dense, standardise
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RANDOM_ENCODERS, RewardSettings
from sarm.stages.plan import reward_settings
from sarm.stages.reward_models import build_model
from sarm.stages.variants import variants
from sarm.training.phase_shift import absorb_phase_shift_
from sarm.training.random_encoder import draw_directions_, match_, read_through_codes

D, S, K, ROWS = 64, 256, 8, 2000
MODEL = ModelSettings(name="tiny:llama", layer=1, max_length=128)


def text_and_chat(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two kinds, standardised; those of chats lie far from those of texts, all in one direction."""
    generator = torch.Generator().manual_seed(seed)
    text, chat = (torch.randn(ROWS, D, generator=generator) for _ in range(2))
    return standardise(text), standardise(chat + 3 * torch.randn(D, generator=generator))


@pytest.fixture(scope="module")
def chat_ends(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "chat", [table_of(text_and_chat()[1])])


def pretrained(architecture: str = "topk") -> Sae:
    """An SAE at the end of its first phase, whose shift was absorbed as its second began."""
    text, chat = text_and_chat()
    sae = build_sae(architecture, D, S, K)
    sae.initialise_(text, torch.Generator().manual_seed(1))
    absorb_phase_shift_(sae, text, chat)
    return sae


def alive(sae: Sae, rows: torch.Tensor) -> int:
    return int((dense(sae(rows), S) != 0).any(0).sum())


def drawn(sae: Sae) -> Sae:
    draw_directions_(sae, torch.Generator().manual_seed(2))
    return sae


def test_the_shift_is_absorbed_in_the_random_encoder_as_in_the_pretrained_one(chat_ends):
    chat = text_and_chat()[1]
    ours, loose, matched = pretrained(), drawn(pretrained()), drawn(pretrained())
    match_(matched, ActivationStore(chat_ends), absorb=True)
    shift = chat.mean(0) - ours.b_dec
    unit = shift / shift.norm()

    def seen(sae: Sae) -> float:
        """How much the latents see of the shift, without the one that is to carry it."""
        return float((unit @ sae.W_enc).abs().sort().values[:-1].detach().mean())

    assert seen(ours) < 1e-5
    assert seen(loose) > 0.05
    assert seen(matched) < 1e-3, "up to the rounding of 16-bit rows"
    assert alive(loose, chat) < 0.7 * alive(matched, chat), "the few that lie along the shift win at every chat end"
    assert abs(alive(matched, chat) - alive(ours, chat)) < 0.2 * alive(ours, chat)


def test_a_dictionary_of_one_phase_had_no_shift_to_absorb(chat_ends):
    loose, matched = drawn(pretrained()), drawn(pretrained())
    match_(matched, ActivationStore(chat_ends), absorb=False)
    assert torch.equal(loose.W_enc, matched.W_enc)


def test_thresholds_let_as_many_latents_through_as_the_pretrained_ones(chat_ends):
    matched = drawn(pretrained("batch_topk"))
    match_(matched, ActivationStore(chat_ends), absorb=True)
    assert float((matched(text_and_chat()[1]).values != 0).sum(1).float().mean()) == pytest.approx(K, rel=0.1)


def as_codes(sae: Sae, x: torch.Tensor) -> np.ndarray:
    return dense(sae(x), S).double().detach().numpy()


def low_rank(seed: int) -> torch.Tensor:
    """Rows that vary along twelve directions, more along the first, as activations do."""
    generator = torch.Generator().manual_seed(9)
    basis = torch.randn(12, D, generator=generator) * (0.7 ** torch.arange(12.0))[:, None]
    generator.manual_seed(seed)
    return standardise(
        torch.randn(ROWS, 12, generator=generator) @ basis + 0.1 * torch.randn(ROWS, D, generator=generator)
    )


def test_the_head_reads_the_probe_through_the_decoder_that_fits_its_codes_best():
    sae, x = drawn(pretrained()), low_rank(3)
    chosen, rejected, prompts = x[:600], x[600:1200], np.repeat(np.arange(200), 3).astype(str)
    w = torch.from_numpy(np.random.default_rng(0).normal(size=D).astype(np.float32))
    found = read_through_codes(sae, chosen.numpy(), rejected.numpy(), w, prompts, 0).double().numpy()
    z, difference = as_codes(sae, chosen) - as_codes(sae, rejected), (chosen - rejected).double().numpy()
    decoder, direction = sae.W_dec.double().detach().numpy(), w.double().numpy()
    wanted = difference @ direction
    scale = (z @ decoder @ direction) @ wanted / np.square(z @ decoder @ direction).sum()
    unit = np.square(z).sum() / (z != 0).any(0).sum()
    # Of some penalty, the decoder with the least |Z W - X|^2 + penalty |W - scale W_dec|^2, and the probe read through it.
    readings = [
        np.linalg.solve(z.T @ z + p * unit * np.eye(S), z.T @ difference + p * unit * scale * decoder) @ direction
        for p in (100.0, 10.0, 1.0, 0.1, 0.01)
    ]
    assert min(np.abs(found - reading).max() for reading in readings) < 1e-3 * np.abs(found).max()
    unseen = low_rank(4)
    right, codes = (unseen @ w).numpy(), as_codes(sae, unseen)
    assert np.corrcoef(codes @ found, right)[0, 1] > np.corrcoef(codes @ decoder @ direction, right)[0, 1] + 0.05


def test_where_there_is_nothing_to_fit_the_head_reads_through_the_decoder_that_is_there():
    sae, x = drawn(pretrained()), text_and_chat(3)[0]
    w = torch.ones(D)
    found = read_through_codes(sae, x[:20].numpy(), x[20:40].numpy(), w, np.arange(20).astype(str), 0)
    plain = (sae.W_dec @ w).detach()
    assert torch.nn.functional.cosine_similarity(found, plain, dim=0) > 0.9


def test_the_model_of_a_matched_encoder_needs_chat_ends_and_repeats(tiny_folder, tiny_chat, chat_ends, tmp_path):
    save_sae(pretrained(), tmp_path, {"activations": {"d_in": D, "model": "tiny:llama", "layer": 1}, "phases": ["text", "chat"]})  # fmt: skip
    reward = RewardSettings(encoder="random_matched")
    asked = MODEL, str(tiny_folder), tmp_path, tiny_chat, reward, 2
    with pytest.raises(UserError, match="needs the activations of chat ends"):
        build_model(*asked)
    first, again = (build_model(*asked, chat_ends) for _ in range(2))
    loose = build_model(*asked[:4], RewardSettings(encoder="random"), 2)
    assert torch.equal(first.sae.W_enc, again.sae.W_enc)
    changed = (first.sae.W_dec != loose.sae.W_dec).any(1)
    assert int(changed.sum()) == 1, (
        "one latent carries the shift; the others have the directions that the looser control has"
    )
    assert first.sae.W_enc.is_contiguous()


def test_a_folder_of_the_old_meaning_is_not_taken_for_the_new(tmp_path):
    """`random_encoder` used to be what `random_directions` is: its settings, which its folder is found by, must differ."""
    named = ("random_encoder", "random_directions")
    found = {one.folder: one for one in variants(MODEL, RewardSettings(baselines=named), tmp_path)}
    new, old = (reward_settings(MODEL, found[f"sarm_{name}"].reward, 0) for name in named)
    assert (new["encoder"], old["encoder"]) == ("random_matched", "random")
    assert {f"sarm_{name}" for name in RANDOM_ENCODERS} <= set(BASELINES)
