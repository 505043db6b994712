"""Reward models with a random dictionary attached, and the pairs that their linear heads were measured on."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tests.passes.foreign_checkpoints import LAYOUTS, checkpoint
from tests.passes.test_turn_ends import pairs_table

from sarm.contracts.folders import PAIRS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.data.formats.sae_folder import save_sae
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae
from sarm.settings.conversion import ConvertSae
from sarm.stages.convert_sae import convert_sae

D_IN, D_SAE, K, LAYER = 64, 48, 5, 1


def random_sae(architecture: str = "topk", d_in: int = D_IN, bias: float = 0.0) -> Sae:
    torch.manual_seed(5)
    sae = build_sae(architecture, d_in, D_SAE, K)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec, std=0.3)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    torch.nn.init.constant_(sae.b_enc, bias)
    return sae


def save_random_sae(folder: Path, model: str, *, standardises: bool = True, **about: object) -> None:
    sae = random_sae(**{name: about.pop(name) for name in ("architecture", "d_in", "bias") if name in about})
    sae.standardises = standardises
    folder.mkdir(parents=True)
    save_sae(sae, folder, {"activations": {"model": model, "layer": LAYER, **about}})


def write_pairs(folder: Path, num: int = 8) -> Path:
    stage = StageFolder(folder, PAIRS_FOLDER, {"made": "for tests"})

    def write() -> None:
        pq.write_table(pairs_table(num), folder / "part-00000.parquet", write_page_checksum=True)

    stage.write(write)
    return folder


def attached_model(work: Path, tiny_folder: Path, name: str = "transformers", *, standardises: bool = True) -> Path:
    """The folder of a model of this layout with a random dictionary, beside `work / classifier`."""
    checkpoint(work / "classifier", tiny_folder, LAYOUTS[name])
    save_random_sae(work / "sae", str(work / "classifier"), standardises=standardises)
    pairs = write_pairs(work / "pairs")
    flags = LAYOUTS[name].flags
    convert_sae(
        ConvertSae(source=work / "sae", target=work / "attached", format="attached", model=str(work / "classifier"), pairs=pairs, max_length=256, **flags)
    )  # fmt: skip
    assert json.loads((work / "attached" / "config.json").read_text())["model_type"] == "sarm_attached"
    return work / "attached"
