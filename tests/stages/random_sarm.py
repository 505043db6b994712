"""A reward model that nobody trained: random SAE and head on the tiny backbone."""

import json
from pathlib import Path

import torch

from sarm.data.formats.sarm_folder import save_sarm
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.architectures import build_sae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone

D_SAE, K = 96, 6


def random_sarm(
    folder: Path,
    tiny_folder: Path,
    tiny_chat: ChatTokenizer,
    *,
    bias: float = 0.0,
    head: str = "sae",
    architecture: str = "topk",
    layer: int = 1,
) -> Path:
    """Write it to a folder; `bias` is that of every latent."""
    backbone = load_backbone(str(tiny_folder), layer)
    torch.manual_seed(0)
    sae = build_sae(architecture, backbone.config.hidden_size, D_SAE, K)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    torch.nn.init.constant_(sae.b_enc, bias)
    provenance = {
        "max_length": tiny_chat.max_length,
        "template": tiny_chat.template_hash,
        "tokenizer": tiny_chat.tokenizer_hash,
    }
    config = SarmConfig(
        backbone=backbone.config.to_dict(), layer=layer, d_sae=D_SAE, k=K, head=head, sae=sae.describe(),
        end_of_turn_id=tiny_chat.end_of_turn_id, provenance=provenance,
    )  # fmt: skip
    model = SarmForSequenceClassification(config, backbone, sae if head == "sae" else None)
    torch.nn.init.normal_(model.score.weight)
    save_sarm(model, tiny_chat, folder)
    return folder


def with_scale(folder: Path, mean: float, std: float) -> Path:
    """The same folder, whose rewards have this mean and spread by its config."""
    config = json.loads((folder / "config.json").read_text()) | {"reward_mean": mean, "reward_std": std}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
