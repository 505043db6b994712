"""What an extraction costs, before it is paid for: from the corpus where it is there, from stated assumptions where it is not.

Loads nothing heavy. A forward pass is 2 FLOPs a weight and token; attention scores come on top, 2 d_in times the window, and are left out.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import Extraction, Model, Run

CHARACTERS_A_TOKEN = 4.4
TOKENS_A_SENTENCE = 20
PAPER_SENTENCES = 50_000_000
# An H100's dense bf16 peak, and the share of it that a forward pass of this kind is taken to reach.
PEAK_FLOPS, PEAK_SHARE = 989e12, 0.4
_KEY_BYTES = 60


class Shape(NamedTuple):
    """What of a model decides its cost: width of the residual stream, of the feed-forward part, of all queries, of all keys."""

    d_in: int
    d_ff: int
    d_query: int
    d_key: int

    @property
    def weights_a_block(self) -> int:
        return 2 * self.d_in * (self.d_query + self.d_key) + 3 * self.d_in * self.d_ff


KNOWN_SHAPES = {
    "demo:smollm2": Shape(576, 1536, 576, 192),
    "meta-llama/Llama-3.2-1B-Instruct": Shape(2048, 8192, 2048, 512),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3072, 8192, 3072, 1024),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(4096, 14336, 4096, 1024),
}
"""Of the presets' models, so that a dry run needs no download."""


def describe_extraction(run: Run, model: Model, extraction: Extraction, tokens_per_second: float | None = None) -> str:
    """Rows, tokens, GB, FLOPs and hours of extracting the texts, one line each, with what they rest on.

    `tokens_per_second` of one actor, if it has been measured.
    """
    rows, tokens, basis = _size(run.out / "corpus", extraction)
    layers = {model.layer, *extraction.layers}
    by_unit = {"token": tokens, "chat": rows}
    outputs = {unit: by_unit.get(unit, tokens / TOKENS_A_SENTENCE) for unit in extraction.units}
    lines = [f"extraction   {rows:,.0f} texts, {tokens:,.0f} tokens ({basis})"]
    lines += [
        f"             {', '.join(f'{count:,.0f} rows of {unit}' for unit, count in outputs.items())} "
        f"({TOKENS_A_SENTENCE} tokens a sentence), each at {len(layers)} layer{'s' if len(layers) > 1 else ''}"
    ]
    shape = KNOWN_SHAPES.get(model.name)
    if shape is not None:
        size = sum(outputs.values()) * len(layers) * (2 * shape.d_in + _KEY_BYTES)
        # Sentences alone are another pass than documents, and conversations a third.
        passes = len({unit if unit in ("sentence", "chat") else "whole" for unit in outputs})
        flops = 2 * shape.weights_a_block * max(layers) * tokens * passes
        lines.append(f"             {size / 1e9:,.2f} GB on disk, {flops:.2e} FLOPs of forward passes")
        hours = flops / (PEAK_FLOPS * PEAK_SHARE) / 3600
        basis = f"assumed: H100s at {PEAK_SHARE:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s"
    else:
        lines.append(f"             {model.name} is not known here: GB and FLOPs are left out")
        hours, basis = None, "pass --calibrate to measure"
    if tokens_per_second is not None:
        hours, basis = tokens / tokens_per_second / 3600, f"measured here: {tokens_per_second:,.0f} tokens/s an actor"
    if hours is None:
        return "\n".join([*lines, f"             hours are not known: {basis}"])
    lines.append(
        f"             {hours:,.3g} hours of one actor, {hours / run.num_actors:,.3g} of {run.num_actors} ({basis})"
    )
    return "\n".join(lines)


def _size(corpus: Path, extraction: Extraction) -> tuple[float, float, str]:
    """(texts, tokens, where the figures are from)."""
    counts = _counts(corpus / "manifest.json")
    if counts.get("characters"):
        rows, tokens = float(counts["rows"]), counts["characters"] / CHARACTERS_A_TOKEN
        basis = f"of {corpus}, {CHARACTERS_A_TOKEN} characters a token"
    else:
        tokens = float(PAPER_SENTENCES * TOKENS_A_SENTENCE)
        rows, basis = tokens / 1000, "assumed: the papers' 50 M sentences, 1,000 tokens a text; there is no corpus yet"
    shares = [1.0]
    if extraction.limit_rows is not None:
        shares.append(extraction.limit_rows / rows)
    if extraction.limit_tokens is not None:
        shares.append(extraction.limit_tokens / tokens)
    return rows * min(shares), tokens * min(shares), basis


def _counts(manifest: Path) -> dict[str, Any]:
    try:
        return json.loads(manifest.read_text())["counts"]
    except (OSError, ValueError, KeyError):
        return {}
