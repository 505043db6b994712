"""Reward models behind one call, without a cluster: SARM, a classifier as Hugging Face saves it, any function."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.stages.random_sarm import random_sarm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer, LlamaConfig

from sarm.data.formats.sarm_folder import save_sarm
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.passes.models import check_tokenizer, find_model, score_key
from sarm.passes.scorers import Request, load_scorer
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError

PROMPT = [{"role": "user", "content": "tell me how a garden grows"}]
COMPLETIONS = ["slowly.", "with water, light and a great deal of patience over many weeks.", "it does not grow at all"]
BATCH_TOKENS = 256


@pytest.fixture(scope="module")
def sarm_folder(tiny_folder: Path, tiny_chat: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scalar-head model of this project with a random head."""
    backbone = load_backbone(str(tiny_folder), 1)
    provenance = {"max_length": 128, "template": tiny_chat.template_hash, "tokenizer": tiny_chat.tokenizer_hash}
    config = SarmConfig(
        backbone=backbone.config.to_dict(), layer=1, head="scalar", end_of_turn_id=tiny_chat.end_of_turn_id, provenance=provenance
    )  # fmt: skip
    model = SarmForSequenceClassification(config, backbone)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("sarm")
    save_sarm(model, tiny_chat, folder)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama sequence classifier with one label, saved as anybody would."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = LlamaConfig(
        **{k: v for k, v in AutoConfig.from_pretrained(tiny_folder).to_dict().items() if k not in ("model_type", "architectures", "pad_token_id")},
        num_labels=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: object, **fields: object) -> Benchmarking:
    return Benchmarking(model=str(model), benchmarks=("pairs=x",), **fields)


def scores(model: object, completions: list[str], *, alone: bool = False, **fields: object) -> list[tuple]:
    scorer = load_scorer(find_model(settings(model, **fields)), BATCH_TOKENS)
    (found,), _ = scorer([Request(PROMPT, completions, alone)])
    return [(one.score, one.num_tokens, one.truncated) for one in found]


@pytest.mark.parametrize("protocol", ["exact", "official"])
@pytest.mark.parametrize("kind", ["sarm", "classifier"])
def test_a_score_does_not_depend_on_its_batch(kind, protocol, sarm_folder, classifier_folder):
    folder = sarm_folder if kind == "sarm" else classifier_folder
    together = scores(folder, COMPLETIONS, protocol=protocol)
    alone = scores(folder, COMPLETIONS, protocol=protocol, alone=True)
    for a, b in zip(together, alone, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1:] == b[1:]
    assert len({round(score, 3) for score, *_ in together}) == 3, "the model cannot tell the completions apart"


@pytest.mark.parametrize("protocol", ["exact", "official"])
@pytest.mark.parametrize("kind", ["sarm", "classifier"])
def test_many_requests_of_very_different_lengths_score_as_each_alone(kind, protocol, sarm_folder, classifier_folder):
    folder = sarm_folder if kind == "sarm" else classifier_folder
    # Short rows beside one long one are what joins texts in a row; a model that knows no segments would read them as one.
    requests = [
        Request([{"role": "user", "content": f"question {number} of many"}], [" ".join(["leaf"] * length) for length in lengths], alone=False)
        for number, lengths in enumerate([(1, 90), (2, 3), (5, 40), (1, 1), (7, 2, 60), (4, 9)])
    ]  # fmt: skip
    all_in_one_batch = 8192
    scorer = load_scorer(find_model(settings(folder, protocol=protocol)), all_in_one_batch)
    together, _ = scorer(requests)
    for request, found in zip(requests, together, strict=True):
        for text, one in zip(request.completions, found, strict=True):
            ((expected,),), _ = scorer([Request(request.prompt, [text], alone=True)])
            assert one.score == pytest.approx(expected.score, abs=1e-4)
            assert (one.num_tokens, one.truncated) == (expected.num_tokens, expected.truncated)


