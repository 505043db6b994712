"""The backbone of a reward model that others trained, given where a language model is: every known kind, with adapters, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.passes.foreign_checkpoints import COMPLETIONS, D_IN, LAYOUTS, PROMPT, body_of, checkpoint, save, write_config
from tests.passes.test_turn_ends import EXTRACTION, SCHEMAS, pairs_table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, LlamaConfig, LlamaModel

from sarm.data.formats.models import backbone_of, check_model, check_predicts, model_folder
from sarm.data.formats.sae_folder import save_sae
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.nn.backbone import residuals_at
from sarm.nn.topk import TopKSae
from sarm.passes.activations import ChatActivations
from sarm.passes.edited_scores import Dictionary
from sarm.passes.models import find_model
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.passes.turn_ends import PairTurnEnds
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.debias import Debias
from sarm.settings.model import ModelSettings
from sarm.stages.debias_dictionaries import dictionaries_of
from sarm.stages.variants import check_rewarded

IDS = torch.arange(3, 21).reshape(2, 9)
PLACES = torch.tensor([0, 0, 1]), torch.tensor([2, 8, 5])


def residuals(folder: Path, layers: list[int]) -> list[torch.Tensor]:
    """As extraction takes them: from a model that was checked, cut behind the last layer."""
    model = ModelSettings(name=str(folder), layer=max(layers), max_length=128)
    check_model(model)
    backbone = backbone_of(model, model_folder(model), model.layer, torch.float32)
    with torch.no_grad():
        return residuals_at(backbone.eval(), layers, *PLACES, IDS)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        residuals(folder, [1])
    assert "\n" not in str(error.value)
    return str(error.value)


def raw_streams(model: Any) -> list[torch.Tensor]:
    """What comes out of each block of the library's own model, which ends its list of hidden states behind the final norm."""
    found: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0])) for block in model.layers]  # fmt: skip
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return [one[PLACES] for one in found]


@pytest.fixture(scope="module")
def streams(tiny_folder) -> list[torch.Tensor]:
    model = LlamaModel(LlamaConfig.from_pretrained(tiny_folder)).eval()
    model.load_state_dict(body_of(tiny_folder))
    return raw_streams(model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_residuals_of_every_known_reward_model_are_those_of_its_body(name, tiny_folder, tmp_path, streams):
    checkpoint(tmp_path, tiny_folder, LAYOUTS[name])
    for found, wanted in zip(residuals(tmp_path, [1, 2]), streams, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_classifier_gives_its_own_hidden_states(shards, tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"], shards=shards)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model(IDS, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(residuals(tmp_path, [1])[0], wanted[PLACES], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["transformers", "trl_wrapped", "starling", "deepspeed_chat", "grm", "armo", "bare"])
def test_a_weight_of_a_kept_block_that_is_in_no_file_is_never_drawn(name, tiny_folder, tmp_path):
    layout = LAYOUTS[name]
    checkpoint(tmp_path, tiny_folder, layout)
    weights = load_file(tmp_path / "model.safetensors")
    lost = f"{layout.body}layers.0.mlp.up_proj.weight"
    save_file({key: one for key, one in weights.items() if key != lost}, tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "lacks 1 weights, e.g. layers.0.mlp.up_proj.weight" in refusal(tmp_path)


def test_two_language_models_in_one_checkpoint_are_refused(tiny_folder, tmp_path):
    """A policy beside its reward model: their weights would take each other's places."""
    body = body_of(tiny_folder)
    both = {f"{beginning}{key}": one for beginning in ("model.", "rwtransformer.") for key, one in body.items()}
    save(tmp_path, both | {"v_head.weight": torch.ones(1, D_IN)})
    write_config(tmp_path, tiny_folder, ["LlamaForSequenceClassification"])
    assert "holds 2 language models, in 'model.' and 'rwtransformer.'" in refusal(tmp_path)


def test_code_of_an_unknown_class_and_models_that_see_both_sides_are_refused(tiny_folder, tmp_path):
    checkpoint(tmp_path / "own", tiny_folder, LAYOUTS["eurus"])
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"architectures": ["MyRewardModel"]}))
    assert "names code of its own (auto_map)" in refusal(tmp_path / "own")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path / "bert")  # fmt: skip
    assert "is a bert model, supported are" in refusal(tmp_path / "bert")


@pytest.mark.parametrize("name", ["starling", "armo", "trl_wrapped"])
def test_chat_ends_and_turn_ends_of_a_reward_model_are_those_of_its_body(name, tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS[name])
    for actor in (ChatActivations, PairTurnEnds):
        tables = []
        for folder in (tiny_folder, tmp_path):
            model = ModelSettings(name=str(folder), layer=1, max_length=128)
            worker: Any = actor(model, str(folder), EXTRACTION, SCHEMAS, 1)
            tables.append(worker.compute(worker.prepare(pairs_table(3)), lambda: None)[0])
        assert tables[0].keys() == tables[1].keys() == SCHEMAS.keys()
        assert all(tables[0][target].equals(tables[1][target]) for target in tables[0])
        assert all(table.num_rows for table in tables[1].values())


def test_a_model_without_a_language_models_head_has_no_cross_entropy(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["value_head"])
    with pytest.raises(UserError, match=r"predicts no next token.*Pass --sae.cross-entropy-texts 0"):
        check_predicts(ModelSettings(name=str(tmp_path), layer=1))
    check_predicts(ModelSettings(name="tiny:llama", layer=1))


class Adapted:
    """A base, adapters of it with a head, and PEFT's own model of the two."""

    def __init__(self, work: Path, tiny_folder: Path, **options: Any):
        self.base, self.folder = work / "base", work / "adapter"
        checkpoint(self.base, tiny_folder, LAYOUTS["transformers"])
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(self.base)
        config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], **options)
        self.model = get_peft_model(model, config)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        self.model.eval().save_pretrained(self.folder)
        for path in tiny_folder.iterdir():
            if "token" in path.name or path.suffix == ".jinja":
                shutil.copy(path, self.folder)


