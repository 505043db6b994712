"""SAEs that take the residual stream as it is, as most published ones do: a reward model on one, from the file to the server.

Everything is compared with the publisher's formula on the library's own `hidden_states[layer]`, in float64.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from tests.data.formats.foreign_saes import B_DEC, D_IN, KINDS, SCALE, THRESHOLD, jump, pre, topk
from tests.nn.every_sae import KINDS as ARCHITECTURES
from tests.nn.every_sae import kind_of
from tests.nn.family_options import OPTIONS
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_folder import load_sae, save_sae
from sarm.data.formats.sarm_folder import load_sarm, read_sarm, save_sarm
from sarm.data.store.activations import ActivationStore
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.engine.session import open_session
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.passes.models import sarm_spec, score_key
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.settings.checks import UserError
from sarm.settings.conversion import ConvertSae, ConvertSarm
from sarm.settings.jobs import Pipeline
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.settings.serving import Serving
from sarm.stages.convert_sae import convert_sae
from sarm.stages.convert_sarm import convert_sarm
from sarm.stages.evaluate import evaluate
from sarm.stages.report import report
from sarm.stages.reward_models import build_model, check_sae, check_width
from sarm.stages.train_sarm import train_sarm

LAYER = 6
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gemma Scope": lambda h: jump(pre(None, h), THRESHOLD),
    "Llama Scope": lambda h: jump(pre(None, h, SCALE), torch.tensor(0.7 * SCALE)),
    "Qwen Scope": lambda h: topk(pre(None, h)),
    "sparsify": lambda h: topk(pre(B_DEC, h)),
    "AutoEncoderTopK": lambda h: topk(pre(B_DEC, h)),
    "MatryoshkaBatchTopKSAE": lambda h: jump(pre(B_DEC, h), torch.tensor(0.8)),
    "SAELens 3 to 5, standard": lambda h: pre(B_DEC, h).relu(),
}
"""Codes of activations, kind by kind."""
FAMILIES = ("llama", "gemma2", "qwen3", "olmo2", "phi3")
PROMPT = [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": "Slowly."}]


@pytest.fixture(scope="module")
def folder_of(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family as wide as the files, with the tiny tokenizer beside it."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            options = {name: value for name, value in OPTIONS[family].items() if name not in ("layer_types", "head_dim")}  # fmt: skip
            vocabulary = read_json(tiny_folder / "config.json")["vocab_size"]
            sizes = {"vocab_size": vocabulary, "hidden_size": D_IN, "intermediate_size": 16, "num_hidden_layers": LAYER + 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.4, "pad_token_id": 0}  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**options, **sizes}))
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            for path in tiny_folder.glob("*token*"):
                shutil.copy(path, made[family])
            for path in tiny_folder.glob("chat_template*"):
                shutil.copy(path, made[family])
        return made[family]

    return folder_of


def sarm_from(kind: str, model: Path, tmp_path: Path) -> tuple[SarmForSequenceClassification, ChatTokenizer]:
    """The reward model that training would start from, on the file of a kind, with a random head."""
    source = KINDS[kind].write(tmp_path / "in")
    convert_sae(ConvertSae(source=source, target=tmp_path / "sae", format="sarm", model=str(model), layer=LAYER))
    settings = ModelSettings(name=str(model), layer=LAYER, max_length=128)
    check_sae(tmp_path / "sae", settings)
    check_width(tmp_path / "sae", settings)
    chat = load_chat_tokenizer(settings, model)
    built = build_model(settings, str(model), tmp_path / "sae", chat)
    torch.nn.init.normal_(built.score.weight, generator=torch.Generator().manual_seed(3))
    return built.eval(), chat


@torch.no_grad()
def plain_reward(model: Path, ids: list[int], codes: Callable[[Tensor], Tensor], weight_S: Tensor) -> float:
    """sum_i w_i z_i of the last token, from `transformers` and the publisher's formula alone."""
    backbone = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    h = backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][:, -1]
    return float(codes(h.double())[0] @ weight_S.double())


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "llama") for kind in FORMULAS), *(("Gemma Scope", family) for family in FAMILIES[1:])]
)
def test_a_reward_on_a_published_sae_is_the_publishers_codes_times_the_head(kind, family, folder_of, tmp_path):
    model = folder_of(family)
    sarm, chat = sarm_from(kind, model, tmp_path)
    ids = [*torch.randint(3, 500, (12,), generator=torch.Generator().manual_seed(1)).tolist(), chat.end_of_turn_id]
    wanted = plain_reward(model, ids, FORMULAS[kind], sarm.score.weight[0])
    assert wanted != 0
    tolerance = pytest.approx(wanted, rel=1e-4, abs=1e-4)
    with torch.no_grad():
        assert sarm(input_ids=torch.tensor([ids])).logits.item() == tolerance
        save_sarm(sarm, chat, tmp_path / "sarm")
        assert read_json(tmp_path / "sarm" / "config.json")["standardise"] is False
        for read in (load_sarm, read_sarm, SarmForSequenceClassification.from_pretrained):
            assert read(tmp_path / "sarm")(input_ids=torch.tensor([ids])).logits.item() == tolerance


