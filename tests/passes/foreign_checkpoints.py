"""Reward models as others save them, made of the tiny language model and a random head; and what each computes, written down once more."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

PROMPT = [{"role": "user", "content": "tell me how a garden grows"}]
COMPLETIONS = ["slowly.", "with water, light and a great deal of patience over many weeks.", "it does not grow at all"]
D_IN = 64

Weights = dict[str, Tensor]
# (head's weights, hidden states of one conversation [L, D], its token ids) -> the reward
Reference = Callable[[Weights, Tensor, Sequence[int]], Tensor]


class Layout(NamedTuple):
    """A way of saving a reward model: who does so, the head's shapes, the reward at the last token, and the rest of the checkpoint."""

    saved_by: str
    head: Mapping[str, tuple[int, ...]]
    computes: str
    reward: Reference
    body: str = "model."
    classes: tuple[str, ...] = ("LlamaForSequenceClassification",)
    config: Mapping[str, Any] = {}
    flags: Mapping[str, Any] = {}
    keeps_lm_head: bool = False
    appends: str = ""
    """A token that is put behind every conversation."""


def linear(stem: str) -> Reference:
    return lambda w, hidden, _: (w[f"{stem}.weight"] @ hidden[-1] + w.get(f"{stem}.bias", torch.zeros(1)))[0]


def two_layers(stem: str) -> Reference:
    def reward(w: Weights, hidden: Tensor, _: Sequence[int]) -> Tensor:
        inner = (w[f"{stem}.0.weight"] @ hidden[-1] + w[f"{stem}.0.bias"]).clamp_min(0)
        return (w[f"{stem}.2.weight"] @ inner + w[f"{stem}.2.bias"])[0]

    return reward


def armo(w: Weights, hidden: Tensor, ids: Sequence[int], pattern: Sequence[int] = ()) -> Tensor:
    """Of 5 objectives; the gate has three hidden layers and reads the last `<|im_end|>` before an answer is opened."""
    starts = [n for n in range(len(ids)) if list(ids[n : n + len(pattern)]) == list(pattern)]
    x = hidden[starts[-1]]
    for n in range(4):
        x = w[f"gating.layers.{n}.weight"] @ x + w[f"gating.layers.{n}.bias"]
        x = torch.relu(x) if n < 3 else x
    gate = torch.exp(x / 10) / torch.exp(x / 10).sum() * w["gating.logit_scale"][0]
    objectives = (w["regression_layer.weight"] @ hidden[-1]) @ w["reward_transform_matrix"]
    return (gate * objectives).sum()


