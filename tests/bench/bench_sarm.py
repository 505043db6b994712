"""`make bench BENCH=sarm`: how fast a reward model trains beside trl's `RewardTrainer`, and what sharing a prompt is worth.

SmolLM2-135M-Instruct truncated at layer 15, real multi-turn pairs, batches of 8 pairs. Every arm runs in fresh processes with the same
threads and allocator settings, turn about; a step's time is the median over all steps but each process's first. Writes
outputs/bench/sarm.json and prints a table.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_sae import HERE, ROOT, THREADS, _cpu, _python

OUT = ROOT / "outputs" / "bench" / "sarm.json"
SHARED_PAIRS = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless" / "pairs.jsonl.gz"
LAYER, D_SAE, K, MAX_LENGTH, BATCH = 15, 9216, 27, 512, 8
ARMS = ("trl", "unshared", "shared")
BOUNDS = {
    "vs_trl": (">=", 2.5),
    "vs_unshared": (">=", 1.4),
    "peak_memory_vs_trl": ("<", 1.0),
    "peak_memory_vs_unshared": ("<", 1.0),
}


def main() -> None:
    """Prepare, run every arm, write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--pairs", type=Path, default=SHARED_PAIRS, help="preference pairs; the demo's if there are none"
    )
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        source = str(arguments.pairs) if arguments.pairs.exists() else "demo:harm"
        code = "import sys; sys.path.insert(0, sys.argv[1]); import bench_sarm; bench_sarm.prepare(*sys.argv[2:])"
        _python("-c", code, str(HERE), folder, source, str(arguments.num_pairs))
        for number in range(arguments.rounds):
            for name in ARMS:
                script = str(HERE / "reward_steps.py")
                text = _python(script, name, folder, "--batch", str(BATCH), "--threads", str(THREADS))
                runs[name].append(json.loads(text.splitlines()[-1]))
                seconds = statistics.median(runs[name][-1]["seconds"])
                print(
                    f"round {number + 1}: {name} {BATCH / seconds:.2f} pairs/s, {runs[name][-1]['mb_peak']:.0f} MB",
                    flush=True,
                )
    figures = figures_of(runs) | {
        "pairs": "demo:harm" if source == "demo:harm" else Path(source).name,
        "sizes": {
            "layer": LAYER,
            "d_sae": D_SAE,
            "k": K,
            "batch_pairs": BATCH,
            "num_pairs": arguments.num_pairs,
            "dtype": "float32",
        },
        "machine": {"cpu": _cpu(), "threads": THREADS, "python": platform.python_version()},
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=2))
    show(figures)


def figures_of(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Pairs/s and megabytes of each arm, and ours in relation."""
    seconds = {name: statistics.median(s for run in of for s in run["seconds"]) for name, of in runs.items()}
    peak = {name: statistics.median(run["mb_peak"] for run in of) for name, of in runs.items()}
    return {
        "pairs_per_second": {name: BATCH / s for name, s in seconds.items()},
        "step_seconds": {name: [s for run in of for s in run["seconds"]] for name, of in runs.items()},
        "cpu_seconds": {name: [s for run in of for s in run["cpu_seconds"]] for name, of in runs.items()},
        "tokens": {name: of[0]["tokens"] for name, of in runs.items()},
        "mb_peak": peak,
        "mb_of_training": {n: statistics.median(r["mb_peak"] - r["mb_before"] for r in of) for n, of in runs.items()},
        "vs_trl": seconds["trl"] / seconds["shared"],
        "vs_unshared": seconds["unshared"] / seconds["shared"],
        "peak_memory_vs_trl": peak["shared"] / peak["trl"],
        "peak_memory_vs_unshared": peak["shared"] / peak["unshared"],
    }


def prepare(folder: str, source: str, num_pairs: str) -> None:
    """A truncated classifier, a random SAE of the demo's size, and the first pairs by hash of their ids, tokenised."""
    import pyarrow.dataset as ds
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from sarm.data.formats.models import model_folder
    from sarm.data.formats.sae_folder import save_sae
    from sarm.data.sources.prepare import prepare_pairs
    from sarm.data.tokens.chat import load_chat_tokenizer
    from sarm.data.tokens.groups import prompt_groups
    from sarm.nn.pretrained import read_config
    from sarm.nn.topk import TopKSae
    from sarm.settings.data import DataSettings
    from sarm.settings.model import ModelSettings

    target, model = Path(folder), ModelSettings(layer=LAYER, max_length=MAX_LENGTH)
    files = model_folder(model)
    config = read_config(files, LAYER)
    config.num_labels, config.pad_token_id = 1, AutoTokenizer.from_pretrained(files).pad_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained(files, config=config, dtype=torch.float32)
    classifier.save_pretrained(target / "model")
    chat = load_chat_tokenizer(model, files)
    chat.tokenizer.save_pretrained(target / "model")
    sae = TopKSae(config.hidden_size, D_SAE, K)
    sae.initialise_(torch.randn(1024, config.hidden_size), torch.Generator().manual_seed(0))
    (target / "sae").mkdir()
    save_sae(sae, target / "sae", {})
    prepare_pairs(DataSettings(pairs=(source,), heldout_share=0.1, max_pairs_per_prompt=1), target / "pairs")
    table = ds.dataset(target / "pairs").to_table().slice(0, int(num_pairs))
    pairs = [
        [group.tokens[pair.chosen].ids, group.tokens[pair.rejected].ids]
        for group in prompt_groups(table, chat)
        for pair in group.pairs
    ]
    (target / "pairs.json").write_text(json.dumps(pairs))


def show(figures: dict[str, Any]) -> None:
    """Print arms and bounds as tables."""
    print(f"\nreward training, {figures['sizes']}, {figures['pairs']}, {THREADS} threads ({_cpu()})")
    for name, rate in figures["pairs_per_second"].items():
        tokens, peak, own = (figures[key][name] for key in ("tokens", "mb_peak", "mb_of_training"))
        print(
            f"  {name:<12}{rate:8.2f} pairs/s{tokens:9,} tokens{peak:8.0f} MB at most, {own:.0f} of them for training"
        )
    for name, (relation, bound) in BOUNDS.items():
        met = figures[name] < bound if relation == "<" else figures[name] >= bound
        print(f"  {name:<26}{figures[name]:8.3f}  {relation} {bound:<6}{'' if met else '  MISSED'}")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
