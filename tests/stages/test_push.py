"""A pushed SARM: back with the same rewards, by this package and by transformers alone, and a card that says what it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests.stages.random_sarm import random_sarm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sarm
from sarm.contracts.manifest import sha256_of
from sarm.data.tokens.chat import ChatTokenizer
from sarm.report.model_card import Made, model_card
from sarm.settings.checks import UserError
from sarm.settings.push import Push
from sarm.stages import push as pushing
from sarm.stages.push import CARD, push

CONVERSATION = [{"role": "user", "content": "how does a garden grow"}, {"role": "assistant", "content": "Slowly, at first."}]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tiny_chat: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the model, and the manifests and the report beside it as stages write them."""
    run = tmp_path_factory.mktemp("run")
    random_sarm(run / "sarm", tiny_folder, tiny_chat)

    def write(name: str, inputs: dict[str, str], **content: object) -> None:
        (run / name).mkdir(parents=True, exist_ok=True)
        made_from = {key: sha256_of(run / folder / "manifest.json") for key, folder in inputs.items()}
        (run / name / "manifest.json").write_text(json.dumps({"inputs": made_from, **content}))

    write("pairs", {}, config={"pairs": ["hf:owner/prefs", "/home/ada/secret/own.jsonl"]})
    write("corpus", {}, config={"texts": ["demo:wikipedia"]})
    write("activations/text", {"corpus/v1": "corpus"})
    write("sae", {"activations/text": "activations/text"})
    write("sarm", {"pairs/v1": "pairs", "sae/v1": "sae"}, counts={"figures": {"num_pairs": 1223}})
    write("evaluation", {"sarm/v1": "sarm"})
    rows = [{"name": "SARM", "accuracy": 0.858, "ci95": [0.721, 0.934]}, {"name": "random", "accuracy": 0.5, "ci95": None}]  # fmt: skip
    (run / "report.json").write_text(json.dumps({"accuracies": rows, "num_heldout_pairs": 298}))
    return run


@pytest.fixture(scope="module")
def pushed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (trained / "sarm" / "manifest.json").rename(trained / "kept.json")
    # No stage made it, so that its manifest lists no files: it is there for the card alone.
    patch = pytest.MonkeyPatch()
    patch.setattr(pushing, "sarm_spec", lambda folder: sarm_spec_without(folder, trained))
    shutil.copy(trained / "kept.json", trained / "sarm" / "manifest.json")
    folder = tmp_path_factory.mktemp("pushed") / "my-sarm"
    assert push(Push(model=trained / "sarm", to=folder, licence="apache-2.0")) == folder
    patch.undo()
    return folder


def sarm_spec_without(folder: Path, run: Path):
    from sarm.passes.models import sarm_spec

    (folder / "manifest.json").unlink()
    try:
        return sarm_spec(folder)
    finally:
        shutil.copy(run / "kept.json", folder / "manifest.json")


@pytest.fixture(scope="module")
def reward(trained: Path, tiny_chat: ChatTokenizer) -> float:
    from sarm.data.formats.sarm_folder import load_sarm

    (tokens,) = tiny_chat.encode([CONVERSATION])
    with torch.no_grad():
        return load_sarm(trained / "sarm")(input_ids=torch.tensor([tokens.ids])).logits.item()


def test_what_was_pushed_comes_back_with_the_same_rewards(pushed: Path, reward: float) -> None:
    assert sarm.load(pushed).reward([CONVERSATION]) == pytest.approx([reward], abs=1e-5)
    assert not {"manifest.json", "edit.json"} & {path.name for path in pushed.iterdir()}


