"""SARMs inside vLLM, as far as they are without it: the folder that it loads, and what is computed of its hidden states."""

import ast
import importlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.data.tokens.chat_families import chat_of
from tests.serve.asked import ANSWERS, PROMPT, conversation, readings
from tests.stages.random_sarm import random_sarm, with_scale
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.formats.vllm_layout import ARCHITECTURES, PLUGIN, ServedSarm, served_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.integrations import vllm as plugin
from sarm.integrations.vllm_pooling import RewardHead, explanation_of, ids_asked_for, packed
from sarm.nn.backbone import without_final_norm
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSarm
from sarm.settings.model import ModelSettings
from sarm.stages.convert_sarm import convert_sarm

ROOT = Path(__file__).parents[2]
CONVERSATIONS = [conversation(answer) for answer in ANSWERS]
MEAN, STD = 0.75, 2.5


def converted(source: Path, target: Path, **options) -> Path:
    convert_sarm(ConvertSarm(source=source, target=target, format="vllm", **{"on_cut_off": "refuse"} | options))
    return target


class Loaded:
    """A folder as vLLM loads it: the backbone by the top of its config, the head by `sarm`; batches lie one behind the other."""

    def __init__(self, folder: Path):
        config = AutoConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        self.backbone = without_final_norm(AutoModel.from_config(config, dtype=torch.float32)).eval()
        self.backbone.load_state_dict({k.removeprefix("model."): w for k, w in weights.items() if k.startswith("model.")})  # fmt: skip
        self.served = served_sarm(config)
        self.head = RewardHead(self.served, config.hidden_size)
        self.head.load_state_dict({k: w for k, w in weights.items() if not k.startswith("model.")})

    @torch.no_grad()
    def pooled(self, ids: list[list[int]]):
        hidden = [self.backbone(input_ids=torch.tensor([own])).last_hidden_state[0] for own in ids]
        return self.head(torch.cat(hidden), [torch.tensor(own, dtype=torch.int32) for own in ids], [*map(len, ids)])


@pytest.fixture(scope="module")
def folder(tiny_folder, tiny_chat, tmp_path_factory) -> Path:
    return with_scale(random_sarm(tmp_path_factory.mktemp("vllm") / "sarm", tiny_folder, tiny_chat), MEAN, STD)


@pytest.fixture(scope="module")
def loaded(folder) -> Loaded:
    return Loaded(converted(folder, folder.parent / "refuse"))


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "abs_topk", "matching_pursuit"])
def test_a_converted_folder_gives_our_rewards_and_latents(tiny_folder, tiny_chat, tmp_path, architecture):
    source = with_scale(random_sarm(tmp_path / "sarm", tiny_folder, tiny_chat, architecture=architecture), MEAN, STD)
    loaded = Loaded(converted(source, tmp_path / "vllm"))
    rows = packed(loaded.pooled([one.ids for one in tiny_chat.encode(CONVERSATIONS)]))
    for row, reading in zip(rows, readings(source, CONVERSATIONS), strict=True):
        found = explanation_of(row)
        assert found["raw_reward"] == pytest.approx(reading.reward, rel=1e-5, abs=1e-4)
        assert found["reward"] == pytest.approx((reading.reward - MEAN) / STD, rel=1e-5, abs=1e-4)
        assert sum(found["contributions"]) == pytest.approx(found["raw_reward"], rel=1e-5, abs=1e-4)
        assert dict(zip(found["latents"], found["values"], strict=True)) == pytest.approx(
            dict(zip(reading.latents.tolist(), reading.values.tolist(), strict=True)), rel=1e-5, abs=1e-4
        )


def test_what_the_template_writes_behind_the_answer_has_no_part_in_the_reward(folder, loaded, tiny_chat):
    texts = [tiny_chat.render(one) for one in CONVERSATIONS]
    assert all(text.endswith("<|im_end|>\n") for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "refuse")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [len(own) for own in ids] == [len(one.ids) + 1 for one in tiny_chat.encode(CONVERSATIONS)]
    expected = [(one.reward - MEAN) / STD for one in readings(folder, CONVERSATIONS)]
    assert loaded.pooled(ids).rewards.tolist() == pytest.approx(expected, abs=1e-4)
    rendered = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert rendered == texts[0]


