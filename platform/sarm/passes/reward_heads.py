"""Heads of reward models that others trained: which one a checkpoint has, by the names and shapes of its weights, and what it computes.

N answers, D width of the model, O objectives. h_ND is the last hidden state, behind the final norm, at the rewarded token.

linear   h W^T + b
layers   linear maps with a ReLU between each two of them
gated    sum_O gate(g)_O (h W^T T)_O,  gate(g) = scale softmax(layers(g) / temperature), where g_ND is the last hidden state at the
         token that ends the prompt (ArmoRM: Wang et al. 2024, section 3)

A head with O outputs needs the weight of each. What is none of these is refused: nothing is left to be drawn at random.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sarm.data.formats.reward_classes import EMBEDDING, KNOWN_CODE, READS_CLS, bodies_in
from sarm.data.formats.tensor_files import Shape
from sarm.settings.checks import UserError

# Under which names the heads of reward models are saved: transformers, TRL, OpenRLHF, DeepSpeed-Chat, UltraRM, Beaver and others.
_STEMS = ("score", "v_head", "value_head", "reward_head", "rm_head", "regression_head", "regression_layer", "score_head", "reward_model_head", "classifier")  # fmt: skip
_LINEAR = re.compile(rf"(?:{'|'.join(_STEMS)})(?:\.summary)?\.(?:weight|bias)")
_LAYER = re.compile(rf"(?:{'|'.join(_STEMS)})(?:\.summary)?\.(\d+)\.(?:weight|bias)")
_GATE = re.compile(r"regression_layer\.weight|reward_transform_matrix|gating\.logit_scale|gating\.layers\.\d+\.(?:weight|bias)")  # fmt: skip
# Weights outside of the language model that no reward is made of.
_NO_HEAD = re.compile(r"(?:^|\.)(?:lm_head|vision_tower|multi_modal_projector|visual|rotary_emb)\.")
TOKEN = "token:"


class HeadLayout(NamedTuple):
    """What a checkpoint's head is, and where its weights are. `body` is the beginning of the names of its language model's weights."""

    kind: str
    body: str
    keys: tuple[str, ...]
    num_outputs: int
    reads_cls: bool = False
    """Whether the reward is read at the tokenizer's CLS token, behind the conversation."""
    known_code: bool = False
    """Whether its class is one that this module computes, so that code which it names is not needed."""
    row: int = -1
    """The token whose logit is the reward, for the head of a language model."""


def find_head(shapes: Mapping[str, Shape], config: Mapping[str, Any], asked: str, origin: str) -> HeadLayout | None:
    """The head of a checkpoint with a causal language model; None if it has none, as encoders.

    `asked` is "" or `token:ID`, the logit of a token. Raises UserError if there is no head, more than one, or none that is known.
    """
    bodies = bodies_in(shapes)
    if not bodies:
        return None
    if len(bodies) > 1:
        raise UserError(f"{origin} holds {len(bodies)} language models, in {' and '.join(repr(one) for one in bodies)}. Pass another --model.")  # fmt: skip
    (body,) = bodies
    classes = [str(name) for name in config.get("architectures") or ()]
    if asked:
        return _of_token(shapes, body, asked, origin)
    keys = tuple(sorted(name for name in shapes if not _is_of_body(name, body) and not _NO_HEAD.search(name)))
    kind = _kind_of(keys)
    if kind is None:
        named = f"holds {', '.join(keys[:4])}, which is none that is known" if keys else "holds no reward head"
        raise UserError(
            f"{origin} is {', '.join(classes) or 'no architecture'} and {named}. Known are heads of one or more linear maps under {', '.join(_STEMS)}, and ArmoRM's gate; "
            f"if the reward is the logit of a token, pass --head {TOKEN}ID."
        )
    known = next((name for name in classes if KNOWN_CODE.get(name) == kind), "")
    return HeadLayout(
        kind=kind,
        body=body,
        keys=keys,
        num_outputs=_outputs(kind, keys, shapes, origin),
        reads_cls=known in READS_CLS,
        known_code=bool(known),
    )