@pytest.fixture
def adapted(tiny_folder, tmp_path, monkeypatch) -> Adapted:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    return Adapted(tmp_path, tiny_folder)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"layers_to_transform": [1]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_adapters_are_merged_into_the_model_that_peft_makes_of_them(options, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    adapted = Adapted(tmp_path, tiny_folder, **options)
    for found, wanted in zip(residuals(adapted.folder, [1, 2]), raw_streams(adapted.model.get_base_model().model), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    spec = find_model(Benchmarking(model=str(adapted.folder), benchmarks=("pairs=x",)))
    (scored,), _ = load_scorer(spec, 256)([Request(PROMPT, COMPLETIONS, alone=False)])
    tokenizer = AutoTokenizer.from_pretrained(adapted.folder)
    for text, one in zip(COMPLETIONS, scored, strict=True):
        ids = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": text}], return_dict=True)["input_ids"]  # fmt: skip
        with torch.no_grad():
            assert one.score == pytest.approx(adapted.model(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_adapters_are_merged_once_and_again_when_their_files_change(adapted):
    first = model_folder(ModelSettings(name=str(adapted.folder), layer=1))
    assert model_folder(ModelSettings(name=str(adapted.folder), layer=1)) == first
    path = adapted.folder / "adapter_model.safetensors"
    save_file({key: 2 * one for key, one in load_file(path).items()}, path)
    second = model_folder(ModelSettings(name=str(adapted.folder), layer=1))
    assert second != first
    template = adapted.folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", " <|im_end|>"))
    third = model_folder(ModelSettings(name=str(adapted.folder), layer=1))
    assert third != second
    assert (Path(third) / template.name).read_text() == template.read_text()


def test_a_dictionary_of_an_adapter_s_model_is_one_of_the_adapter(adapted):
    """Extraction and training name the adapter's folder, and scorers read the merged one."""
    sae = TopKSae(D_IN, 32, 4)
    sae.initialise_(torch.randn(64, D_IN), torch.Generator().manual_seed(0))
    folder = adapted.base.parent / "sae"
    folder.mkdir()
    save_sae(sae, folder, {"activations": {"model": str(adapted.folder), "layer": 1}})
    asked = Debias(model=str(adapted.folder), sae=(folder,), pairs=("pairs=x",))
    assert dictionaries_of(asked, find_model(asked.of_model())) == [Dictionary(folder, 1, 0)]
    other = replace(asked, model=str(adapted.base))
    with pytest.raises(UserError, match="was trained on"):
        dictionaries_of(other, find_model(other.of_model()))


def edited(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, w: w.pop("base_model.model.score.weight"), "lacks base_model.model.score.weight, which would be drawn"),
        (lambda a, w: w.update({"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.ones(3, 128)}), "for which .* has no place"),
        (lambda a, w: w.update({k: t[:, :-1].contiguous() for k, t in w.items() if "lora_A" in k}), "cannot be merged|did not take as it is"),
        (lambda a, w: edited(a.folder / "adapter_config.json", peft_type="IA3"), "holds IA3 adapters, and only LORA"),
        (lambda a, w: edited(a.folder / "adapter_config.json", task_type=None), "is an adapter for None, expected SEQ_CLS or CAUSAL_LM"),
        (lambda a, w: edited(a.folder / "adapter_config.json", base_model_name_or_path="gone"), "names the base gone, which is no folder here"),
        (lambda a, w: (a.base / "model.safetensors").unlink(), "holds no .*safetensors"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_their_base_are_refused_in_one_line(change, said, adapted):
    path = adapted.folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(adapted, weights)
    save_file(weights, path)
    with pytest.raises(UserError, match=said) as error:
        model_folder(ModelSettings(name=str(adapted.folder), layer=1))
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_a_pickle_is_refused(adapted):
    (adapted.folder / "adapter_model.safetensors").rename(adapted.folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors"):
        model_folder(ModelSettings(name=str(adapted.folder), layer=1))


@pytest.mark.parametrize("name", ["transformers", "athene"])
def test_the_last_token_is_the_one_at_which_the_model_reads_its_reward(name, tiny_folder, tmp_path):
    """The template writes a newline behind the end of turn, and Athene reads at a token behind that."""
    layout = LAYOUTS[name]
    checkpoint(tmp_path, tiny_folder, layout)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for reads, ends in (("end_of_turn", "<|im_end|>"), ("last", layout.appends or "\n")):
        model = ModelSettings(name=str(tmp_path), layer=1, max_length=20, rewarded_token=reads)
        chat = load_chat_tokenizer(model, tmp_path)
        assert chat.end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        for text in COMPLETIONS:
            (found,) = chat.encode_responses(PROMPT, [text], offsets=True)
            ids = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": text}], return_dict=True)["input_ids"]  # fmt: skip
            whole = [*ids, *([tokenizer.cls_token_id] if layout.appends else [])] if reads == "last" else ids[:-1]
            assert found.ids == whole[-20:]
            assert tokenizer.decode(found.ids[-1:]) == ends
            assert len(found.offsets) == len(found.ids)
        assert tokenizer.decode(list(chat.closing_ids)).endswith(ends)


def test_a_sarm_is_not_trained_where_another_model_reads_its_reward():
    model = ModelSettings(layer=1, rewarded_token="last")
    with pytest.raises(UserError, match=r"rewarded where the answer's turn ends.*Leave out --model.rewarded-token"):
        check_rewarded(model)
    check_rewarded(ModelSettings(layer=1))
