"""One training step of a TopK SAE by this project and by other libraries, timed in this process: `python sae_steps.py NAME`, on cores or on a GPU (`--device cuda`).

Each does what its own trainer does in a step: gradient clipping, decoder norms, dead-latent counts; no logging. Prints one JSON line.
"""

import argparse
import json
import os
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Step = Callable[[Tensor], object]


def gemm(d: int, m: int, k: int, batch: int, device: str) -> Step:
    """The encoder's matrix product and nothing else: no exact step can do without it."""
    weight, bias = torch.randn(m, d, device=device), torch.zeros(m, device=device)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.addmm(bias, x, weight.T)

    return step


def sarm(d: int, m: int, k: int, batch: int, device: str) -> Step:
    """This project's `Learner`."""
    from sarm.nn.topk import TopKSae
    from sarm.settings.sae import SaeSettings
    from sarm.training.sae_learner import Learner

    sae = TopKSae(d, m, k)
    sae.initialise_(torch.randn(1024, d), torch.Generator().manual_seed(0))
    learner = Learner(sae, SaeSettings(d_sae=m, k=k, batch_size=batch), device)
    return lambda x: learner.step(x, 3e-4)


def sparsify(d: int, m: int, k: int, batch: int, device: str) -> Step:
    """Eleuther's sparsify, with its documented Adam; the body of its trainer's loop."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k), dtype=torch.float32, device=device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4, fused=device == "cuda" or None)
    has_fired = torch.zeros(m, dtype=torch.bool, device=device)
    since = torch.zeros(m, dtype=torch.long, device=device)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        has_fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since.add_(len(x))
            since[has_fired] = 0
            has_fired.zero_()

    return step


def sae_lens(d: int, m: int, k: int, batch: int, device: str) -> Step:
    """SAELens' trainer with its defaults."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=batch, device=device, lr_end=3e-5)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k, device=device))
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(d: int, m: int, k: int, batch: int, device: str) -> Step:
    """dictionary_learning's TopK trainer."""
    # Only its language-model buffer needs nnsight, which pins an old torch.
    nnsight = types.ModuleType("nnsight")
    nnsight.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = nnsight
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=d,
        dict_size=m,
        k=k,
        layer=0,
        lm_name="none",
        dict_class=AutoEncoderTopK,
        device=device,
    )
    # Its step 0 fits a geometric median once.
    count = iter(range(1, 10**6))
    return lambda x: trainer.update(next(count), x)


STEPS = {f.__name__: f for f in (gemm, sarm, sparsify, sae_lens, dictionary_learning)}


def main() -> None:
    """Time one of `STEPS`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=STEPS)
    for flag, default in (
        ("d", 576),
        ("m", 9216),
        ("k", 27),
        ("batch", 4096),
        ("threads", 2),
        ("steps", 5),
        ("warm", 2),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    a = parser.parse_args()
    # As our workers allow it; what else a library allows is its own.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    batches = [torch.randn(a.batch, a.d, device=a.device) for _ in range(4)]
    before = _peak_mb()
    step = STEPS[a.name](a.d, a.m, a.k, a.batch, a.device)
    seconds = []
    for n in range(a.warm + a.steps):
        start = time.perf_counter()
        step(batches[n % len(batches)])
        if a.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"name": a.name, "seconds": seconds[a.warm :], "mb_before": before, "mb_peak": _peak_mb()}))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