_MLP = {"0.weight": (16, D_IN), "0.bias": (16,), "2.weight": (1, 16), "2.bias": (1,)}
_GATE = {f"gating.layers.{n}.{kind}": shape for n, (o, i) in enumerate([(8, D_IN), (8, 8), (8, 8), (5, 8)]) for kind, shape in (("weight", (o, i)), ("bias", (o,)))}  # fmt: skip
LAYOUTS: dict[str, Layout] = {
    "transformers": Layout("transformers, most", {"score.weight": (1, D_IN)}, "linear", linear("score")),
    "value_head": Layout("OpenRLHF", {"value_head.weight": (1, D_IN)}, "linear", linear("value_head")),
    "trl": Layout("TRL's value head", {"v_head.summary.weight": (1, D_IN), "v_head.summary.bias": (1,)}, "linear with bias", linear("v_head.summary"), classes=("LlamaForCausalLM",), keeps_lm_head=True),
    "trl_wrapped": Layout("TRL's value head, wrapped", {"v_head.summary.weight": (1, D_IN), "v_head.summary.bias": (1,)}, "linear with bias", linear("v_head.summary"), body="pretrained_model.model.", keeps_lm_head=True),
    "starling": Layout("Starling", {"v_head.weight": (1, D_IN)}, "linear", linear("v_head"), body="transformer."),
    "deepspeed_chat": Layout("DeepSpeed-Chat", {"v_head.weight": (1, D_IN)}, "linear", linear("v_head"), body="rwtransformer.", classes=()),
    "eurus": Layout("Eurus, UltraRM", {"regression_head.weight": (1, D_IN)}, "linear", linear("regression_head"), classes=("EurusRewardModel",), config={"auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}}),
    "beaver": Layout("Beaver", {"score_head.weight": (1, D_IN), "score_head.bias": (1,)}, "linear with bias", linear("score_head"), classes=("LlamaForScore",)),
    "reward_head": Layout("others", {"reward_head.weight": (1, D_IN)}, "linear", linear("reward_head")),
    "rm_head": Layout("others", {"rm_head.weight": (1, D_IN)}, "linear", linear("rm_head")),
    "classifier": Layout("others", {"classifier.weight": (1, D_IN), "classifier.bias": (1,)}, "linear with bias", linear("classifier")),
    "regression_layer": Layout("others", {"regression_layer.weight": (1, D_IN)}, "linear", linear("regression_layer")),
    "bare": Layout("a base model with a head beside it", {"score.weight": (1, D_IN)}, "linear", linear("score"), body=""),
    "qwen_math": Layout("Qwen2.5-Math-RM, INF-ORM", {f"score.{key}": shape for key, shape in _MLP.items()}, "two layers, ReLU", two_layers("score"), classes=("Qwen2ForRewardModel",), config={"auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}}),
    "grm": Layout("GRM", {f"v_head.summary.{key}": shape for key, shape in _MLP.items()}, "two layers, ReLU", two_layers("v_head.summary"), body="model.model.", keeps_lm_head=True),
    "athene": Layout("Athene", {"v_head.weight": (1, D_IN)}, "linear, at the CLS token behind the conversation", linear("v_head"), classes=("AtheneForSequenceClassification",), appends="<|im_start|>"),
    "armo": Layout("ArmoRM", {"regression_layer.weight": (5, D_IN), "reward_transform_matrix": (5, 5), "gating.logit_scale": (1,), **_GATE}, "objectives weighted by a gate on the prompt", armo, classes=("LlamaForRewardModelWithGating",), config={"auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}}),
    "objectives": Layout("regressions on several objectives", {"score.weight": (3, D_IN)}, "outputs weighted by `--objectives`", lambda w, hidden, _: torch.tensor([0.5, -1.0, 2.0]) @ (w["score.weight"] @ hidden[-1]), config={"num_labels": 3}, flags={"objectives": (0.5, -1.0, 2.0)}),
    "nemotron": Layout("Llama 3.1 Nemotron 70B Reward", {"lm_head.weight": (600, D_IN)}, "the logit of a token, `--head token:ID`", lambda w, hidden, _: w["lm_head.weight"][7] @ hidden[-1], classes=("LlamaForCausalLM",), flags={"head": "token:7"}),
}  # fmt: skip


def body_of(tiny_folder: Path) -> Weights:
    """The weights of the tiny language model by the names that `LlamaModel` has for them."""
    weights = load_file(tiny_folder / "model.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}


def head_of(layout: Layout) -> Weights:
    generator = torch.Generator().manual_seed(29)
    return {name: torch.randn(shape, generator=generator) for name, shape in layout.head.items()}


def save(folder: Path, weights: Weights, *, file: str = "safetensors", shards: int = 1) -> None:
    """The weights in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, write = ("model", lambda t, p: save_file(t, p, {"format": "pt"})) if file == "safetensors" else ("pytorch_model", torch.save)  # fmt: skip
    if shards == 1:
        write({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / f"{stem}.{file}")
        return
    names = sorted(weights)
    place = {name: f"{stem}-{n % shards + 1:05d}-of-{shards:05d}.{file}" for n, name in enumerate(names)}
    for path in set(place.values()):
        write({name: weights[name].contiguous().clone() for name in names if place[name] == path}, folder / path)
    (folder / f"{stem}.{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def write_config(folder: Path, tiny_folder: Path, classes: Sequence[str], **fields: Any) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"architectures": list(classes), "num_labels": 1, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    for path in tiny_folder.iterdir():
        if path.suffix in (".jinja", ".json") and path.name not in ("config.json", "generation_config.json"):
            shutil.copy(path, folder / path.name)


def checkpoint(folder: Path, tiny_folder: Path, layout: Layout, **how: Any) -> Weights:
    """A checkpoint of the layout in `folder`; returns its head's weights."""
    head = head_of(layout)
    weights = {f"{layout.body}{name}": tensor for name, tensor in body_of(tiny_folder).items()} | head
    if layout.keeps_lm_head:
        weights[f"{layout.body.removesuffix('model.')}lm_head.weight"] = torch.randn(600, D_IN)
    save(folder, weights, **how)
    write_config(folder, tiny_folder, layout.classes, **layout.config)
    if layout.appends:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.cls_token = layout.appends
        tokenizer.save_pretrained(folder)
    return head


@torch.no_grad()
def expected(tiny_folder: Path, layout: Layout, head: Weights) -> list[float]:
    """The reward of each completion, from one row of its own through the library's model."""
    model = LlamaModel(LlamaConfig.from_pretrained(tiny_folder)).eval()
    model.load_state_dict(body_of(tiny_folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    found = []
    for text in COMPLETIONS:
        turns = [*PROMPT, {"role": "assistant", "content": text}]
        ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
        ids += [tokenizer.convert_tokens_to_ids(layout.appends)] if layout.appends else []
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
        # Written out: what ends the user's turn and opens an answer in the tiny template.
        pattern = {"pattern": tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids} if layout.reward is armo else {}  # fmt: skip
        found.append(float(layout.reward(head, hidden, ids, **pattern)))
    return found
