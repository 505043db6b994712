"""Edit folders: written, read back, applied by the common loader of scorers, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nn.every_sae import KINDS, kind_of
from tests.passes.foreign_checkpoints import COMPLETIONS, D_IN, LAYOUTS, PROMPT, body_of, checkpoint
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from sarm.data.formats.feature_edit import EDIT, ROWS, FeatureEdit, load_edit, save_edit
from sarm.data.formats.sarm_folder import save_sarm
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.sae import Sae
from sarm.nn.splice import LatentEdit, Splice, edited
from sarm.nn.thresholds import ThresholdSae
from sarm.passes.models import BESIDE, find_model, hash_of_folder, score_key
from sarm.passes.reader import sarm_reader
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError

D_SAE, K = 96, 12
EDITS = [LatentEdit(5), LatentEdit(40, "scale", 3.0), LatentEdit(71, "clamp", 2.0)]


def random_sae(kind: str = "topk", d_in: int = D_IN, seed: int = 3) -> Sae:
    sae = build_sae(d_in=d_in, d_sae=D_SAE, k=K, **kind_of(kind))
    generator = torch.Generator().manual_seed(seed)
    sae.initialise_(torch.randn(300, d_in, generator=generator), generator)
    if isinstance(sae, ThresholdSae):
        with torch.no_grad():
            sae.threshold.copy_(0.2 + 0.5 * torch.rand(D_SAE, generator=generator))
    return sae


def saved(folder: Path, model: Path, *splices: Splice, positions: Any = "all", **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": hash_of_folder(model), "origins": ("0" * 32,) * len(splices), **fields}
    save_edit(FeatureEdit(splices=splices, positions=positions, **about), folder)
    return folder


def scores(model: Path, **flags: Any) -> list[float]:
    spec = find_model(Benchmarking(model=str(model), benchmarks=("pairs=x",), **flags))
    (found,), _ = load_scorer(spec, 256)([Request(PROMPT, COMPLETIONS, alone=False)])
    return [one.score for one in found]


def refusal(model: Path, **flags: Any) -> str:
    with pytest.raises(UserError) as error:
        scores(model, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def classifier(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scalar-head reward model of others."""
    folder = tmp_path_factory.mktemp("classifier")
    checkpoint(folder, tiny_folder, LAYOUTS["transformers"])
    return folder


@torch.no_grad()
def expected(tiny_folder: Path, classifier: Path, splices: list[Splice], positions: str = "all") -> list[float]:
    """The rewards from one row each through the library's model, whose blocks are edited here."""
    model = LlamaModel(LlamaConfig.from_pretrained(tiny_folder)).eval()
    model.load_state_dict(body_of(tiny_folder))
    head = load_file(classifier / "model.safetensors")["score.weight"]
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    found = []
    for text in COMPLETIONS:
        turns = [*PROMPT, {"role": "assistant", "content": text}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]])
        opened = tokenizer.apply_chat_template(PROMPT, tokenize=True, return_dict=True, add_generation_prompt=True)
        places = torch.ones_like(ids, dtype=torch.bool)
        places[:, : {"all": 0, "rewarded": ids.shape[1] - 1, "answer": len(opened["input_ids"])}[positions]] = False
        with edited(model, splices, places):
            found.append(float(head @ model(ids).last_hidden_state[0, -1]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_s_folder_does_what_was_saved(kind, classifier, tmp_path):
    h = 5 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0))
    first, second = Splice(random_sae(kind), 1, EDITS), Splice(random_sae(kind, seed=4), 2, EDITS[:1])
    again = load_edit(saved(tmp_path, classifier, first, second, positions="answer"))
    assert again.positions == "answer"
    for before, after in zip((first, second), again.splices, strict=True):
        assert (after.layer, after.edits) == (before.layer, before.edits)
        assert torch.equal(after.change(h), before.change(h))
        assert before.change(h).abs().max() > 0.1
    rows = load_file(tmp_path / ROWS)
    if "1.W_dec" in rows and not first.sae.is_tied:
        assert rows["1.W_dec"].shape == (len(EDITS), D_IN), "decoder rows that nothing needs were written"


@pytest.mark.parametrize("positions", ["all", "answer", "rewarded"])
def test_a_reward_model_of_others_is_scored_with_its_edit(positions, tiny_folder, classifier, tmp_path):
    splices = [Splice(random_sae(), 1, EDITS), Splice(random_sae("jumprelu"), 2, EDITS[:2])]
    edit = saved(tmp_path, classifier, *splices, positions=positions)
    found = scores(classifier, edit=edit)
    assert found == pytest.approx(expected(tiny_folder, classifier, splices, positions), abs=1e-4)
    plain = scores(classifier)
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 1e-2


