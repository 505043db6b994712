"""Classifiers with a dictionary: rewards and codes against the library's own model, gradients and patching against float64 brute force."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.passes.attached import D_SAE, LAYER, attached_model, save_random_sae, write_pairs
from tests.passes.foreign_checkpoints import COMPLETIONS, LAYOUTS, PROMPT, body_of, checkpoint, expected, head_of
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sarm.data.formats.attached_folder import load_attached
from sarm.data.formats.feature_edit import FeatureEdit, save_edit
from sarm.data.formats.sae_folder import load_sae
from sarm.data.formats.sarm_folder import read_latents
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.packing import answer_row, answer_rows
from sarm.nn.sae import Sae
from sarm.nn.splice import LatentEdit, Splice
from sarm.passes.attached_model import AttachedReader, model_reader
from sarm.passes.edited_rewards import conversations
from sarm.passes.models import BESIDE, find_model, hash_of_folder, sarm_settings
from sarm.passes.reward_gradients import Conversations, effects
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae
from sarm.stages.convert_sae import convert_sae


@pytest.fixture(scope="module", params=[("transformers", True), ("transformers", False), ("qwen_math", True)], ids=str)
def attached(request, tiny_folder, tmp_path_factory) -> tuple[Path, str]:
    name, standardises = request.param
    return attached_model(tmp_path_factory.mktemp("attached"), tiny_folder, name, standardises=standardises), name


def _norm(module: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


class Exact:
    """The library's language model in float64 with the layout's head: rewards of token ids, with anything done to the stream after block 1."""

    def __init__(self, tiny_folder: Path, name: str, sae: Sae):
        self.model = LlamaModel(LlamaConfig.from_pretrained(tiny_folder)).eval()
        self.model.load_state_dict(body_of(tiny_folder))
        self.model.double()
        for module in self.model.modules():
            if isinstance(module, LlamaRMSNorm):
                # The library's norm rounds to float32, whatever it is given.
                module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]
        self.head = {key: one.double() for key, one in head_of(LAYOUTS[name]).items()}
        self.layout, self.sae = LAYOUTS[name], sae
        self.W_enc, self.W_dec = sae.W_enc.detach().double(), sae.W_dec.detach().double()

    def stream(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][0]

    def codes(self, h_LD: torch.Tensor) -> torch.Tensor:
        """Dense [L, S] by the definition: the K largest of (x - b_dec) W_enc + b_enc, without negative ones."""
        x_LD = (h_LD - h_LD.mean(-1, keepdim=True)) / self.unit(h_LD) if self.sae.standardises else h_LD
        pre_LS = (x_LD - self.sae.b_dec.detach().double()) @ self.W_enc + self.sae.b_enc.detach().double()
        kept = pre_LS.topk(self.sae.k, dim=-1)
        return torch.zeros_like(pre_LS).scatter(-1, kept.indices, kept.values.clamp_min(0))

    def unit(self, h_LD: torch.Tensor) -> torch.Tensor:
        return h_LD.std(-1, keepdim=True) + 1e-6 if self.sae.standardises else torch.ones_like(h_LD[:, :1])

    def reward(self, ids: list[int], change_LD: torch.Tensor | None = None) -> float:
        def add(_block: Any, _inputs: Any, output: Any) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            changed = hidden + (0 if change_LD is None else change_LD)
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        handle = self.model.layers[LAYER - 1].register_forward_hook(add)
        with torch.no_grad():
            hidden = self.model(torch.tensor([ids])).last_hidden_state[0]
        handle.remove()
        return float(self.layout.reward(self.head, hidden, ids))


def reader_of(folder: Path) -> AttachedReader:
    reader = model_reader(folder, 256)
    assert isinstance(reader, AttachedReader)
    return reader


def test_rewards_and_codes_are_those_of_the_classifier_and_the_definition(attached, tiny_folder):
    folder, name = attached
    reader, exact = reader_of(folder), Exact(tiny_folder, name, load_sae(folder.parent / "sae")[0])
    tokens = reader.chat.encode_responses(PROMPT, COMPLETIONS)
    columns = {n: [4, 9] for n in range(len(tokens))}
    readings = reader.read(answer_rows([(n, one.ids) for n, one in enumerate(tokens)], 512, columns), residuals=True)
    wanted = expected(tiny_folder, LAYOUTS[name], head_of(LAYOUTS[name]))
    for n, one in enumerate(tokens):
        assert readings[n].reward == pytest.approx(wanted[n], abs=1e-4)
        h_LD = exact.stream(one.ids)
        np.testing.assert_allclose(readings[n].residual.numpy(), h_LD[-1].numpy(), atol=1e-4)
        for key, column in ((n, -1), ((n, 4), 4), ((n, 9), 9)):
            z_S = exact.codes(h_LD)[column].numpy()
            found = np.zeros(D_SAE)
            found[readings[key].latents] = readings[key].values
            np.testing.assert_allclose(found, z_S, atol=1e-3)


@pytest.mark.parametrize("name", ["armo", "athene", "nemotron", "starling"])
def test_every_kind_of_head_gives_its_own_reward_through_the_dictionarys_reader(name, tiny_folder, tmp_path):
    folder = attached_model(tmp_path, tiny_folder, name)
    reader = reader_of(folder)
    tokens = reader.chat.encode_responses(PROMPT, COMPLETIONS)
    answers = [(n, one.ids) for n, one in enumerate(tokens)]
    wanted = expected(tiny_folder, LAYOUTS[name], head_of(LAYOUTS[name]))
    packed = reader.read(answer_rows(answers, 512))
    batch = conversations([answer_row(*one) for one in answers], reader.chat.pad_id, reader.opening, reader.model.device)  # fmt: skip
    alone = effects(reader.model, batch, []).reward.tolist()
    for n, reward in enumerate(wanted):
        assert packed[n].reward == pytest.approx(reward, abs=1e-4)
        assert alone[n] == pytest.approx(reward, abs=1e-4)


def test_the_linear_head_is_the_mean_slope_of_the_reward_by_each_latent(attached, tiny_folder):
    folder, name = attached
    reader, exact = reader_of(folder), Exact(tiny_folder, name, load_sae(folder.parent / "sae")[0])
    (weight_S,) = read_latents(folder, "score.weight")
    slopes: dict[int, list[float]] = {}
    texts = {(row["prompt_id"], row[side]): row["prompt"] for row in load_pairs(folder.parent / "pairs", "train").to_pylist() for side in ("chosen", "rejected")}  # fmt: skip
    step = 1e-5
    for (_, text), prompt in texts.items():
        (tokens,) = reader.chat.encode_responses(prompt, [text])
        h_LD = exact.stream(tokens.ids)
        z_S = exact.codes(h_LD)[-1]
        for latent in z_S.nonzero().flatten().tolist():
            change_LD = torch.zeros_like(h_LD)
            change_LD[-1] = step * exact.unit(h_LD)[-1] * exact.W_dec[latent]
            slope = (exact.reward(tokens.ids, change_LD) - exact.reward(tokens.ids, -change_LD)) / (2 * step)
            slopes.setdefault(latent, []).append(slope)
    wanted_S = np.array([np.mean(slopes.get(latent, [0.0])) for latent in range(D_SAE)])
    assert len(slopes) > 5
    np.testing.assert_allclose(weight_S, wanted_S, rtol=2e-3, atol=2e-4)


def spliced(reader: AttachedReader, latents: list[int], factor: float) -> Splice:
    return Splice(reader.model.sae, LAYER, [LatentEdit(latent, "scale", factor) for latent in latents])


@pytest.mark.parametrize("scope", ["all", "rewarded"])
def test_patching_is_the_classifier_run_again_and_linear_is_its_slope_there(attached, tiny_folder, scope):
    folder, name = attached
    reader, exact = reader_of(folder), Exact(tiny_folder, name, load_sae(folder.parent / "sae")[0])
    tokens = reader.chat.encode_responses(PROMPT, COMPLETIONS)
    batch = conversations([answer_row(n, one.ids) for n, one in enumerate(tokens)], reader.chat.pad_id, [], reader.model.device)  # fmt: skip
    places = batch.is_token if scope == "all" else batch.is_rewarded
    fires = sorted({int(latent) for one in tokens for latent in exact.codes(exact.stream(one.ids))[-1].nonzero().flatten()})  # fmt: skip
    sets = [(fires[:3], 0.0), (fires[2:6], 2.5), (fires, 1.0)]
    found = effects(reader.model, batch, [(spliced(reader, own, factor), places) for own, factor in sets])
    for n, one in enumerate(tokens):
        h_LD = exact.stream(one.ids)
        for e, (own, factor) in enumerate(sets):
            z_LS = exact.codes(h_LD)
            edited_LS = z_LS.clone()
            edited_LS[:, own] *= factor
            change_LD = exact.unit(h_LD) * ((edited_LS - z_LS) @ exact.W_dec)
            change_LD[: -1 if scope == "rewarded" else 0] = 0
            before, after = exact.reward(one.ids), exact.reward(one.ids, change_LD)
            assert float(found.patched[n, e]) == pytest.approx(after - before, abs=2e-4)
            step = 1e-5
            slope = (exact.reward(one.ids, step * change_LD) - exact.reward(one.ids, -step * change_LD)) / (2 * step)
            assert float(found.linear[n, e]) == pytest.approx(slope, abs=2e-4)
        assert float(found.patched[n, 2]) == 0.0
        assert float(found.linear[n, 2]) == 0.0
    assert float(found.patched[:, :2].abs().min()) > 1e-3


def test_a_classifier_that_has_changed_or_gone_is_refused(tiny_folder, tmp_path):
    folder = attached_model(tmp_path, tiny_folder)
    config = tmp_path / "classifier" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match=r"has changed since .* was made for it\. Attach the dictionary again"):
        model_reader(folder)
    (tmp_path / "classifier").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is not there"):
        model_reader(folder)
    with pytest.raises(UserError, match=r"is a dictionary of .*classifier, whose rewards are that model's own"):
        find_model(Benchmarking(model=str(folder), benchmarks=("pairs=x",)))
    assert sarm_settings(folder).rewarded_token == "last"
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"d_sae": 47}))
    with pytest.raises(UserError, match=r"is not of the shape that config.json says"):
        load_attached(folder)


@pytest.mark.parametrize(
    ("layout", "about", "flags", "said"),
    [
        ("objectives", {}, {}, "has 3 outputs"),
        ("transformers", {"model": "other/model"}, {}, "is of the model other/model, got --model"),
        ("transformers", {"layer": 3}, {}, "layer 3 is none of|64 wide and of layer 3"),
        ("transformers", {"d_in": 32}, {}, "is 32 wide and of layer 1, .* is 64 wide|width 32"),
        ("transformers", {}, {"layer": 2}, r"is of layer 1 .*, got --layer 2"),
        ("transformers", {}, {"model": "nobody:knows"}, "nobody:knows"),
        ("transformers", {}, {"model": "tiny:llama"}, "tiny:llama"),
    ],
)
def test_what_does_not_fit_a_classifier_is_refused_in_one_line(layout, about, flags, said, tiny_folder, tmp_path):
    checkpoint(tmp_path / "classifier", tiny_folder, LAYOUTS[layout])
    save_random_sae(tmp_path / "sae", str(about.pop("model", tmp_path / "classifier")), **about)
    pairs = write_pairs(tmp_path / "pairs")
    with pytest.raises(UserError, match=said) as error:
        convert_sae(ConvertSae(**{"source": tmp_path / "sae", "target": tmp_path / "out", "format": "attached", "model": str(tmp_path / "classifier"), "pairs": pairs} | flags))  # fmt: skip
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_attaching_needs_pairs_and_they_are_of_no_other_use(tmp_path):
    for fields in ({"format": "attached"}, {"pairs": tmp_path}):
        with pytest.raises(UserError, match="--pairs FOLDER and --format attached go together"):
            convert_sae(ConvertSae(source=tmp_path, target=tmp_path / "out", **fields))


def test_conversations_say_which_tokens_are_there():
    batch = Conversations(torch.zeros(2, 4, dtype=torch.long), torch.tensor([3, 1]))
    assert batch.is_token.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.is_rewarded.tolist() == [[False, False, False, True], [False, True, False, False]]


def test_a_classifier_whose_tokens_see_both_sides_is_refused(tiny_folder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 1}  # fmt: skip
    AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path / "bert")  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, tmp_path / "bert")
    save_random_sae(tmp_path / "sae", str(tmp_path / "bert"), d_in=32)
    asked = ConvertSae(source=tmp_path / "sae", target=tmp_path / "out", format="attached", model=str(tmp_path / "bert"), pairs=write_pairs(tmp_path / "pairs"))  # fmt: skip
    with pytest.raises(UserError, match=r"is no causal language model with a head, so no layer of it can be read"):
        convert_sae(asked)
    assert not (tmp_path / "out").exists()


def test_a_dictionary_is_not_attached_to_a_model_that_is_read_with_an_edit(tiny_folder, tmp_path):
    """The edit has a part in the model's identity, and none in the linear head."""
    checkpoint(tmp_path / "classifier", tiny_folder, LAYOUTS["transformers"])
    save_random_sae(tmp_path / "sae", str(tmp_path / "classifier"))
    edit = tmp_path / "classifier" / BESIDE
    edit.mkdir()
    splice = Splice(load_sae(tmp_path / "sae")[0], LAYER, [LatentEdit(3)])
    save_edit(FeatureEdit((splice,), "all", hash_of_folder(tmp_path / "classifier"), ("0",)), edit)
    asked = ConvertSae(source=tmp_path / "sae", target=tmp_path / "out", format="attached", model=str(tmp_path / "classifier"), pairs=write_pairs(tmp_path / "pairs"))  # fmt: skip
    with pytest.raises(UserError, match=r"is read with the edit in .*feature_edit already.*Move the edit away"):
        convert_sae(asked)
    assert not (tmp_path / "out").exists()


def test_an_edit_of_some_tokens_is_refused_where_answers_share_their_prompt(tiny_folder, tmp_path):
    folder = attached_model(tmp_path, tiny_folder)
    splice = Splice(load_sae(tmp_path / "sae")[0], LAYER, [LatentEdit(3)])
    edit = tmp_path / "edit"
    edit.mkdir()
    save_edit(FeatureEdit((splice,), "answer", hash_of_folder(tmp_path / "classifier"), ("0",)), edit)
    with pytest.raises(UserError, match=r"classifier is edited at all tokens here.*Make it with --debias.positions all"):  # fmt: skip
        model_reader(folder, edit=edit)
