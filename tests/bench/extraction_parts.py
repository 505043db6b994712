"""The parts that `bench_extraction.py` times, each in a process of its own: `extraction_parts.py PART FOLDER [options as JSON]`.

`pass` is this project's; `loop`, `reference` and `sae_lens` are what it is compared with. Prints one JSON line at the end.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

LAYER, MAX_LENGTH = 15, 512


def main() -> None:
    part, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(options.get("threads", 2))
    print(
        json.dumps(
            {"pass": passes, "loop": loop, "reference": reference, "sae_lens": sae_lens, "order": order}[part](
                folder, **options
            )
        )
    )


def passes(folder: Path, runs: list[dict[str, Any]], threads: int = 2) -> list[dict[str, Any]]:
    """Extraction as the job does it, several times on one local Ray; each run: corpus, target, num_actors, cpus, layer, dtype."""
    from sarm.contracts.manifest import sha256_of
    from sarm.engine.peak_memory import peak_memory
    from sarm.engine.ray.cluster import connect
    from sarm.engine.ray.passes import run_over
    from sarm.settings.extraction import ExtractionSettings
    from sarm.settings.model import ModelSettings
    from sarm.settings.run import RunSettings

    found = []
    with connect(RunSettings(out=folder)) as cluster:
        for one in runs:
            model = ModelSettings(
                name="demo:smollm2",
                layer=one.get("layer", LAYER),
                max_length=MAX_LENGTH,
                dtype=one.get("dtype", "float32"),
            )
            run = RunSettings(out=folder, num_actors=one["num_actors"], cpus_per_worker=one["cpus"])
            extraction = ExtractionSettings(block_kilobytes=one.get("kilobytes", 1024))
            work = make_pass(folder / one["corpus"], folder / one["target"], model, extraction)
            started = time.perf_counter()
            with peak_memory() as memory:
                (counts,) = run_over(work, run, cluster).values()
            seconds = time.perf_counter() - started
            files = sorted((folder / one["target"]).glob("part-*"))
            started = time.perf_counter()
            for path in files:
                sha256_of(path)
            hashing = time.perf_counter() - started
            counts.pop("moments")
            size = sum(path.stat().st_size for path in files)
            found.append({**counts, "seconds": seconds, "hashing": hashing, "bytes": size, "peak": memory.peak})
            print(found[-1], flush=True)
    return found


def make_pass(corpus: Path, target: Path, model: Any, extraction: Any) -> Any:
    """The document pass over one corpus folder."""
    from sarm.contracts.passes import Target
    from sarm.contracts.tables import activations_table
    from sarm.data.formats.models import model_folder
    from sarm.data.store.blocks import plan_blocks
    from sarm.engine.passes import Pass
    from sarm.engine.ray.block_actor import Output
    from sarm.passes.activations import TextActivations

    output = Output(target, activations_table(576, {"dtype": "float16", "layer": model.layer}))
    key = Target("document", model.layer)
    return Pass(
        name=target.name,
        blocks=plan_blocks([corpus / "part-00000.parquet"], extraction.block_kilobytes),
        columns=("row_id", "text"),
        keep=None,
        actor=TextActivations,
        arguments={
            "model": model,
            "folder": model_folder(model),
            "extraction": extraction,
            "schemas": {key: output.table_schema},
        },
        outputs={key: output},
        id_columns=("row_id",),
        input_ids=_row_ids,
        output_id="row_id",
    )


def _row_ids(table: Any) -> list[int]:
    return table.column("row_id").to_pylist()


def loop(
    folder: Path,
    corpus: str,
    layer: int = LAYER,
    dtype: str = "float32",
    beside: int = 1,
    number: int = 0,
    threads: int = 2,
) -> dict[str, float]:
    """The truncated model over the very batches of the pass, tokenised beforehand; nothing is taken out or written.

    Begins when `beside` processes in all are ready for round `number`.
    """
    from sarm.data.formats.models import model_folder
    from sarm.data.store.blocks import read_block
    from sarm.data.tokens.chat import load_chat_tokenizer
    from sarm.data.tokens.windows import collate_windows, text_windows, window_batches
    from sarm.nn.pretrained import load_backbone
    from sarm.passes.usage import keep_freed_memory
    from sarm.settings.extraction import ExtractionSettings
    from sarm.settings.model import ModelSettings

    model = ModelSettings(name="demo:smollm2", layer=layer, max_length=MAX_LENGTH)
    chat = load_chat_tokenizer(model, model_folder(model))
    work = make_pass(folder / corpus, folder / "unused", model, ExtractionSettings())
    batches, tokens = [], 0
    for block in work.blocks:
        table = read_block(block, ["row_id", "text"])
        pairs = zip(table.column("row_id").to_pylist(), table.column("text").to_pylist(), strict=True)
        windows = [w for i, text in pairs for w in text_windows(i, text, ["document"], "rules", chat, MAX_LENGTH)]
        for members in window_batches(windows, ExtractionSettings().batch_tokens):
            batches.append(collate_windows(windows, members, chat.pad_id).input_ids)
            tokens += sum(len(windows[n].ids) for n in members)
    backbone = load_backbone(model_folder(model), layer, getattr(torch, dtype)).eval()
    # As the actors do: the difference is what surrounds the model.
    keep_freed_memory()
    ready = folder / f"ready-{beside}-{number}"
    ready.mkdir(exist_ok=True)
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < beside:
        time.sleep(0.01)
    with torch.inference_mode():
        started = time.perf_counter()
        for ids in batches:
            backbone(input_ids=ids, use_cache=False)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def reference(folder: Path, texts: list[str], threads: int = 2) -> dict[str, float]:
    """The whole model with logits and all hidden states, every text padded to the full length, as the papers' code does it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sarm.data.formats.models import model_folder
    from sarm.settings.model import ModelSettings

    source = model_folder(ModelSettings(name="demo:smollm2", layer=1))
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens, started = 0, time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(texts), 4):
            encoded = tokenizer(texts[start : start + 4], padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")  # fmt: skip
            model(**encoded, output_hidden_states=True).hidden_states[LAYER].half().numpy()
            tokens += int(encoded.attention_mask.sum())
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def order(folder: Path, sarm: str) -> dict[str, int]:
    """How many held-out pairs of the run that a SARM stands in are in the same order by its rewards in float32 and in bfloat16."""
    from sarm.data.store.pairs import load_pairs
    from sarm.data.tokens.groups import prompt_groups
    from sarm.passes.reader import sarm_reader

    is_right: list[list[bool]] = []
    for dtype in ("float32", "bfloat16"):
        reader = sarm_reader(Path(sarm), 2048, dtype)
        groups = list(prompt_groups(load_pairs(Path(sarm).parent / "pairs", "heldout"), reader.chat))
        found = reader.read([row for group in groups for row in group.rows(reader.row_tokens)])
        is_right.append(
            [
                found[group.prompt_id, pair.chosen].reward > found[group.prompt_id, pair.rejected].reward
                for group in groups
                for pair in group.pairs
            ]
        )
    return {"pairs": len(is_right[0]), "same": sum(a == b for a, b in zip(*is_right, strict=True))}


def sae_lens(folder: Path, texts: list[str], model_folder: str, num_tokens: int, threads: int = 2) -> dict[str, float]:
    """`ActivationsStore` of SAELens over the same texts, with its class for Hugging Face models, which stops behind the block.

    Contexts are as long as the pass's windows may be. Counts what went through the model.
    """
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = f"model.layers.{LAYER - 1}"
    ran = [0]

    class Counted(HookedProxyLM):
        def run_with_cache(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            ran[0] += tokens.numel()
            return super().run_with_cache(tokens, *args, **kwargs)

    language_model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    context, prompts = MAX_LENGTH, 4
    store = ActivationsStore(
        model=Counted(language_model, AutoTokenizer.from_pretrained(model_folder), hook_names=[name]),
        dataset=Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name=name,
        hook_head_index=None,
        context_size=context,
        d_in=576,
        n_batches_in_buffer=4,
        total_training_tokens=num_tokens,
        store_batch_size_prompts=prompts,
        train_batch_size_tokens=context * prompts,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    started = time.perf_counter()
    with torch.inference_mode():
        while ran[0] < num_tokens:
            batch = store.next_batch()
    seconds = time.perf_counter() - started
    return {"tokens": ran[0], "seconds": seconds, "bytes_a_token": batch[0].numel() * batch.element_size()}


if __name__ == "__main__":
    main()