def test_an_edit_of_nothing_gives_the_plain_scores_to_the_bit(classifier, tmp_path):
    ones = [LatentEdit(latent, "scale", 1.0) for latent in range(D_SAE)]
    for name, edits in (("none", []), ("ones", ones)):
        edit = saved(tmp_path / name, classifier, Splice(random_sae(), 1, edits))
        assert scores(classifier, edit=edit) == scores(classifier)


def test_the_folder_beside_the_weights_is_applied_and_has_scores_of_its_own(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    plain, settings = scores(tmp_path), Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",))
    key = score_key(find_model(settings))
    edit = saved(tmp_path / BESIDE, tmp_path, Splice(random_sae(), 1, EDITS))
    assert scores(tmp_path) != plain
    assert score_key(find_model(settings)) != key
    assert scores(tmp_path) == scores(tmp_path, edit=edit)


@pytest.fixture(scope="module")
def sarm(tiny_folder: Path, tiny_chat: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SARM with random weights on two blocks."""
    backbone = load_backbone(str(tiny_folder), 2)
    about = {"max_length": 128, "template": tiny_chat.template_hash, "tokenizer": tiny_chat.tokenizer_hash}
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=D_SAE, k=K, end_of_turn_id=tiny_chat.end_of_turn_id, provenance=about)  # fmt: skip
    model = SarmForSequenceClassification(config, backbone, random_sae(seed=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("sarm")
    save_sarm(model, tiny_chat, folder)
    return folder


def test_a_sarm_is_read_with_its_edit_by_scorers_and_by_what_reads_its_latents(sarm, tmp_path):
    edit = saved(tmp_path, sarm, Splice(random_sae(), 1, EDITS))
    plain, found = scores(sarm), scores(sarm, edit=edit)
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 1e-2
    # One row a completion, by the official code's tokens, which are the same here.
    assert scores(sarm, edit=edit, protocol="official") == pytest.approx(found, abs=1e-4)
    model = sarm_reader(sarm, edit=edit).model
    tokenizer = AutoTokenizer.from_pretrained(sarm)
    turns = [*PROMPT, {"role": "assistant", "content": COMPLETIONS[0]}]
    ids = torch.tensor([tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]])
    assert float(model(input_ids=ids).logits) == pytest.approx(found[0], abs=1e-4)


def test_edits_that_do_not_fit_are_refused_in_one_line(classifier, sarm, tiny_folder, tmp_path):
    one = Splice(random_sae(), 1, EDITS)
    assert "was made for the model" in refusal(sarm, edit=saved(tmp_path / "a", classifier, one))
    assert "has 2 blocks" in refusal(classifier, edit=saved(tmp_path / "b", classifier, Splice(random_sae(), 3, EDITS)))
    narrow = Splice(random_sae(d_in=32), 1, EDITS)
    assert "takes activations of width 32" in refusal(classifier, edit=saved(tmp_path / "c", classifier, narrow))
    assert "is edited at all tokens here, as answers share their prompt" in refusal(
        sarm, edit=saved(tmp_path / "d", sarm, one, positions="answer")
    )
    assert "is no feature edit" in refusal(classifier, edit=tiny_folder)
    script = tmp_path / "scorer.py"
    script.write_text("def score(conversations):\n    return [0.0 for _ in conversations]\n")
    with pytest.raises(UserError, match="has no layers to edit"):
        find_model(Benchmarking(model=f"{script}:score", benchmarks=("pairs=x",), edit=tmp_path / "a"))


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ({"schema": "feature_edit/v0"}, "its schema is feature_edit/v0"),
        ({"positions": "some"}, "its positions are 'some'"),
        ({"latent": D_SAE}, f"latent {D_SAE} is none"),
        ({"kind": "boost"}, "must be one of"),
        ({"d_sae": D_SAE + 1}, "expected"),
        ({"nan": True}, "NaN or infinite values"),
        ({"lacks": True}, "there is nothing for b_enc"),
    ],
)
def test_a_torn_or_foreign_edit_is_refused_in_one_line(breaks, said, classifier, tmp_path):
    folder = saved(tmp_path, classifier, Splice(random_sae(), 1, EDITS))
    content, rows = json.loads((folder / EDIT).read_text()), load_file(folder / ROWS)
    layer = content["layers"][0]
    content |= {name: breaks[name] for name in ("schema", "positions") if name in breaks}
    layer["edits"][0] |= {name: breaks[name] for name in ("latent", "kind") if name in breaks}
    layer["sae"] |= {name: breaks[name] for name in ("d_sae",) if name in breaks}
    if "nan" in breaks:
        rows["1.W_dec"][0, 0] = float("nan")
    if "lacks" in breaks:
        del rows["1.b_enc"]
    (folder / EDIT).write_text(json.dumps(content))
    save_file(rows, folder / ROWS)
    found = refusal(classifier, edit=folder)
    assert said in found
    assert str(folder) in found