def test_it_is_loaded_with_its_own_code_and_served_with_the_same_rewards(folder_of, tmp_path):
    model = folder_of("llama")
    sarm, chat = sarm_from("Gemma Scope", model, tmp_path)
    save_sarm(sarm, chat, tmp_path / "sarm")
    ids = chat.tokenizer.apply_chat_template(PROMPT, return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(chat.end_of_turn_id)]
    wanted = pytest.approx(plain_reward(model, ids, FORMULAS["Gemma Scope"], sarm.score.weight[0]), rel=1e-4, abs=1e-4)
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert not model.config.standardise and type(model).__module__.startswith('transformers_modules')\n"
        "print(model.eval()(input_ids=torch.tensor([eval(sys.argv[2])])).logits.item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sarm"), str(ids)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) == wanted
    service = load_service(Serving(model=tmp_path / "sarm", threads=1))
    try:
        with TestClient(make_app(service)) as client:
            items = [{"messages": PROMPT}]
            found = client.post("/v1/rewards", json={"items": items, "scale": "raw"}).json()
        assert found["items"][0]["answers"][0]["reward"] == wanted
    finally:
        service.close()


def test_what_a_reward_model_reads_is_part_of_its_identity(folder_of, tmp_path):
    sarm, chat = sarm_from("Gemma Scope", folder_of("llama"), tmp_path)
    keys = []
    for standardise in (False, True):
        sarm.config.standardise = standardise
        save_sarm(sarm, chat, tmp_path / str(standardise))
        keys.append(score_key(sarm_spec(tmp_path / str(standardise))))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("standardises", [True, False])