def build_head(layout: HeadLayout, weights: Mapping[str, Tensor], config: Mapping[str, Any], objectives: Sequence[float]) -> nn.Module:  # fmt: skip
    """The module that makes rewards [N] of `(h_ND, g_ND)`, in float32; g_ND is read by the gate alone."""
    if whole := [name for name in layout.keys if not weights[name].is_floating_point()]:
        kind = str(weights[whole[0]].dtype).removeprefix("torch.")
        raise UserError(f"{whole[0]} holds {kind}: the head was quantised, and without its scales there is no reward. Pass the model before quantisation.")  # fmt: skip
    tensors = {name: weights[name].float() for name in layout.keys}
    if layout.row >= 0:
        (tensor,) = tensors.values()
        return _Head(_Layers([(tensor[layout.row : layout.row + 1], None)]), objectives)
    if layout.kind == "gated":
        temperature = float(config.get("gating_temperature", 10.0))
        return GatedHead(tensors, temperature)
    return _Head(_Layers(_maps(tensors)), objectives)


def gate_opening(tokenizer: Any, place: str) -> list[int]:
    """The end of the user's turn and what opens an answer: a gate reads the prompt where they begin, at their last place.

    Raises UserError if the chat template of the model in `place` opens no answer.
    """
    asked = [{"role": "user", "content": "question"}]
    closed, opened = (
        tokenizer(
            tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=opened),
            add_special_tokens=False,
        ).input_ids
        for opened in (False, True)
    )
    if opened[: len(closed)] != closed or len(opened) == len(closed):
        raise UserError(f"the chat template of {place} opens no answer, so that its gate has no place to read the prompt at. Pass --chat-template.")  # fmt: skip
    # White space behind the end of the turn is none of it.
    end = next(n for n in reversed(range(len(closed))) if tokenizer.decode([closed[n]]).strip())
    return [int(i) for i in opened[end:]]


class _Layers(nn.Module):
    """Linear maps with a ReLU between each two."""

    def __init__(self, maps: Sequence[tuple[Tensor, Tensor | None]]):
        super().__init__()
        self.weights = nn.ParameterList([weight for weight, _ in maps])
        self.biases = nn.ParameterList([torch.zeros(len(weight)) if bias is None else bias for weight, bias in maps])

    def forward(self, x_ND: Float[Tensor, "answers width"]) -> Float[Tensor, "answers objectives"]:
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x_ND = F.linear(x_ND if place == 0 else F.relu(x_ND), weight, bias)
        return x_ND


class _Head(nn.Module):
    """The weighted sum of the outputs of linear maps."""

    objectives: Tensor

    def __init__(self, layers: _Layers, objectives: Sequence[float]):
        super().__init__()
        self.layers = layers
        self.register_buffer("objectives", torch.tensor(list(objectives) or [1.0]))

    def forward(self, h_ND: Float[Tensor, "answers width"], _: Tensor | None = None) -> Float[Tensor, " answers"]:
        rewards: Tensor = self.layers(h_ND.float()) @ self.objectives
        return rewards


class GatedHead(nn.Module):
    """Objectives weighted by a gate that reads the prompt."""

    def __init__(self, tensors: Mapping[str, Tensor], temperature: float):
        super().__init__()
        self.regression = _Layers([(tensors["regression_layer.weight"], None)])
        self.gate = _Layers(_maps({key: t for key, t in tensors.items() if key.startswith("gating.layers.")}))
        self.transform_OO = nn.Parameter(tensors["reward_transform_matrix"])
        self.scale = nn.Parameter(tensors["gating.logit_scale"].reshape(()))
        self.temperature = temperature

    def forward(self, h_ND: Float[Tensor, "answers width"], g_ND: Float[Tensor, "answers width"]) -> Float[Tensor, " answers"]:  # fmt: skip
        objectives_NO = self.regression(h_ND.float()) @ self.transform_OO
        gate_NO = self.scale * F.softmax(self.gate(g_ND.float()) / self.temperature, dim=1)
        rewards: Tensor = (gate_NO * objectives_NO).sum(1)
        return rewards


