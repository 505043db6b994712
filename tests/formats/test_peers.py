"""The same codes and reconstruction here and in the libraries whose files these are, in both directions.

The libraries live in an environment of their own, since one of them needs a torchvision that does not match torch: `make test-formats`.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.data.formats.sae_formats import export_sae, import_sae
from sarm.data.formats.sae_weights import SaeWeights, sae_of, weights_of
from sarm.nn.architectures import build_sae
from sarm.nn.sae import dense, standardise

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("SARM_PEERS_PYTHON", HERE.parents[1] / ".venv-bench" / "bin" / "python"))
LIBRARIES = {"sae_lens": "saelens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
D_IN, D_SAE, K = 16, 64, 4

pytestmark = pytest.mark.skipif(not PEERS.exists(), reason=f"the other libraries are not at {PEERS}: make test-formats")


def ours() -> dict[str, SaeWeights]:
    """An SAE of each architecture, with nothing at its initial value."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in ("topk", "batch_topk", "jumprelu"):
        sae = build_sae(name, D_IN, D_SAE, K)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            sae.normalise_decoder_()
            if name == "batch_topk":
                sae.threshold.fill_(0.7)
            if name == "jumprelu":
                sae.threshold.copy_(torch.rand(D_SAE, generator=generator))
        made[name] = weights_of(sae, {"activations": {"model": "some/model", "layer": 4}})
    return made


def codes_and_reconstruction(weights: SaeWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    sae = sae_of(weights)
    with torch.no_grad():
        codes = sae(x)
        return dense(codes, weights.d_sae), sae.decode(codes)


@pytest.fixture(scope="module", params=LIBRARIES)
def exchanged(request, tmp_path_factory) -> tuple[str, Path, Tensor, dict[str, Tensor]]:
    """A library, what it and we wrote, the rows, and what it computed of all."""
    library, format = request.param, LIBRARIES[request.param]
    work = tmp_path_factory.mktemp(library)
    (work / "theirs").mkdir()
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) * 3 + 1
    save_file({"x": x}, work / "rows.safetensors")
    for name, weights in ours().items():
        if format != "sparsify" or name == "topk":
            export_sae(weights, work / "ours" / name, format)
    if format == "saelens":
        export_sae(ours()["topk"], work / "ours" / "topk_residual", "saelens_residual")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(PEERS), str(HERE / "peers.py"), library, str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return library, work, x, load_file(work / "results.safetensors")


def test_both_compute_the_same_from_every_file(exchanged):
    library, work, x, results = exchanged
    names = sorted({key.rpartition("/")[0] for key in results})
    assert len(names) == {"sae_lens": 10, "sparsify": 2, "dictionary_learning": 7}[library]
    for name in names:
        weights, rows, tolerance = import_sae(work / name), x, 1e-5
        std, mean = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        if name.endswith(("residual", "layer_norm")):
            # It standardises with another epsilon, a relative 9e-6 / std, and puts mean and deviation back.
            rows, tolerance = standardise(x), 3e-5
            std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        codes, reconstruction = codes_and_reconstruction(weights, rows)
        theirs = results[f"{name}/codes"]
        assert torch.equal(codes > 0, theirs > 0), name
        assert (codes > 0).sum() > len(x), name
        torch.testing.assert_close(codes, theirs, rtol=tolerance, atol=tolerance * float(codes.max()), msg=name)
        scale = float(results[f"{name}/reconstruction"].abs().max())
        torch.testing.assert_close(
            reconstruction * std + mean,
            results[f"{name}/reconstruction"],
            rtol=tolerance,
            atol=tolerance * scale,
            msg=name,
        )


def test_what_was_exported_is_the_sae_that_is_imported(exchanged):
    _, work, x, _ = exchanged
    for name, weights in ours().items():
        if not (work / "ours" / name).exists():
            continue
        found = import_sae(work / "ours" / name)
        assert found.metadata["activations"] == weights.metadata["activations"]
        assert type(sae_of(found)) is type(sae_of(weights))
        for one, other in zip(codes_and_reconstruction(found, x), codes_and_reconstruction(weights, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
