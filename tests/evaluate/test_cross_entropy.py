"""Cross-entropy recovered, against the model's own loss and against SAEs whose answer is known."""

import math

import pytest
import torch

from sarm.evaluate.cross_entropy import cross_entropies, reconstructed
from sarm.nn.backbone import residual_stream
from sarm.nn.pretrained import load_backbone, load_language_model
from sarm.nn.topk import TopKSae

TEXTS = [[5, 9, 14, 23, 8, 8, 3], [7], [31, 2, 2, 40]]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_language_model(str(tiny_folder), 1).eval()


def sae_of(encoder: torch.Tensor) -> TopKSae:
    """z = relu of +-(W x): every direction and its opposite, so that nothing is lost where W is the identity."""
    d_in = len(encoder)
    sae = TopKSae(d_in, 2 * d_in, 2 * d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([encoder, -encoder], 1))
        sae.W_dec.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]))
    return sae


def test_an_sae_that_loses_nothing_recovers_all(model):
    found = cross_entropies(model, 1, sae_of(torch.eye(model.config.hidden_size)), TEXTS)
    assert found.spliced == pytest.approx(found.clean, abs=1e-5)
    assert found.recovered() == pytest.approx(1, abs=1e-3)
    assert found.num_tokens == 6 + 3, "a text of one token predicts nothing"


def test_the_clean_value_is_the_models_own_loss(model):
    found = cross_entropies(model, 1, sae_of(torch.eye(model.config.hidden_size)), TEXTS)
    losses = [
        float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1)
        for ids in TEXTS
        if len(ids) > 1
    ]
    assert found.clean == pytest.approx(sum(losses) / 9, abs=1e-5)


def test_an_sae_that_gives_the_mean_alone_changes_the_prediction_and_the_model_is_left_as_it_was(model):
    before = model(input_ids=torch.tensor([TEXTS[0]])).logits
    sae = sae_of(torch.zeros(model.config.hidden_size, model.config.hidden_size))
    found = cross_entropies(model, 1, sae, TEXTS)
    assert abs(found.spliced - found.clean) > 1e-4
    assert torch.equal(model(input_ids=torch.tensor([TEXTS[0]])).logits, before)


def test_the_stream_gets_its_own_mean_and_scale_back():
    h = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 7 + 30
    torch.testing.assert_close(reconstructed(sae_of(torch.eye(8)), h), h, rtol=1e-5, atol=1e-4)
    raw, mean = sae_of(torch.eye(8)), sae_of(torch.zeros(8, 8))
    raw.standardises = mean.standardises = False
    torch.testing.assert_close(reconstructed(raw, h), h, rtol=1e-6, atol=1e-5)
    assert reconstructed(mean, h).count_nonzero() == 0, "of an SAE of activations as they are nothing is put back"
    half = reconstructed(sae_of(torch.eye(8)), h.bfloat16())
    assert half.dtype == torch.bfloat16


def test_a_stream_of_zeros_leaves_every_token_as_likely(model):
    """Blocks and head of this family have no biases, so 0 stays 0."""
    for layer in (1, 2):
        found = cross_entropies(model, layer, sae_of(torch.eye(model.config.hidden_size)), TEXTS)
        assert found.zero == pytest.approx(math.log(model.config.vocab_size), abs=1e-5)


def test_the_stream_that_is_replaced_is_that_behind_the_block(model, tiny_folder):
    """Behind the last block by hand: mean of the raw stream, final norm, head."""
    ids = torch.tensor([TEXTS[0]])
    positions = torch.arange(ids.shape[1])[None]
    backbone = load_backbone(str(tiny_folder), 2).eval()
    mean_only = sae_of(torch.zeros(model.config.hidden_size, model.config.hidden_size))
    with torch.no_grad():
        h = residual_stream(backbone, ids, positions, torch.zeros_like(ids))
        logits = model.lm_head(model.model.norm(h.mean(-1, keepdim=True).expand_as(h)))
    wanted = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert cross_entropies(model, 2, mean_only, TEXTS[:1]).spliced == pytest.approx(wanted, abs=1e-5)
    assert cross_entropies(model, 1, mean_only, TEXTS[:1]).spliced != pytest.approx(wanted, abs=1e-5)


def test_texts_without_a_prediction_are_refused(model):
    with pytest.raises(ValueError, match="needs a text of two tokens or more"):
        cross_entropies(model, 1, sae_of(torch.eye(model.config.hidden_size)), [[1]])