@pytest.mark.parametrize("system_prompt", [None, 'Say "no" to {{ all }}.'])
def test_a_model_scores_as_transformers_does_with_the_folders_own_template(system_prompt, tiny_folder, tmp_path):
    """The README's lines, which know nothing of the system prompt of the training."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    random_sarm(tmp_path, tiny_folder, ChatTokenizer(tokenizer, max_length=128, system_prompt=system_prompt))
    tokenizer, model = (auto.from_pretrained(tmp_path) for auto in (AutoTokenizer, AutoModelForSequenceClassification))
    for text, (score, num_tokens, _) in zip(COMPLETIONS, scores(tmp_path, COMPLETIONS), strict=True):
        conversation = [*PROMPT, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
        assert ("{{ all }}" in tokenizer.decode(ids["input_ids"][0])) == (system_prompt is not None)
        with torch.no_grad():
            assert score == pytest.approx(model(**ids).logits.item(), rel=1e-5)
        # Behind the rewarded token the template writes a newline, which nothing reads.
        assert num_tokens == ids["input_ids"].shape[1] - 1


def test_a_classifier_scores_as_transformers_does_alone(classifier_folder):
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    for text, (score, num_tokens, _) in zip(COMPLETIONS, scores(classifier_folder, COMPLETIONS), strict=True):
        conversation = [*PROMPT, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert num_tokens == len(ids)
        assert score == pytest.approx(expected, abs=1e-5)


def test_the_exact_protocol_cuts_the_beginning_and_the_official_one_the_tokenizers_side(classifier_folder, tmp_path):
    long = " ".join(["grow"] * 300)
    (exact,) = scores(classifier_folder, [long], max_length=64)
    (same_end,) = scores(classifier_folder, ["leaf " + long], max_length=64)
    assert exact[1:] == (64, True)
    assert exact[0] == pytest.approx(same_end[0], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    assert tokenizer.truncation_side == "right"
    (official,) = scores(classifier_folder, [long], max_length=64, protocol="official")
    (other_end,) = scores(classifier_folder, [long + " leaf leaf"], max_length=64, protocol="official")
    assert official[1:] == (64, True)
    assert official[0] == pytest.approx(other_end[0], abs=1e-5), "what came after the cut was read"


def test_any_function_of_conversations_is_a_model(tmp_path):
    file = tmp_path / "by_length.py"
    file.write_text("def score(conversations):\n    return [len(c[-1]['content']) for c in conversations]\n")
    found = scores(f"{file}:score", COMPLETIONS)
    assert [score for score, *_ in found] == [len(text) for text in COMPLETIONS]
    before = score_key(find_model(settings(f"{file}:score")))
    file.write_text(file.read_text() + "# edited\n")
    assert score_key(find_model(settings(f"{file}:score"))) != before


def test_a_function_that_loses_scores_is_refused(tmp_path):
    file = tmp_path / "short.py"
    file.write_text("def score(conversations):\n    return [1.0]\n")
    with pytest.raises(UserError, match="gave 1 scores for 3 conversations"):
        scores(f"{file}:score", COMPLETIONS)


def test_cached_scores_belong_to_weights_protocol_length_and_dtype(sarm_folder):
    keys = {
        score_key(find_model(settings(sarm_folder, **fields)))
        for fields in ({}, {"protocol": "official"}, {"max_length": 64}, {"dtype": "bfloat16"})
    }
    assert len(keys) == 4
    assert score_key(find_model(settings(sarm_folder, limit=3))) in keys


def test_a_sarm_with_another_template_is_refused(sarm_folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(sarm_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["provenance"]["template"] = "0" * 16
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the template in .* is not the one the model was trained with"):
        check_tokenizer(find_model(settings(copy)))


@pytest.mark.parametrize(
    ("name", "words"),
    [("/no/such", "no model folder"), ("no.such.module:f", "cannot load no.such.module:f"), ("json:nothing", "cannot load")],
)  # fmt: skip
def test_a_model_that_is_not_there_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        find_model(settings(name))


@pytest.mark.parametrize("flags", [{"head": "token:1"}, {"objectives": (1.0,)}, {"chat_template": "default"}])
def test_flags_for_models_of_others_are_refused_with_a_sarm_and_a_function(flags, sarm_folder):
    for model in (sarm_folder, "json:dumps"):
        with pytest.raises(UserError, match="Leave out --head, --objectives and --chat-template"):
            find_model(settings(model, **flags))


def test_a_model_that_gives_no_reward_is_refused(tiny_folder):
    with pytest.raises(UserError, match="holds no reward head"):
        find_model(settings(tiny_folder))


@pytest.mark.parametrize("kind", ["sarm", "classifier"])
def test_a_conversation_that_cannot_be_encoded_has_no_score_and_says_why(kind, sarm_folder, classifier_folder):
    folder = sarm_folder if kind == "sarm" else classifier_folder
    scorer = load_scorer(find_model(settings(folder)), BATCH_TOKENS)
    (found,), _ = scorer([Request(PROMPT, ["slowly.", "a\ud800", "word " * 1_000_000], alone=False)])
    assert [one.reason for one in found] == [None, "lone_surrogate", "too_long"]
    assert [math.isnan(one.score) for one in found] == [False, True, True]
    assert found[0].score == pytest.approx(scores(folder, ["slowly."])[0][0], abs=1e-4)


@pytest.mark.parametrize("protocol", ["exact", "official"])
def test_a_template_that_refuses_a_conversation_leaves_it_without_a_score(protocol, classifier_folder, tmp_path):
    folder = tmp_path / "refusing"
    shutil.copytree(classifier_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + template.read_text())  # fmt: skip
    score = load_scorer(find_model(settings(folder, protocol=protocol)), BATCH_TOKENS)
    system = [{"role": "system", "content": "Be kind."}, *PROMPT]
    ((refused,), (fine,)), _ = score([Request(system, COMPLETIONS[:1], False), Request(PROMPT, COMPLETIONS[:1], False)])
    assert (math.isnan(refused.score), refused.reason) == (True, "template_refuses")
    assert math.isfinite(fine.score)


def test_a_classifier_reads_spelled_control_tokens_as_text_unless_the_official_code_is_asked_for(classifier_folder):
    (plain,), (spelled,) = scores(classifier_folder, ["x"]), scores(classifier_folder, ["x<|im_end|>"])
    (official,) = scores(classifier_folder, ["x<|im_end|>"], protocol="official")
    assert official[1] == plain[1] + 1
    assert spelled[1] > plain[1] + 1


def test_the_version_of_the_text_rules_is_part_of_a_scores_key(sarm_folder, monkeypatch):
    spec = find_model(settings(sarm_folder))
    before = score_key(spec)
    monkeypatch.setattr("sarm.passes.models.PROTOCOL_VERSION", 1)
    assert score_key(spec) != before


def test_a_tokenizer_of_pythons_own_is_scored_by_the_official_code_alone(classifier_folder, tmp_path):
    folder = Path(shutil.copytree(classifier_folder, tmp_path / "bytes"))
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer = ByT5Tokenizer(pad_token="<pad>")
    tokenizer.chat_template = AutoTokenizer.from_pretrained(classifier_folder).chat_template
    tokenizer.save_pretrained(folder)
    ((score, *_),) = scores(folder, ["slowly."], protocol="official")
    assert math.isfinite(score)
    with pytest.raises(UserError, match=r"not run by the tokenizers library.*--protocol official"):
        scores(folder, ["slowly."])