def _is_of_body(name: str, body: str) -> bool:
    return (
        name.startswith(body) if body else name.split(".")[0] in ("embed_tokens", "layers", "norm", "final_layernorm")
    )


def _kind_of(keys: Sequence[str]) -> str | None:
    if not keys:
        return None
    stems = {key.rpartition(".")[0] for key in keys}
    if len(stems) == 1 and all(_LINEAR.fullmatch(key) for key in keys):
        return "linear"
    if len({stem.rpartition(".")[0] for stem in stems}) == 1 and all(_LAYER.fullmatch(key) for key in keys):
        numbers = sorted({int(stem.rpartition(".")[2]) for stem in stems})
        # A ReLU stands between each two; with dropout or norms between them it is another head.
        return "layers" if numbers == list(range(0, 2 * len(numbers), 2)) else None
    needed = {"regression_layer.weight", "reward_transform_matrix", "gating.logit_scale", "gating.layers.0.weight"}
    return "gated" if needed <= set(keys) and all(_GATE.fullmatch(key) for key in keys) else None


def _maps(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each linear map, in the order of their numbers."""
    stems = sorted({key.rpartition(".")[0] for key in tensors}, key=lambda stem: (len(stem), stem))
    return [(tensors[f"{stem}.weight"], tensors.get(f"{stem}.bias")) for stem in stems]


def _outputs(kind: str, keys: Sequence[str], shapes: Mapping[str, Shape], origin: str) -> int:
    """How many outputs the head has, once its shapes have been found to fit each other and the width of the model."""
    width = next(shape[-1] for name, shape in shapes.items() if name.split(".")[-2:] == EMBEDDING.split("."))

    def chain(stems: Sequence[str]) -> int:
        last = width
        for stem in stems:
            weight, bias = shapes.get(f"{stem}.weight", ()), shapes.get(f"{stem}.bias")
            if len(weight) != 2 or weight[1] != last or not weight[0] or bias not in (None, weight[:1]):
                raise UserError(f"{origin}: {stem} has weights {weight} and a bias {bias}, expected {last} inputs. Get another copy.")  # fmt: skip
            last = weight[0]
        return last

    def stems_of(*beginnings: str) -> list[str]:
        found = {key.rpartition(".")[0] for key in keys if key.startswith(beginnings)}
        return sorted(found, key=lambda stem: (len(stem), stem))

    if kind != "gated":
        return chain(stems_of(""))
    objectives = chain(["regression_layer"])
    found = (chain(stems_of("gating.layers.")), shapes["reward_transform_matrix"], shapes["gating.logit_scale"])
    if found[:2] != (objectives, (objectives, objectives)) or found[2] not in ((1,), ()):
        raise UserError(f"{origin}: the gate's shapes {found} do not fit {objectives} objectives. Get another copy.")
    return 1


def _of_token(shapes: Mapping[str, Shape], body: str, asked: str, origin: str) -> HeadLayout:
    number = asked.removeprefix(TOKEN)
    if not asked.startswith(TOKEN) or not number.isdecimal():
        raise UserError(f"--head must be {TOKEN}ID, got {asked}. Leave it out for a head of its own.")
    # Where weights are tied, the head is the embedding.
    heads = [name for name in shapes if name.endswith("lm_head.weight")] or [f"{body}{EMBEDDING}"]
    if int(number) >= shapes[heads[0]][0]:
        raise UserError(f"--head {asked} is beyond the {shapes[heads[0]][0]} tokens of {origin}. Pass a smaller one.")
    return HeadLayout("token", body, (heads[0],), 1, row=int(number))
