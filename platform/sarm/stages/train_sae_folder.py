"""The folder of a trained SAE: its files, and the figures of its latents over all rows of every phase."""

import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sarm.contracts.tables import LATENT_STATS_TABLE
from sarm.data.formats.sae_folder import save_sae
from sarm.data.store.activations import ActivationStore
from sarm.data.store.looked_groups import Workers
from sarm.evaluate.reward_fidelity import chat_reward_fidelity
from sarm.evaluate.sae_quality import LatentCounts, count_latents, measure
from sarm.nn.sae import Sae
from sarm.settings.sae import SaeSettings
from sarm.stages.train_sae_rows import SaeRows


def write_sae_folder(
    sae: Sae,
    config: SaeSettings,
    folder: Path,
    rows: SaeRows,
    counts: Mapping[str, LatentCounts],
    chat: ActivationStore | None,
    activations: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Write weights, statistics and density histograms; returns FVU on held-out rows, L0, dead share, and what is alive at the reward.

    `counts` are those of `latent_counts`, `chat` the rewarded tokens of training pairs, and `activations` says what the rows are residuals of.
    """
    figures: dict[str, Any] = {
        f"fvu_{name}": measure(sae, measured.heldout, device, prepare=lambda x_ND: x_ND).fvu
        for name, measured in rows.measured.items()
    }
    figures |= {f"l0_{name}": found.l0() for name, found in counts.items()} | rows.figures
    fired = torch.stack([found.fired for found in counts.values()]).sum(0)
    figures["dead_share"] = float((fired == 0).double().mean())
    if chat is not None:
        figures["alive_at_reward"] = counts["chat"].alive_share()
        fidelity = chat_reward_fidelity(sae, chat, config.heldout_share, seed)
        figures |= {} if fidelity is None else {"reward_fidelity": fidelity}
    folder.mkdir(parents=True, exist_ok=True)
    save_sae(sae, folder, {"activations": activations, **rows.about})
    histograms = {
        name: dict(zip(("log10_density", "latents"), c.density_histogram(), strict=True)) for name, c in counts.items()
    }
    (folder / "density.json").write_text(json.dumps(histograms))
    pq.write_table(_latent_stats(counts, sae.d_sae), folder / "latent_stats.parquet", write_page_checksum=True)
    return figures


def latent_counts(sae: Sae, rows: SaeRows, device: torch.device, workers: Workers) -> dict[str, LatentCounts]:
    """What fires on all rows of every phase. Each of the workers reads its share of the row groups, and all have to call it."""
    mine = {
        name: count_latents(sae, (x_ND.to(device) for x_ND in measured.all(slice(workers.rank, None, workers.world))))
        for name, measured in rows.measured.items()
    }
    everyone = workers.everyone(mine)
    return {name: functools.reduce(operator.add, (counts[name] for counts in everyone)) for name in mine}


def _latent_stats(counts: Mapping[str, LatentCounts], d_sae: int) -> pa.Table:
    """schema.LATENT_STATS; frequencies are shares of rows, the mean is over rows where the latent fires."""

    def frequency(name: str) -> torch.Tensor:
        return counts[name].fired / counts[name].num_rows if name in counts else torch.zeros(d_sae)

    fired = torch.stack([c.fired for c in counts.values()]).sum(0)
    total = torch.stack([c.total for c in counts.values()]).sum(0)
    columns = {
        "latent": torch.arange(d_sae),
        "frequency_text": frequency("text"),
        "frequency_chat": frequency("chat"),
        "mean_value": total / fired.clamp_min(1),
        "max_value": torch.stack([c.peak for c in counts.values()]).amax(0),
    }
    return pa.table({name: value.numpy() for name, value in columns.items()}).cast(LATENT_STATS_TABLE)
