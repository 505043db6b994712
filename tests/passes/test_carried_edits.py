"""Edits of features that a model carries: saved among its weights, read by everything that reads the model, with this package and without it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.nn.every_sae import KINDS
from tests.passes.foreign_checkpoints import COMPLETIONS, PROMPT
from tests.passes.test_feature_edits import D_SAE, EDITS, K, random_sae, saved, scores
from transformers import AutoTokenizer

import sarm
from sarm.data.formats.feature_edit import FeatureEdit, load_edit
from sarm.data.formats.sarm_folder import carry_edit_, load_sarm, save_sarm
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.splice import LatentEdit, Splice, edited
from sarm.passes.models import BESIDE, hash_of_folder
from sarm.report.render import TEMPLATES
from sarm.serve.loading import load_service
from sarm.settings.card import CardPage
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSarm
from sarm.settings.push import Push
from sarm.settings.serving import Serving
from sarm.stages.convert_sarm import convert_sarm
from sarm.stages.push import push
from sarm.stages.serving import try_card

CONVERSATIONS = [[*PROMPT, {"role": "assistant", "content": text}] for text in COMPLETIONS]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tiny_chat: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SARM with random weights on two blocks."""
    backbone = load_backbone(str(tiny_folder), 2)
    about = {"max_length": 128, "template": tiny_chat.template_hash, "tokenizer": tiny_chat.tokenizer_hash}
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=D_SAE, k=K, end_of_turn_id=tiny_chat.end_of_turn_id, provenance=about)  # fmt: skip
    model = SarmForSequenceClassification(config, backbone, random_sae(seed=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    made = tmp_path_factory.mktemp("carried") / "sarm"
    save_sarm(model, tiny_chat, made)
    return made


@pytest.fixture(scope="module")
def edit(folder: Path) -> Path:
    """An edit of both its blocks, by SAEs of two kinds."""
    splices = Splice(random_sae(), 1, EDITS), Splice(random_sae("jumprelu", seed=4), 2, EDITS[:2])
    return saved(folder.parent / "edit", folder, *splices)


@pytest.fixture(scope="module")
def carried(folder: Path, edit: Path) -> Path:
    """The model that was saved with the edit."""
    return sarm.load(folder).edit(features=edit).save(folder.parent / "carried")


def ids_of(folder: Path, text: str) -> torch.Tensor:
    turns = [*PROMPT, {"role": "assistant", "content": text}]
    said = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=True, return_dict=True)
    return torch.tensor([said["input_ids"]])


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    return torch.cat([model(input_ids=ids_of(folder, text)).logits for text in COMPLETIONS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_carried_edit_is_the_spliced_pass_to_the_bit_and_comes_back_from_a_file(kind, folder, tmp_path, tiny_chat):
    splice = Splice(random_sae(kind), 1, EDITS)
    model = load_sarm(folder)
    with edited(model.model, [splice]):
        expected = logits(model, folder)
    plain = logits(model, folder)
    carry_edit_(model, FeatureEdit((splice,), "all", "a", ("0" * 32,)))
    assert torch.equal(logits(model, folder), expected)
    assert not torch.equal(expected, plain)
    save_sarm(model, tiny_chat, tmp_path)
    again = load_sarm(tmp_path)
    assert torch.equal(logits(again, folder), expected)
    assert torch.equal(logits(SarmForSequenceClassification.from_pretrained(tmp_path), folder), expected)
    assert not any(tensor.requires_grad for tensor in again.feature_edits.parameters())
    rows = load_file(tmp_path / "model.safetensors").get("feature_edits.0.tensors.W_dec")
    assert rows is not None
    assert splice.sae.is_tied or len(rows) == len(EDITS), "decoder rows that nothing needs were written"


def test_an_edit_of_nothing_gives_the_plain_rewards_to_the_bit(folder, tmp_path, tiny_chat):
    plain = logits(load_sarm(folder), folder)
    for edits in ([], [LatentEdit(latent, "scale", 1.0) for latent in range(D_SAE)]):
        model = load_sarm(folder)
        carry_edit_(model, FeatureEdit((Splice(random_sae(), 1, edits),), "all", "a", ("0" * 32,)))
        save_sarm(model, tiny_chat, tmp_path / str(len(edits)))
        assert torch.equal(logits(load_sarm(tmp_path / str(len(edits))), folder), plain)


ALONE = """
import sys
sys.modules["sarm"] = None
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
for line in sys.stdin:
    with torch.no_grad():
        print("reward", repr(model(input_ids=torch.tensor([[int(i) for i in line.split()]])).logits.item()))
"""


def alone(folder: Path, cache: Path) -> list[float]:
    """Rewards by transformers, where this package is not there."""
    rows = "\n".join(" ".join(map(str, ids_of(folder, text)[0].tolist())) for text in COMPLETIONS)
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], input=rows, capture_output=True, text=True, check=False, cwd=cache, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("reward ")]


def test_an_exported_model_gives_without_this_package_what_evaluations_give_with_the_edit(folder, edit, carried, tmp_path):  # fmt: skip
    found = scores(folder, edit=edit, protocol="official")
    assert max(abs(a - b) for a, b in zip(found, scores(folder), strict=True)) > 1e-2
    assert alone(carried, tmp_path) == pytest.approx(found, abs=1e-6)
    assert scores(carried, protocol="official") == pytest.approx(found, abs=1e-6)
    assert scores(carried) == pytest.approx(scores(folder, edit=edit), abs=1e-6)


def test_a_loaded_model_is_edited_inside_and_the_one_before_stays_as_it_is(folder, edit, carried):
    plain = sarm.load(folder)
    before = plain.reward(CONVERSATIONS)
    inside = plain.edit(features=edit)
    assert inside.reward(CONVERSATIONS) == pytest.approx(scores(folder, edit=edit), abs=1e-6)
    assert plain.reward(CONVERSATIONS) == before
    assert inside._reader.model.model.layers[0].mlp.up_proj.weight is plain._reader.model.model.layers[0].mlp.up_proj.weight  # fmt: skip
    latent = inside.explain(CONVERSATIONS[0]).features[0].latent
    both, other = inside.edit({latent: 0.0}), plain.edit({latent: 0.0}).edit(features=edit)
    assert both.reward(CONVERSATIONS) == other.reward(CONVERSATIONS) != inside.reward(CONVERSATIONS)
    assert sarm.load(carried).edit({latent: 0.0}).reward(CONVERSATIONS) == pytest.approx(both.reward(CONVERSATIONS), abs=1e-6)  # fmt: skip
    with pytest.raises(UserError, match=r"is read with the edit in .* already"):
        inside.edit(features=edit)


@pytest.fixture(scope="module")
def served(folder: Path, edit: Path) -> Iterator[Any]:
    service = load_service(Serving(model=folder, edit=edit, threads=1))
    yield service
    service.close()


def test_the_server_scores_with_an_edit_and_says_that_it_is_another_model(folder, edit, carried, served):
    from starlette.testclient import TestClient

    from sarm.serve.app import make_app

    with TestClient(make_app(served)) as client:
        asked = {"items": [{"prompt": PROMPT, "completions": COMPLETIONS}], "scale": "raw"}
        answer = client.post("/v1/rewards", json=asked).json()
    given = [one["reward"] for one in answer["items"][0]["answers"]]
    assert given == pytest.approx(scores(folder, edit=edit), abs=1e-5)
    assert listed(served) == [{"layer": 1, "features": 3, "of": "server"}, {"layer": 2, "features": 2, "of": "server"}]
    other = load_service(Serving(model=carried, threads=1))
    other.close()
    assert listed(other) == [{**one, "of": "model"} for one in listed(served)]
    plain = load_service(Serving(model=folder, threads=1))
    plain.close()
    assert listed(plain) == []
    assert len({served.about.identity, other.about.identity, plain.about.identity}) == 3


def listed(service: Any) -> Any:
    """What its server says of the edits inside its model."""
    from starlette.testclient import TestClient

    from sarm.serve.app import make_app

    with TestClient(make_app(service)) as client:
        return client.get("/v1/models").json()["data"][0]["feature_edits"]


def test_the_page_to_try_a_model_with_an_edit_sums_the_edited_rewards_and_says_so(folder, edit, served, monkeypatch):
    from starlette.testclient import TestClient

    from sarm.serve.app import make_app

    started: list[Serving] = []
    monkeypatch.setattr("sarm.stages.serving.serve_until_ended", lambda settings, open_page: started.append(settings))
    try_card(CardPage(model=folder, edit=edit, browser=False))
    assert [(one.model, one.edit) for one in started] == [(folder, edit)]
    with TestClient(make_app(served)) as client:
        cards = [client.post("/v1/card", json={"messages": one}).json() for one in CONVERSATIONS]
        model = client.get("/v1/models").json()["data"][0]
    weights = [{one["id"]: one["weight"] for one in card["latents"]} for card in cards]
    sums = [sum(own[latent] * value for latent, value in card["codes"][-1]) for own, card in zip(weights, cards, strict=True)]  # fmt: skip
    assert sums == pytest.approx(scores(folder, edit=edit), abs=1e-4)
    assert sums == pytest.approx([card["reward"] for card in cards], abs=1e-4)
    if shutil.which("node") is None:
        pytest.skip("what the page says of its model needs node")
    said = [page_says(one) for one in (model, {**model, "feature_edits": []})]
    assert said[0] == f"The model is {model['id']}. It is edited: features are changed inside its blocks (3 at layer 1, 2 at layer 2), and all rewards here are of the edited model."  # fmt: skip
    assert said[1] == f"The model is {model['id']}."


def page_says(model: dict[str, Any]) -> str:
    script = Path(__file__).parents[1] / "serve" / "try_page_model.js"
    command = ["node", str(script), str(TEMPLATES / "try.js"), json.dumps(model)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_model_is_pushed_with_its_edit_and_its_card_says_so(folder, edit, tmp_path):
    push(Push(model=folder, edit=edit, to=tmp_path / "pushed"))
    assert scores(tmp_path / "pushed") == pytest.approx(scores(folder, edit=edit), abs=1e-6)
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "Features inside its blocks were edited after training (3 at layer 1, 2 at layer 2)" in card
    records = json.loads((tmp_path / "pushed" / "config.json").read_text())["feature_edits"]
    assert [one["layer"] for one in records] == [1, 2]
    assert {one["model"] for one in records} == {hash_of_folder(folder)}
    assert not (tmp_path / "pushed" / BESIDE).exists()


def test_an_edit_may_follow_on_a_model_that_carries_one(folder, edit, carried, tmp_path):
    more = Splice(random_sae(seed=11), 1, EDITS[:1])
    second = saved(tmp_path / "second", carried, more)
    model = load_sarm(folder)
    with edited(model.model, load_edit(edit).splices), edited(model.model, [more]):
        expected = logits(model, folder).flatten().tolist()
    both = sarm.load(carried).edit(features=second)
    assert both.reward(CONVERSATIONS) == pytest.approx(expected, abs=1e-4)
    assert sarm.load(both.save(tmp_path / "both")).reward(CONVERSATIONS) == pytest.approx(both.reward(CONVERSATIONS), abs=1e-6)  # fmt: skip


def test_edits_of_another_model_layer_width_or_of_some_tokens_are_refused_in_one_line(folder, carried, edit, tmp_path):
    model = sarm.load(folder)
    others = {
        "has 2 blocks": saved(tmp_path / "a", folder, Splice(random_sae(), 3, EDITS)),
        "takes activations of width 32": saved(tmp_path / "b", folder, Splice(random_sae(d_in=32), 1, EDITS)),
        "was made for the model": saved(tmp_path / "c", carried, Splice(random_sae(), 1, EDITS)),
        "is of the answer tokens": saved(tmp_path / "d", folder, Splice(random_sae(), 1, EDITS), positions="answer"),
    }
    for said, other in others.items():
        for refuse in (
            lambda other=other: model.edit(features=other),
            lambda other=other: load_service(Serving(model=folder, edit=other)),
            lambda other=other: try_card(CardPage(model=folder, edit=other)),
            lambda other=other: push(Push(model=folder, edit=other, to=tmp_path / "to")),
        ):
            with pytest.raises(UserError, match=said) as error:
                refuse()
            assert "\n" not in str(error.value)
    assert not (tmp_path / "to").exists()
    with pytest.raises(UserError, match="was made for the model"):
        sarm.load(carried).edit(features=edit)
    plain = load_sarm(folder)
    with pytest.raises(UserError, match="is edited at all tokens"):
        carry_edit_(plain, load_edit(others["is of the answer tokens"]))


@pytest.mark.parametrize("how", ["vllm", "papers"])
def test_layouts_that_have_no_words_for_edits_are_refused(how, carried, tmp_path):
    with pytest.raises(UserError, match="carries edits of features"):
        convert_sarm(ConvertSarm(source=carried, target=tmp_path / how, format=how))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": 3}, "has 2 blocks"),
        ({"sae": None}, "describe no edit of features"),
        ({"edits": [{"latent": 0, "kind": "bend", "value": 0.0}]}, "an edit must be one of"),
    ],
)
def test_a_config_whose_records_describe_no_edit_of_the_model_is_refused(change, said, carried, tmp_path):
    broken = Path(shutil.copytree(carried, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["feature_edits"][0] |= change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as error:
        load_sarm(broken)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        SarmForSequenceClassification.from_pretrained(broken)
