"""What collecting contexts costs beside the forward pass alone, and whether its memory stays flat.

The demo's model at half depth with a dictionary of 10,240 random latents, so that nearly all of them fire, over the demo's own texts
and answers; the bare pass computes the residual stream of the very same batches of tokens, tokenised beforehand. The two take
turns slice by slice, so that what else the machine does falls on both. Then the tally alone on a long made-up stream, for its memory
and its speed.

    make bench BENCH=contexts      (after make demo)
"""

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch

from sarm.data.formats.sarm_folder import load_sarm, save_sarm
from sarm.data.store.activations import ActivationStore
from sarm.data.store.blocks import FILE, ROW, read_block
from sarm.data.store.parts import finished_table
from sarm.data.tokens.packing import Row, token_batches
from sarm.interpret.context_tables import choose
from sarm.interpret.tallies import Tally, Units
from sarm.nn.architectures import build_sae
from sarm.nn.backbone import residual_stream
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.sae import standardise
from sarm.passes.contexts import UNITS, PairUnits, TextUnits
from sarm.passes.reader import sarm_reader
from sarm.settings.contexts import ContextsSettings
from sarm.stages.context_blocks import pair_blocks, text_blocks
from sarm.stages.context_collection import tally_units

DEMO = Path("outputs/demo")
OUT = Path("outputs/bench/contexts.json")
NUM_LATENTS, K, NUM_SLICES = 10_240, 27, 6
STREAM_UNITS, STREAM_BATCH = 400_000, 2_048
_PAIR_COLUMNS = ("pair_id", "prompt_id", "prompt", "chosen", "rejected", "margin", "subset", FILE, ROW)
_TEXT_COLUMNS = ("row_id", "text", FILE, ROW)


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        passes = against_bare_forward(random_dictionary(Path(folder)))
    stream = made_up_stream()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"passes": passes, "stream": stream}, indent=1))


def random_dictionary(folder: Path) -> Path:
    """The demo's reward model with a random dictionary instead of its own, which is mostly silent."""
    demo = load_sarm(DEMO / "sarm")
    sae = build_sae("topk", demo.sae.d_in, NUM_LATENTS, K)
    sample = ActivationStore(DEMO / "activations" / "text").read()[1]
    sae.initialise_(standardise(sample), torch.Generator().manual_seed(0))
    fields = {
        key: value for key, value in demo.config.to_dict().items() if key not in ("model_type", "d_sae", "k", "sae")
    }
    config = SarmConfig(**fields, d_sae=NUM_LATENTS, k=K, sae={"architecture": "topk", "signed": False})
    chat = sarm_reader(DEMO / "sarm").chat
    save_sarm(SarmForSequenceClassification(config, demo.model, sae), chat, folder)
    return folder


def against_bare_forward(folder: Path) -> dict[str, float]:
    """Tokens a second of collection (forward, SAE, sentences, tokenising, tally) and of the residual stream alone."""
    settings = ContextsSettings(split="all", corpus=True, max_texts=NUM_SLICES * 16)
    reader, threads = sarm_reader(folder, settings.batch_tokens), torch.get_num_threads()
    files = [sorted((DEMO / name).glob("*.parquet")) for name in ("pairs", "corpus")]
    numbers = {str(path): number for own in files for number, path in enumerate(own)}
    works = [
        (PairUnits(reader, numbers, threads), _PAIR_COLUMNS, pair_blocks(files[0], "all")[0][:NUM_SLICES]),
        (TextUnits(reader, numbers, threads), _TEXT_COLUMNS, text_blocks(files[1], settings.max_texts)[0]),
    ]
    blocks = [(actor, read_block(block, columns)) for actor, columns, own in works for block in own]
    packed: list[Row] = []
    seconds = {"collection": 0.0, "bare": 0.0}
    tokens = []

    def bare_pass() -> float:
        batches = token_batches([row for row in packed if row.taken], settings.batch_tokens, 0)
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                residual_stream(reader.model.model, batch.input_ids, batch.position_ids, batch.segment_ids)
        tokens.append(sum(int((batch.segment_ids >= 0).sum()) for batch in batches))
        return time.perf_counter() - started

    def collected() -> Iterator[pa.Table]:
        for actor, table in blocks:
            prepared = actor.prepare(table)
            yield finished_table(actor.compute(prepared, lambda: None)[0]["units"], UNITS)
            packed[:] = [row for piece in prepared for row in piece.rows]
            seconds["bare"] += bare_pass()

    warm = collected()
    next(warm), next(warm)  # the first of both passes
    tokens.clear()
    seconds["bare"] = 0.0
    started = time.perf_counter()
    tallies = tally_units(collected(), settings, NUM_LATENTS)
    seconds["collection"] = time.perf_counter() - started - seconds["bare"]
    num_tokens = sum(tokens)
    figures = {name: num_tokens / value for name, value in seconds.items()}
    figures |= {"tokens": num_tokens, "share": figures["collection"] / figures["bare"]}
    figures["latents"] = int((tallies["sentence"].count.sum(0) > 0).sum())
    print(f"bare forward        {figures['bare']:10,.0f} tokens/s")
    print(
        f"collection          {figures['collection']:10,.0f} tokens/s   {figures['share']:.1%} of it, {figures['latents']:,} latents fired"
    )
    return figures


def made_up_stream() -> dict[str, float]:
    """Tally of a long stream of distinct texts: units a second, and memory after its first tenth and at its end."""
    rng = np.random.default_rng(0)
    settings = ContextsSettings()
    tally = Tally(NUM_LATENTS, settings.top, settings.sampled)
    memory, seconds = [], 0.0
    for first in range(0, STREAM_UNITS, STREAM_BATCH):
        units = Units(
            ref=np.arange(first, first + STREAM_BATCH),
            key=rng.integers(1 << 63, size=STREAM_BATCH).astype(np.uint64),
            readers=np.tile([0, 0, 1], (STREAM_BATCH, 1)),
            offset=np.arange(STREAM_BATCH + 1) * K,
            latent=rng.integers(NUM_LATENTS, size=STREAM_BATCH * K),
            value=rng.gamma(2.0, size=STREAM_BATCH * K).astype(np.float32),
        )
        started = time.perf_counter()
        tally.add(units)
        seconds += time.perf_counter() - started
        if first // STREAM_BATCH in (STREAM_UNITS // STREAM_BATCH // 2, STREAM_UNITS // STREAM_BATCH - 1):
            gc.collect()
            memory.append(psutil.Process().memory_info().rss / 1e6)
    chosen = choose(tally, settings.per_decile)
    per_latent = len(chosen.latent) / NUM_LATENTS
    figures = {"units": STREAM_UNITS, "units_per_second": STREAM_UNITS / seconds, "mb_half": memory[0], "mb_end": memory[-1], "contexts_per_latent": per_latent}  # fmt: skip
    print(f"tally alone         {figures['units_per_second']:10,.0f} units/s, {per_latent:.1f} contexts a latent")
    print(f"memory              {memory[0]:10,.0f} MB half way, {memory[-1]:,.0f} MB at the end")
    return figures


if __name__ == "__main__":
    main()
