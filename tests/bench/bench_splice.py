"""What one edit of features costs a forward pass, and that an edit of nothing costs no bit.

make bench BENCH=splice

The first 15 blocks of SmolLM2-135M read 2 rows of 256 random tokens, plain and with one SAE spliced in behind block 7, in turn. Random
dictionaries of 4,096 and 9,216 latents, of which the most frequent 8 and 32 are suppressed. `ratio` is that of the medians of CPU seconds on
one thread, so that other processes count little. `gap` is the largest difference of the residual stream where the factor of every edited
latent is 1.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sarm.data.formats.models import model_folder  # noqa: E402
from sarm.nn.architectures import build_sae  # noqa: E402
from sarm.nn.pretrained import load_backbone  # noqa: E402
from sarm.nn.splice import LatentEdit, Splice, edited  # noqa: E402
from sarm.settings.model import ModelSettings  # noqa: E402

OUT = Path("outputs/bench/splice.json")
LAYER, DEPTH, K, PASSES = 7, 15, 32, 5
BOUND = 1.2


@torch.no_grad()
def seconds_of(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    started = time.process_time()
    hidden = model(ids).last_hidden_state
    return time.process_time() - started, hidden


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, architecture: str, d_sae: int, number: int) -> dict[str, Any]:
    found: list[torch.Tensor] = []
    handle = model.layers[LAYER - 1].register_forward_hook(
        lambda _block, _inputs, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    _, plain = seconds_of(model, ids)
    handle.remove()
    sae = build_sae(architecture, plain.shape[-1], d_sae, K)
    x_ND = sae.rows_of(found[0].reshape(-1, plain.shape[-1]))
    sae.initialise_(x_ND, torch.Generator().manual_seed(0))
    codes = sae(x_ND)
    frequent = torch.bincount(codes.indices[codes.values != 0], minlength=d_sae).topk(number).indices.tolist()
    splices = {
        "plain": [],
        "edited": [Splice(sae, LAYER, [LatentEdit(latent) for latent in frequent])],
    }
    took: dict[str, list[float]] = {name: [] for name in splices}
    for _ in range(PASSES):
        for name, own in splices.items():
            with edited(model, own):
                took[name].append(seconds_of(model, ids)[0])
    with edited(model, [Splice(sae, LAYER, [LatentEdit(latent, "scale", 1.0) for latent in frequent])]):
        _, same = seconds_of(model, ids)
    medians = {name: statistics.median(own) for name, own in took.items()}
    ratio = medians["edited"] / medians["plain"]
    about = {"architecture": architecture, "d_sae": d_sae, "features": number, "cpu_seconds": medians}
    return {**about, "ratio": ratio, "gap": float((same - plain).abs().max()), "met": ratio <= BOUND}


def main() -> None:
    torch.set_num_threads(1)
    model = load_backbone(str(model_folder(ModelSettings(name="demo:smollm2", layer=DEPTH))), DEPTH)
    ids = torch.randint(0, model.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    runs = []
    for architecture in ("topk", "jumprelu"):
        for d_sae in (4096, 9216):
            for number in (8, 32):
                runs.append(measure(model, ids, architecture, d_sae, number))
                print(json.dumps(runs[-1]))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"bound": BOUND, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