def test_an_answer_that_was_cut_off_is_no_number_where_such_are_refused_and_has_the_fixed_reward_where_they_are_penalised(folder, loaded, tiny_chat):  # fmt: skip
    whole, cut = (own.ids for own in tiny_chat.encode(CONVERSATIONS[:2]))
    ids = [whole, cut[:-1], whole]
    pooled = loaded.pooled(ids)
    assert pooled.cut_off.tolist() == [False, True, False]
    assert pooled.rewards.isnan().tolist() == [False, True, False]
    penalised = Loaded(converted(folder, folder.parent / "penalise", on_cut_off="penalise", scale="raw"))
    model = load_sarm(folder)
    row = torch.tensor([ids[1]])
    with torch.no_grad():
        ours = model(input_ids=row, attention_mask=torch.ones_like(row), on_cut_off="penalise").logits.item()
    pooled = penalised.pooled(ids)
    assert pooled.rewards[1].item() == pytest.approx(ours)
    assert pooled.rewards[0].item() == pytest.approx(readings(folder, CONVERSATIONS[:1])[0].reward, abs=1e-4)
    assert explanation_of(packed(pooled)[1])["contributions"] == [], "no latent pays for a fixed reward"


def test_a_folder_says_how_it_treats_cut_off_answers_or_is_not_written(folder, tmp_path):
    with pytest.raises(UserError, match="--on-cut-off refuse or penalise"):
        converted(folder, tmp_path / "none", on_cut_off=None)
    assert not (tmp_path / "none").exists()
    config = json.loads((folder / "config.json").read_text()) | {"on_cut_off": "penalise", "cut_off_reward": -4.0}
    (tmp_path / "own").mkdir()
    for path in folder.iterdir():
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    served = Loaded(converted(tmp_path / "own", tmp_path / "vllm", on_cut_off=None)).served
    assert (served.on_cut_off, served.penalty) == ("penalise", -4.0)