def test_every_architecture_says_which_rows_it_takes_wherever_it_goes(architecture, standardises, tiny_folder, tiny_chat, tmp_path):  # fmt: skip
    sae = build_sae(d_in=64, d_sae=96, k=4, **kind_of(architecture))
    sae.initialise_(torch.randn(100, 64), torch.Generator().manual_seed(0))
    sae.standardises = standardises
    save_sae(sae, tmp_path, {"activations": {"d_in": 64, "model": "tiny:llama", "layer": 1}})
    assert load_sae(tmp_path)[0].standardises is standardises
    settings = ModelSettings(name="tiny:llama", layer=1, max_length=128)
    model = build_model(settings, str(tiny_folder), tmp_path, tiny_chat)
    torch.nn.init.normal_(model.score.weight)
    save_sarm(model, tiny_chat, tmp_path / "sarm")
    ids = torch.tensor([[5, 9, 300, 2, 1]])
    with torch.no_grad():
        h = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        x = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6) if standardises else h
        wanted = model.score(model.sae(x))
        for one in (model.eval(), load_sarm(tmp_path / "sarm"), read_sarm(tmp_path / "sarm")):
            torch.testing.assert_close(one(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    for is_topk, encoder, expected in ((False, "pretrained", standardises), (True, "random_linear", False), (True, "random", standardises)):  # fmt: skip
        built = build_model(
            settings, str(tiny_folder), tmp_path, tiny_chat, RewardSettings(topk=is_topk, encoder=encoder)
        )
        assert (built.config.standardise, built.sae.standardises) == (expected, expected)
    convert_sarm(ConvertSarm(source=tmp_path / "sarm", target=tmp_path / "back", format="sae", model="tiny:llama"))
    assert load_sae(tmp_path / "back")[0].standardises is standardises
    if not standardises and architecture in ("topk", "signed"):
        with pytest.raises(UserError, match="the papers' layout standardises activations, this model reads them raw"):
            convert_sarm(ConvertSarm(source=tmp_path / "sarm", target=tmp_path / "papers", format="papers"))


def test_a_folder_that_does_not_say_gets_standardised_rows_and_one_line_says_so(tiny_folder, tiny_chat, tmp_path):
    sae = build_sae("topk", 64, 96, 4)
    sae.initialise_(torch.randn(100, 64), torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path, {"activations": {"d_in": 64, "model": "tiny:llama", "layer": 1}})
    settings = ModelSettings(name="tiny:llama", layer=1, max_length=128)
    model = build_model(settings, str(tiny_folder), tmp_path, tiny_chat)
    save_sarm(model, tiny_chat, tmp_path / "sarm")
    about = read_json(tmp_path / "cfg.json")
    (tmp_path / "cfg.json").write_text(json.dumps(about | {"metadata": {"activations": {}}}))
    with pytest.warns(UserWarning, match=r"does not say which rows its SAE takes \(metadata.input\)"):
        assert load_sae(tmp_path)[0].standardises
    (tmp_path / "cfg.json").write_text(json.dumps(about | {"metadata": {"input": "embeddings"}}))
    with pytest.raises(UserError, match="says that its SAE takes 'embeddings', expected"):
        load_sae(tmp_path)
    config = read_json(tmp_path / "sarm" / "config.json")
    (tmp_path / "sarm" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "standardise"}))
    with pytest.warns(UserWarning, match="does not say whether activations are standardised"):
        assert load_sarm(tmp_path / "sarm").config.standardise
    (tmp_path / "sarm" / "config.json").write_text(json.dumps(config | {"standardise": "no"}))
    with pytest.raises(UserError, match="standardise must be true or false, got 'no'"):
        load_sarm(tmp_path / "sarm")


def test_a_reward_model_is_trained_and_evaluated_on_an_sae_of_raw_activations(
    extracted: Path, preset: Pipeline, tmp_path: Path
) -> None:
    """Real workers: from a SAELens file to held-out figures, with its baselines, the head at a probe."""
    out = Path(shutil.copytree(extracted, tmp_path / "run"))
    shutil.copy(extracted.parent / "mlflow.db", tmp_path)
    sae = build_sae("topk", 64, 96, 8)
    sae.initialise_(
        ActivationStore(extracted / "activations" / "chat").read_sides()[1], torch.Generator().manual_seed(0)
    )
    (tmp_path / "in").mkdir()
    sae.standardises = False
    save_sae(sae, tmp_path / "in", {"activations": {"model": preset.model.name, "layer": preset.model.layer}})
    convert_sae(ConvertSae(source=tmp_path / "in", target=out / "sae", format="sarm"))
    reward = replace(preset.reward, head_init="probe", baselines=("scalar", "random_encoder"), epochs=1)
    run = RunSettings(out=out, cpus_per_worker=1)
    with open_session(replace(preset, run=run, reward=reward)) as session:
        train_sarm(session, preset.model, reward)
        evaluate(session, preset.extraction, preset.evaluation)
        report(session, "raw", preset.evaluation)
    assert [load_sarm(out / name).config.standardise for name in ("sarm", "sarm_random_encoder", "scalar_head")] == [False, False, True]  # fmt: skip
    found = read_json(out / "evaluation" / "metrics.json")
    assert found["completeness"] < 1e-4
    assert 0 < found["sae_on_heldout"]["fvu"] < 1
    assert found["sae_on_heldout"]["reward_fidelity"] <= 1
    assert (out / "report.html").is_file()
