"""Tokens per second of one actor, measured in seconds: what `--dry-run --calibrate` plans with."""

import time

import torch

from sarm.data.formats.models import backbone_of, model_folder
from sarm.nn.backbone import residuals_at
from sarm.passes.usage import device_of_worker
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

_SECONDS = 5.0
_WINDOW = 256


def tokens_per_second(model: ModelSettings, extraction: ExtractionSettings) -> float:
    """Forward passes of made-up windows of 256 tokens through the truncated model on this machine's GPU, else its cores."""
    device, layer = device_of_worker(), max([model.layer, *extraction.layers])
    dtype = getattr(torch, model.dtype)
    backbone = backbone_of(model, model_folder(model), layer, dtype)
    backbone = backbone.eval().to(device)
    width = min(_WINDOW, model.max_length, extraction.batch_tokens)
    rows = max(1, extraction.batch_tokens // width)
    ids = torch.randint(0, backbone.config.vocab_size, (rows, width), device=device)
    last = torch.full((rows,), width - 1, device=device)
    passes, started = -1, 0.0
    with torch.inference_mode():
        while passes < 1 or time.perf_counter() - started < _SECONDS:
            residuals_at(
                model=backbone, layers=[layer], rows=torch.arange(rows, device=device), columns=last, input_ids=ids
            )[0].sum().item()
            passes += 1
            # The first pass warms up.
            started = started if passes else time.perf_counter()
    return passes * ids.numel() / (time.perf_counter() - started)