PIPELINE = """
import sys
sys.modules["sarm"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, again = sys.argv[1:]
conversation = eval(sys.stdin.read())
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
text = tokenizer.apply_chat_template(conversation, tokenize=False)
(row,) = pipeline("text-classification", model=model, tokenizer=tokenizer)(text, add_special_tokens=False)
print(row["label"], repr(row["score"]))
# A pipeline that loads it itself, by name.
own = pipeline("text-classification", model=folder, trust_remote_code=True)
(row,) = own(text, add_special_tokens=False)
print(row["label"], repr(row["score"]))
# Padded rows whose mask got lost.
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
padded = torch.cat([ids, torch.full((1, 7), tokenizer.pad_token_id)], 1)
with torch.no_grad():
    print("padded", repr(model(input_ids=padded).logits.item()))
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""


def alone(folder: Path, again: Path, cache: Path) -> list[tuple[str, float]]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PIPELINE, str(folder), str(again)], input=repr(CONVERSATION), capture_output=True, text=True, check=False, cwd=cache, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "custom code" not in done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("reward ", "padded "))]
    return [(label, float(value)) for label, value in lines]


def test_transformers_alone_gives_raw_rewards_and_what_it_saves_again_loads_again(
    pushed: Path, reward: float, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    expected = [("reward", pytest.approx(reward, abs=1e-4))] * 2 + [("padded", pytest.approx(reward, abs=1e-4))]
    assert alone(pushed, tmp_path / "again", first) == expected
    # Saved by the code in the folder, which goes along; nothing is lost on the way, however often.
    assert alone(tmp_path / "again", tmp_path / "third", second) == expected


def test_a_model_that_this_package_loads_by_transformers_is_saved_again_without_loss(
    pushed: Path, reward: float, tmp_path: Path
) -> None:
    import sarm.nn.modeling_sarm  # noqa: F401  registers the model type

    AutoModelForSequenceClassification.from_pretrained(pushed).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(pushed).save_pretrained(tmp_path / "again")
    assert alone(tmp_path / "again", tmp_path / "third", tmp_path)[0] == ("reward", pytest.approx(reward, abs=1e-4))


def test_the_card_says_method_data_figures_with_intervals_template_licence_and_what_it_is_not_for(
    pushed: Path, tiny_chat: ChatTokenizer
) -> None:
    _, head, body = (pushed / CARD).read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["datasets"] == ["owner/prefs"]
    assert body.startswith("\n# my\\-sarm") or body.startswith("\n# my-sarm")
    for text in ("1,223 training pairs", "298 held-out pairs", "85.8 %", "72.1 % to 93.4 %", tiny_chat.template_hash, "96 latents", "Not to be used for", "own.jsonl", "wikipedia", 'load("my-sarm")'):  # fmt: skip
        assert text in body.replace("\\", ""), text
    assert "/home/ada" not in body


def test_figures_of_another_model_are_left_out_and_an_edited_one_says_so(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert len(pushing.made_of(run / "sarm").accuracies) == 2
    assert pushing.made_of(run / "sarm").texts == ["demo:wikipedia"]
    # A model that lies in the run and was made elsewhere, as a converted one.
    (run / "sarm" / "manifest.json").write_text("{}")
    other = pushing.made_of(run / "sarm")
    assert (other.accuracies, other.pairs, other.texts, other.num_pairs) == ([], [], [], None)
    edited = run / "edited"
    edited.mkdir()
    shutil.copy(run / "sarm" / "config.json", edited)
    (edited / "edit.json").write_text(json.dumps({"source": str(trained / "sarm"), "weights": [{}, {}]}))
    made = pushing.made_of(edited)
    assert (made.edited, made.num_pairs, len(made.accuracies)) == (2, 1223, 2)
    assert "2 weights of the head were edited" in model_card(made, "edited", "", "0")


def test_a_card_of_a_model_of_which_nothing_is_known_says_so() -> None:
    card = model_card(Made(config={"layer": 3, "d_sae": 8, "k": 2}), "<b>hostile</b>|", "", "0")
    for text in ("are not known", "not evaluated", "licence", "not stated"):
        assert text in card
    assert "<b>" not in card.replace('load("<b>', "").split("## How")[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "one place to push to"),
        ({"to": Path("a"), "hub": "a/b", "licence": "mit"}, "one place to push to"),
        ({"hub": "a/b"}, "needs a licence"),
        ({"hub": "no slash", "licence": "mit"}, "owner/name"),
        ({"to": Path("a"), "licence": "MIT licence"}, "name of the hub's"),
    ],
)
def test_what_cannot_be_pushed_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Push(model=Path("m"), **fields)


def test_a_folder_of_something_else_is_left_alone(pushed: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        push(Push(model=pushed, to=tmp_path))
    with pytest.raises(UserError, match="model itself"):
        push(Push(model=pushed, to=pushed))
    with pytest.raises(UserError, match="no model folder"):
        push(Push(model=tmp_path / "none", to=tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    # One that this command wrote may be written again.
    again = Path(shutil.copytree(pushed, tmp_path / "again"))
    push(Push(model=pushed, to=again))


def test_a_push_that_was_interrupted_can_be_done_again_and_one_that_cannot_read_leaves_the_one_before(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pushed"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pushing, "save_sarm", dies)
        with pytest.raises(KeyboardInterrupt):
            push(Push(model=pushed, to=target))
    assert not (target / CARD).exists()
    push(Push(model=pushed, to=target))
    weights = sha256_of(target / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(pushing, "load_sarm", dies)
        with pytest.raises(KeyboardInterrupt):
            push(Push(model=pushed, to=target))
    assert sha256_of(target / "model.safetensors") == weights
    assert sha256_of(pushed / "config.json") == sha256_of(target / "config.json")


def test_where_the_base_model_lay_on_this_machine_is_told_to_nobody(pushed: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(pushed, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    for base, told in (("/home/ada/secret/smol", "smol"), (str(tmp_path), tmp_path.name), ("owner/smol", "owner/smol")):
        provenance = config["provenance"] | {"model": base}
        (own / "config.json").write_text(json.dumps(config | {"provenance": provenance}))
        push(Push(model=own, to=tmp_path / "pushed"))
        assert json.loads((tmp_path / "pushed" / "config.json").read_text())["provenance"]["model"] == told
        card = (tmp_path / "pushed" / CARD).read_text().replace("\\", "")
        assert told in card
        assert told == base or base not in card


def test_a_model_whose_edit_of_features_cannot_be_read_is_not_pushed_without_it(pushed: Path, tmp_path: Path) -> None:
    edited = Path(shutil.copytree(pushed, tmp_path / "edited"))
    (edited / "feature_edit").mkdir()
    with pytest.raises(UserError, match="is no feature edit"):
        push(Push(model=edited, to=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_hub_gets_the_folder_and_a_refusal_is_one_line(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, set[str]] = {}
    deleted: set[str] = set()

    class Hub:
        def create_repo(self, name: str, **_: object) -> str:
            if name == "ada/refused":
                raise OSError("401\nlong story")
            return f"https://hub/{name}"

        def repo_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(private=name != "ada/seen")

        def upload_folder(self, repo_id: str, folder_path: Path, delete_patterns: list[str], **_: object) -> None:
            sent[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            deleted.update(delete_patterns)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push(Push(model=pushed, hub="ada/model", licence="mit")) == "https://hub/ada/model"
    assert {CARD, "config.json", "model.safetensors", "modeling_sarm.py", "tokenizer.json"} <= sent["ada/model"]
    with pytest.raises(UserError, match=r"did not take ada/refused \(OSError: 401\)"):
        push(Push(model=pushed, hub="ada/refused", licence="mit"))
    # Shards of an earlier push would be read in the place of these.
    assert deleted == {"*.safetensors", "*.safetensors.index.json"}
    push(Push(model=pushed, hub="ada/hidden", licence="mit", private=True))
    # The hub ignores `private` of a repository that is there already.
    with pytest.raises(UserError, match="ada/seen is there already, and everybody sees it"):
        push(Push(model=pushed, hub="ada/seen", licence="mit", private=True))
    assert sent.keys() == {"ada/model", "ada/hidden"}