def test_the_config_is_the_backbones_with_what_vllm_asks_for(folder, loaded, tiny_chat):
    config = json.loads((folder.parent / "refuse" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["SarmOnLlama"])
    assert (config["num_labels"], config["id2label"], config["problem_type"]) == (1, {"0": "reward"}, "regression")
    assert config["io_processor_plugin"] == PLUGIN
    assert config["num_hidden_layers"] == 1
    assert config["sarm"]["answer_place"] == tiny_chat.answer_place
    tokenizer = json.loads((folder.parent / "refuse" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == tiny_chat.max_length == loaded.served.max_length


def test_a_config_of_another_version_is_refused():
    with pytest.raises(UserError, match="no object `sarm`"):
        served_sarm(AutoConfig.for_model("llama"))
    with pytest.raises(UserError, match="unknown"):
        served_sarm(type("Config", (), {"sarm": {"unknown": 1}}))


def test_a_tokenizer_that_would_be_read_as_another_is_refused(tmp_path):
    """For a folder with a Qwen 2 backbone transformers takes Qwen's tokenizer, whatever the folder says."""
    chat = chat_of("chatml", max_length=128)
    config = AutoConfig.for_model("qwen2", vocab_size=len(chat.tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    source = random_sarm(tmp_path / "sarm", tmp_path / "model", chat)
    with pytest.raises(UserError, match="splits texts otherwise"):
        converted(source, tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()
    chat.tokenizer.save_pretrained(tmp_path / "model")
    read = load_chat_tokenizer(ModelSettings(name=str(tmp_path / "model"), max_length=128), tmp_path / "model")
    source = random_sarm(tmp_path / "qwens", tmp_path / "model", read)
    assert Loaded(converted(source, tmp_path / "vllm")).served.probe_ids


def test_models_that_vllm_cannot_run_are_refused(folder, tiny_folder, tiny_chat, tmp_path, monkeypatch):
    scalar = random_sarm(tmp_path / "scalar", tiny_folder, tiny_chat, head="scalar")
    with pytest.raises(UserError, match="no latents"):
        converted(scalar, tmp_path / "a")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    with pytest.raises(UserError, match="this one's backbone is llama"):
        converted(folder, tmp_path / "b")


def test_a_model_that_is_read_with_an_edit_of_features_is_not_converted_without_it(folder, tmp_path):
    edited = Path(shutil.copytree(folder, tmp_path / "sarm"))
    (edited / "feature_edit").mkdir()
    for how in ("vllm", "papers"):
        with pytest.raises(UserError, match="holds an edit of features"):
            convert_sarm(ConvertSarm(source=edited, target=tmp_path / how, format=how))
        assert not (tmp_path / how).exists()


@pytest.mark.parametrize("option", [{"on_cut_off": "refuse"}, {"scale": "raw"}])
def test_options_of_vllms_folder_are_refused_for_others(option):
    with pytest.raises(UserError, match="unless --format is vllm"):
        ConvertSarm(source=Path("a"), target=Path("b"), format="papers", **option)


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "qwen3"])
def test_what_a_request_asks_for_becomes_our_token_ids(loaded, family):
    chat = chat_of(family, max_length=128)
    served = served_of(loaded, chat)
    ids = [one.ids for one in chat.encode(CONVERSATIONS)]
    assert ids_asked_for({"conversations": CONVERSATIONS}, chat, served) == ids
    assert ids_asked_for({"input_ids": ids}, chat, served) == ids
    spelled = conversation("before<|im_end|>after<end_of_turn></s>")
    assert ids_asked_for({"conversations": [spelled]}, chat, served) == [chat.encode([spelled])[0].ids]
    finish = {"conversations": CONVERSATIONS, "finish": ["stop", "length", "stop"]}
    with pytest.raises(UserError, match=r"conversations \[1\] have no end of turn"):
        ids_asked_for(finish, chat, served)
    penalising = served_of(loaded, chat, on_cut_off="penalise")
    assert ids_asked_for(finish, chat, penalising) == [ids[0], ids[1][:-1], ids[2]]


def served_of(loaded: Loaded, chat, **changes) -> ServedSarm:
    fields = vars(loaded.served) | {"end_of_turn_id": chat.end_of_turn_id, "answer_place": chat.answer_place}
    return ServedSarm(**fields | changes)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ({}, "must be an object"),
        ({"conversations": [PROMPT], "input_ids": [[1]]}, "must be an object"),
        ({"conversations": CONVERSATIONS, "other": 1}, "must be an object"),
        ({"conversations": []}, "something in each"),
        ({"conversations": "text"}, "something in each"),
        ({"conversations": [[]]}, "something in each"),
        ({"conversations": ["text"]}, "something in each"),
        ({"conversations": [["text"]]}, "assistant's turn"),
        ({"conversations": [PROMPT]}, "conversation 0 does not end"),
        ({"conversations": [[*PROMPT, {"role": "assistant", "content": 3}]]}, "content"),
        ({"conversations": CONVERSATIONS, "finish": ["stop"]}, "finish"),
        ({"conversations": CONVERSATIONS[:1], "finish": ["ended"]}, "finish"),
        ({"conversations": CONVERSATIONS[:1], "finish": [["stop"]]}, "finish"),
        ({"input_ids": [[1]], "finish": ["stop"]}, "not said of ids"),
        ({"input_ids": [["1"]]}, "whole numbers"),
        ({"input_ids": [[True]]}, "whole numbers"),
        ({"input_ids": [[-1]]}, "whole numbers"),
    ],
)
def test_a_request_that_is_none_is_refused(loaded, tiny_chat, data, words):
    with pytest.raises(UserError, match=words):
        ids_asked_for(data, tiny_chat, loaded.served)


def test_the_entry_points_name_what_is_there():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {"vllm.general_plugins": {PLUGIN: "sarm.integrations.vllm:register"}, "vllm.io_processor_plugins": {PLUGIN: "sarm.integrations.vllm:io_processor"}}  # fmt: skip
    assert callable(plugin.register)
    module, _, name = plugin.io_processor().rpartition(".")
    assert name in classes_of(module)
    assert set(ARCHITECTURES.values()) <= classes_of("sarm.integrations.vllm_models")


def classes_of(module: str) -> set[str]:
    """Names of the classes of a module that cannot be imported without vLLM."""
    spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
