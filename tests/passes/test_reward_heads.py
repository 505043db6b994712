"""Reward models of others: every known head against its formula on a generated checkpoint, and everything else refused in one line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.compatibility import assert_listed
from tests.passes.foreign_checkpoints import (  # fmt: skip
    COMPLETIONS,
    D_IN,
    LAYOUTS,
    PROMPT,
    body_of,
    checkpoint,
    expected,
    head_of,
    save,
    write_config,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, LlamaConfig, LlamaModel

from sarm.passes.foreign_models import load_foreign
from sarm.passes.models import find_model, score_key
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError

BATCH_TOKENS = 256


def scores(folder: Path, completions: list[str] = COMPLETIONS, **flags: object) -> list[float]:
    spec = find_model(Benchmarking(model=str(folder), benchmarks=("pairs=x",), **flags))
    (found,), _ = load_scorer(spec, BATCH_TOKENS)([Request(PROMPT, completions, alone=False)])
    return [one.score for one in found]


def refusal(folder: Path, **flags: object) -> str:
    with pytest.raises(UserError) as error:
        scores(folder, **flags)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 900
    return str(error.value)


@pytest.mark.parametrize("protocol", ["exact", "official"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_gives_the_rewards_of_its_formula(name, protocol, tiny_folder, tmp_path):
    layout = LAYOUTS[name]
    head = checkpoint(tmp_path, tiny_folder, layout)
    found = scores(tmp_path, protocol=protocol, **layout.flags)
    assert found == pytest.approx(expected(tiny_folder, layout, head), abs=1e-4)
    assert len({round(score, 3) for score in found}) == 3, "the model cannot tell the completions apart"


@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_and_plain_tensors_in_bin_files_are_read(file, shards, tiny_folder, tmp_path):
    layout = LAYOUTS["starling"]
    head = checkpoint(tmp_path, tiny_folder, layout, file=file, shards=shards)
    assert scores(tmp_path) == pytest.approx(expected(tiny_folder, layout, head), abs=1e-4)


@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_weights_that_are_there_twice_are_never_mixed(file, tiny_folder, tmp_path):
    """A body of an older whole file and a head of newer shards would be a model that nobody trained."""
    layout = LAYOUTS["transformers"]
    checkpoint(tmp_path, tiny_folder, layout, file=file)
    checkpoint(tmp_path, tiny_folder, layout, file=file, shards=2)
    assert "holds its weights twice" in refusal(tmp_path)


def test_a_second_file_with_a_tensor_of_the_same_name_is_refused(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    save_file({"score.weight": torch.zeros(1, D_IN)}, tmp_path / "older.safetensors")
    assert "holds score.weight twice, in model.safetensors and older.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["transformers", "armo", "grm"])
def test_a_head_of_whole_numbers_is_refused(name, tiny_folder, tmp_path):
    """A quantised one, whose scales are elsewhere."""
    layout = LAYOUTS[name]
    checkpoint(tmp_path, tiny_folder, layout)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    of_head = head_of(layout)
    save_file({key: one.round().to(torch.int8) if key in of_head else one for key, one in weights.items()}, path, {"format": "pt"})  # fmt: skip
    assert "holds int8: the head was quantised" in refusal(tmp_path, **layout.flags)


@pytest.mark.parametrize("weights", [(float("nan"), 1.0, 1.0), (float("inf"), 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_weights_of_outputs_that_make_no_reward_are_refused(weights, tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["objectives"])
    assert "--objectives" in refusal(tmp_path, objectives=weights)


def test_a_bin_file_that_is_more_than_tensors_is_not_opened(tiny_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trace",))

    checkpoint(tmp_path, tiny_folder, LAYOUTS["starling"])
    (tmp_path / "model.safetensors").unlink()
    torch.save({"v_head.weight": Evil()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin holds more than tensors" in refusal(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    assert "no mapping of names to tensors" in refusal(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_the_body_in_bfloat16_leaves_the_head_in_float32(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["qwen_math"])
    model = load_foreign(tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    found, wanted = scores(tmp_path, dtype="bfloat16"), scores(tmp_path)
    assert found == pytest.approx(wanted, rel=0.1, abs=0.3)


def test_flags_that_decide_the_reward_have_scores_of_their_own(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["objectives"])
    keys = {
        score_key(find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), objectives=own)))
        for own in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    }
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("transformers", {"score.weight": None}, "holds no reward head. Known are heads"),
        ("transformers", {"score.weight": "my_own.weight"}, "holds my_own.weight, which is none that is known"),
        ("qwen_math", {"score.2.weight": None}, "score.2 has weights .* expected 16 inputs"),
        ("qwen_math", {"score.2.weight": "score.3.weight", "score.2.bias": "score.3.bias"}, "which is none that is known"),
        ("value_head", {"value_head.weight": torch.ones(1, D_IN + 1)}, r"has weights \(1, 65\) .* expected 64 inputs"),
        ("value_head", {"score.weight": torch.ones(1, D_IN)}, "holds score.weight, value_head.weight, which is none"),
        ("armo", {"gating.logit_scale": None}, "which is none that is known"),
        ("armo", {"reward_transform_matrix": torch.ones(4, 5)}, "the gate's shapes .* do not fit 5 objectives"),
        ("transformers", {"model.layers.1.mlp.up_proj.weight": None}, "lacks 1 weights, e.g. layers.1.mlp.up_proj.weight"),
        ("transformers", {"model.layers.1.mlp.up_proj.weight": torch.ones(3, D_IN)}, r"another shape.*layers.1.mlp.up_proj.weight: \(3, 64\)"),
        ("transformers", {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "no place for, e.g. .*q_norm"),
        ("transformers", {"model.norm.weight": None}, "lacks 1 weights, e.g. norm.weight"),
        ("objectives", {}, "has 3 outputs, and no weights of them are given. Pass 3 to --objectives"),
    ],
)  # fmt: skip
def test_a_weight_that_is_not_there_is_never_drawn_at_random(name, change, said, tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS[name])
    weights = load_file(tmp_path / "model.safetensors")
    for key, new in change.items():
        if isinstance(new, torch.Tensor):
            weights[key] = new
        else:
            old = weights.pop(key)
            if new is not None:
                weights[new] = old
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        scores(tmp_path)
    refusal(tmp_path)


def test_an_encoder_is_scored_by_its_own_class_and_never_with_a_head_that_is_not_in_its_file(tiny_folder, tmp_path):
    config = BertConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    for path in tiny_folder.glob("*token*"):
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(tiny_folder / "chat_template.jinja", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text, score in zip(COMPLETIONS, scores(tmp_path), strict=True):
        turns = [*PROMPT, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("classifier.")}, tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "read as BertForSequenceClassification, lacks 2 weights, e.g. classifier.bias" in refusal(tmp_path)


def test_outputs_of_an_encoder_are_weighed_as_those_of_any_head(tiny_folder, tmp_path):
    config = BertConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3, max_position_embeddings=256)  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, tmp_path)
    each = [scores(tmp_path, objectives=tuple(float(n == own) for n in range(3))) for own in range(3)]
    assert len({score for one in each for score in one}) == 9
    wanted = [0.5 * a - b + 2 * c for a, b, c in zip(*each, strict=True)]
    assert scores(tmp_path, objectives=(0.5, -1.0, 2.0)) == pytest.approx(wanted, abs=1e-5)
    assert "has 3 outputs, and no weights of them are given" in refusal(tmp_path)


def test_code_is_left_alone_where_its_class_is_known_and_refused_where_it_is_not(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["eurus"])
    assert all(map(math.isfinite, scores(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MyRewardModel"]}))
    assert "names code of its own (auto_map)" in refusal(tmp_path)


def test_a_head_that_is_the_logit_of_a_token_has_to_be_asked_for(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["nemotron"])
    assert "is LlamaForCausalLM and holds no reward head" in refusal(tmp_path)
    assert "--head token:ID" in refusal(tmp_path)
    assert "beyond the 600 tokens" in refusal(tmp_path, head="token:600")
    assert "--head must be token:ID, got lm_head" in refusal(tmp_path, head="lm_head")


def test_a_conversation_that_the_template_refuses_is_left_out_with_its_reason(tiny_folder, tmp_path):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}" + (tiny_folder / "chat_template.jinja").read_text())  # fmt: skip
    spec = find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",)))
    asked = [Request([{"role": "system", "content": "Be brief."}, *PROMPT], ["a"], alone=False), Request(PROMPT, ["a"], alone=False)]  # fmt: skip
    ((refused,), (scored,)), _ = load_scorer(spec, BATCH_TOKENS)(asked)
    assert (refused.reason, math.isnan(refused.score)) == ("template_refuses", True)
    assert (scored.reason, math.isfinite(scored.score)) == (None, True)


@pytest.mark.parametrize("protocol", ["exact", "official"])
def test_tools_that_the_template_has_no_words_for_give_no_score_and_the_others_a_score_of_their_own(protocol, tiny_folder, tmp_path):  # fmt: skip
    from tests.data.tokens.test_tools import OPENAI, QWEN, SEARCH

    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    spec = find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), protocol=protocol))
    asked = [Request([{**OPENAI[0], "tools": [SEARCH]}, *OPENAI[1:]], ["a"], alone=False), Request(OPENAI[:1], ["a"], alone=False)]  # fmt: skip
    ((refused,), (scored,)), _ = load_scorer(spec, BATCH_TOKENS)(asked)
    assert (refused.reason, math.isfinite(scored.score)) == ("template_without_tools", True)
    (tmp_path / "chat_template.jinja").write_text(QWEN)
    spec = find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), protocol=protocol))
    ((said,), (again,)), _ = load_scorer(spec, BATCH_TOKENS)(asked)
    assert math.isfinite(said.score)
    assert said.score != again.score
    assert said.num_tokens > again.num_tokens


def test_a_token_without_an_embedding_gives_no_score(tiny_folder, tmp_path):
    """As an added token of a tokenizer does that has more of them than the model; the official protocol reads it in contents."""
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path)
    spec = find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), protocol="official"))
    (found,), _ = load_scorer(spec, BATCH_TOKENS)([Request(PROMPT, ["a", "a <extra> b"], alone=False)])
    assert [one.reason for one in found] == [None, "not_encodable"]


def test_a_template_may_be_given_or_chosen_by_name(tiny_folder, tmp_path):
    folder, layout = tmp_path / "model", LAYOUTS["transformers"]
    head = checkpoint(folder, tiny_folder, layout)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(folder)
    assert "--chat-template" in refusal(folder)
    (tmp_path / "own.jinja").write_text(template)
    wanted = pytest.approx(expected(tiny_folder, layout, head), abs=1e-4)
    assert scores(folder, chat_template=str(tmp_path / "own.jinja")) == wanted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(folder)
    assert scores(folder) == wanted
    assert scores(folder, chat_template="tool_use") != wanted
    assert "has the chat templates default, tool_use, and none of the name rag" in refusal(folder, chat_template="rag")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ oops", "cannot render a question and its answer"),
        ("{{ raise_exception('no') }}", "cannot render a question and its answer"),
        ("{{ messages[0]['content'] }}", "leaves out one answer"),
        ("{% if false %}{% endif %}hello", "leaves out one question and one answer"),
    ],
)
def test_a_template_that_does_not_write_the_answer_is_refused_before_anything_is_paid_for(
    template, said, tiny_folder, tmp_path
):
    checkpoint(tmp_path, tiny_folder, LAYOUTS["transformers"])
    with pytest.raises(UserError, match=f"{said}.*Pass another to --chat-template"):
        find_model(Benchmarking(model=str(tmp_path), benchmarks=("pairs=x",), chat_template=template))


def test_a_tokenizer_without_a_pad_token_scores_batches(tiny_folder, tmp_path):
    layout = LAYOUTS["transformers"]
    head = checkpoint(tmp_path, tiny_folder, layout)
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).is_file():
            fields = json.loads((tmp_path / name).read_text())
            (tmp_path / name).write_text(json.dumps({k: v for k, v in fields.items() if not k.startswith("pad_token")}))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert scores(tmp_path) == pytest.approx(expected(tiny_folder, layout, head), abs=1e-4)


def outcome(folder: Path) -> tuple[list[float], str]:
    """The scores, or what refused the model."""
    try:
        return scores(folder), ""
    except UserError as error:
        return [], str(error)


_NAMES = ("score", "v_head", "value_head", "v_head.summary", "classifier", "my_head", "lm_head", "model.score")


@st.composite
def checkpoints(draw: st.DrawFn) -> dict:
    """What may be wrong with a checkpoint, or different."""
    return {
        "stem": draw(st.sampled_from(_NAMES)),
        "outputs": draw(st.sampled_from([1, 1, 1, 2])),
        "width": draw(st.sampled_from([D_IN, D_IN, D_IN, D_IN - 1])),
        "bias": draw(st.booleans()),
        "prefix": draw(st.sampled_from(["model.", "transformer.", ""])),
        "dropped": draw(st.sampled_from(["", "", "", "embed_tokens.weight", "layers.0.mlp.down_proj.weight", "norm.weight"])),
        "widened": draw(st.sampled_from(["", "", "", "layers.1.self_attn.k_proj.weight", "norm.weight"])),
        "surplus": draw(st.sampled_from(["", "", "", "layers.0.extra.weight", "layers.2.mlp.up_proj.weight"])),
        "rows": draw(st.sampled_from([600, 600, 600, 599, 640])),
        "tied": draw(st.booleans()),
        "pad": draw(st.sampled_from([None, 0, 0, 599, 700])),
        "file": draw(st.sampled_from(["safetensors", "bin"])),
        "shards": draw(st.integers(1, 3)),
        "lost_shard": draw(st.sampled_from([False, False, False, True])),
    }  # fmt: skip


@given(checkpoints())
@settings(max_examples=max(60, settings().max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_checkpoint_ends_in_a_traceback_or_with_a_weight_that_is_in_no_file(tiny_folder, tmp_path, how):
    """Either one line refuses it, or rewards are those of a model that was filled with the file's tensors by hand."""
    shutil.rmtree(tmp_path)
    body = body_of(tiny_folder)
    size = body["embed_tokens.weight"].shape[0]
    rows = how["rows"]
    body["embed_tokens.weight"] = torch.cat([body["embed_tokens.weight"], torch.zeros(100, D_IN)])[:rows]
    body.pop(how["dropped"], None)
    if how["widened"] in body:
        body[how["widened"]] = torch.cat([body[how["widened"]]] * 2)
    if how["surplus"]:
        body[how["surplus"]] = torch.zeros(3)
    generator = torch.Generator().manual_seed(3)
    head = {f"{how['stem']}.weight": torch.randn(how["outputs"], how["width"], generator=generator)}
    if how["bias"]:
        head[f"{how['stem']}.bias"] = torch.randn(how["outputs"], generator=generator)
    save(tmp_path, {f"{how['prefix']}{name}": t for name, t in body.items()} | head, file=how["file"], shards=how["shards"])  # fmt: skip
    write_config(tmp_path, tiny_folder, ["LlamaForSequenceClassification"], vocab_size=size, tie_word_embeddings=how["tied"], pad_token_id=how["pad"])  # fmt: skip
    if how["lost_shard"]:
        min(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin")).unlink()
    torch.manual_seed(7)
    found, said = outcome(tmp_path)
    assert "\n" not in said
    if said:
        return
    assert how["stem"] not in ("my_head", "lm_head", "model.score")
    assert not how["dropped"]
    assert not how["lost_shard"]
    model = LlamaModel(LlamaConfig.from_pretrained(tiny_folder)).eval()
    model.load_state_dict(body)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for text, score in zip(COMPLETIONS, found, strict=True):
        turns = [*PROMPT, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx(float((head[f"{how['stem']}.weight"] @ hidden + head.get(f"{how['stem']}.bias", torch.zeros(1)))[0]), abs=1e-4)  # fmt: skip


def test_the_table_of_reward_models():
    rows = [
        (one.saved_by, ", ".join(f"`{key}`" for key in list(one.head)[:4]) + (", ..." if len(one.head) > 4 else ""), f"`{one.body}`" if one.body else "none", one.computes)
        for one in LAYOUTS.values()
    ]  # fmt: skip
    rows += [
        ("encoders, and what else transformers has a sequence classifier for", "as its class has them", "as its class has it", "its class"),
        ("weights missing, surplus or of another shape; heads of other names; code of unknown classes", "", "", "refused by name"),
    ]  # fmt: skip
    assert_listed("reward-models", ("saved by", "weights of the head", "beginning of the body's", "the reward"), rows)
    assert head_of(LAYOUTS["armo"]).keys() == LAYOUTS["armo"].head.keys()
