"""`make bench BENCH=dictionaries`: what dictionaries that are good where the reward is read cost. Writes outputs/bench/dictionaries.json.

cost      the training answers' true ends alone, beside the same with an end of turn behind each sentence, and behind an eighth of the
          words too: one process, the same batches of pairs, turn about. Of several rounds the best counts: other work only slows
frozen    dictionaries by the papers' recipe and at turn ends, with and without the reward's direction, and with a random one: on prompts
          that neither they nor the heads have seen (three folds by a hash that no tuning has used)
whole     SARM by the demo's recipe beside a scalar head, a random encoder and the papers' recipe, each fold held out in turn: hours

    python tests/bench/bench_dictionaries.py --parts cost
    python tests/bench/bench_dictionaries.py --parts frozen --seeds 1
    python tests/bench/bench_dictionaries.py --parts whole --seeds 1 --folds 0
    python tests/bench/bench_dictionaries.py --parts cost --model tiny --rounds 1    # whether it runs
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from dictionary_folds import FOLDS, dictionaries, extracted, study
from dictionary_wholes import BESIDE, trained

from sarm.contracts.passes import Target
from sarm.contracts.tables import activations_table
from sarm.data.formats.models import model_folder
from sarm.data.sources.prepare import prepare_pairs
from sarm.engine.ray.machine import this_machine
from sarm.nn.pretrained import read_config
from sarm.passes.activations import Backbone, ChatActivations
from sarm.passes.turn_ends import PairTurnEnds
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.stages.fitting import fitted

OUT = Path(__file__).parents[2] / "outputs" / "bench" / "dictionaries.json"
THREADS = 2
WORD_SHARE = 0.125
BOUNDS = {"sentence_branch_time": 1.04}


def main() -> None:
    """Run the parts and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--model", choices=["demo", "tiny"], default="demo", help="the preset whose model and pairs are read"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of each dictionary on each fold")
    parser.add_argument("--folds", nargs="*", type=int, choices=range(FOLDS), default=list(range(FOLDS)))
    parser.add_argument("--dictionaries", nargs="*", choices=list(dictionaries()), default=list(dictionaries()))
    parser.add_argument(
        "--beside", nargs="*", choices=BESIDE, default=BESIDE, help="what SARM stands beside in `whole`"
    )
    parser.add_argument(
        "--work", type=Path, default=OUT.with_suffix(""), help="where activations and finished trainings are kept"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    figures: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for part in arguments.parts:
        figures |= PARTS[part](fitted(PRESETS[arguments.model][1], this_machine()).config, arguments)
    figures["sizes"] = {
        "preset": arguments.model,
        "threads": THREADS,
        "rounds": arguments.rounds,
        "seeds": arguments.seeds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2))
    for name, row in {**figures.get("frozen", {}), "whole trainings": figures.get("whole", {})}.items():
        print(f"\n{name}")
        for key, value in row.items():
            shown = " ".join(f"{one:.3f}" for one in value) if isinstance(value, list) else value
            print(f"    {key:34} {f'{shown:.3f}' if isinstance(shown, float) else shown}")
    for name, value in figures.items():
        if name in ("frozen", "whole"):
            continue
        bound = f"   bound: at most {BOUNDS[name]}" if name in BOUNDS else ""
        print(f"{name:24} {value}{bound}")


def cost(preset: Pipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and tokens of branches, as shares of those of the answers without any."""
    pairs = _training_pairs(preset)
    readers: dict[str, tuple[Backbone, Any]] = {
        "true_ends": _reader(preset, pairs, ChatActivations),
        "sentences": _reader(preset, pairs, PairTurnEnds, units=(TURN_END,)),
        "words": _reader(preset, pairs, PairTurnEnds, units=(TURN_END,), word_share=WORD_SHARE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    tokens, rows = {}, {}
    for _ in range(arguments.rounds):
        for name, (actor, prepared) in readers.items():
            started = time.perf_counter()
            tables, spent = actor.compute(prepared, lambda: None)
            seconds[name].append(time.perf_counter() - started)
            (table,) = tables.values()
            tokens[name], rows[name] = spent.tokens, table.num_rows
    best = {name: min(own) for name, own in seconds.items()}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "rows": rows,
        "sentence_branch_time": best["sentences"] / best["true_ends"],
        "sentence_branch_tokens": tokens["sentences"] / tokens["true_ends"],
        "word_branch_time": best["words"] / best["true_ends"],
        "word_branch_tokens": tokens["words"] / tokens["true_ends"],
    }


def frozen(preset: Pipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """The study of `dictionary_folds`."""
    material = extracted(preset, arguments.work)
    return {"frozen": study(material, arguments.work, arguments.seeds, arguments.dictionaries)}


def whole(preset: Pipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """The study of `dictionary_wholes`."""
    found = trained(preset, arguments.work / "whole", arguments.folds, arguments.seeds, arguments.beside)
    about = ("sarm_minus_scalar_head", "sarm_minus_random_encoder", "sarm_minus_papers")
    named = {name.removesuffix("_head"): found[name] for name in about if name in found}
    pairs = {name: value[0] for name, value in named.items()} | {
        f"{name}_ci95": value[1:] for name, value in named.items()
    }
    return {"whole": found, **pairs}


def _training_pairs(preset: Pipeline) -> pa.Table:
    with tempfile.TemporaryDirectory() as name:
        prepare_pairs(preset.data, Path(name))
        table = pq.read_table(sorted(Path(name).glob("*.parquet")))
    return table.filter(pc.equal(table.column("split"), "train"))


def _reader(preset: Pipeline, pairs: pa.Table, actor: Callable[..., Any], **units: Any) -> tuple[Backbone, Any]:
    """An actor at work on one target, and the pairs as it prepares them."""
    extraction = ExtractionSettings(batch_tokens=preset.extraction.batch_tokens, **units)
    folder = model_folder(preset.model)
    d_in = read_config(folder, preset.model.layer).hidden_size
    schema = activations_table(d_in, {"dtype": extraction.dtype}, kinds=bool(units))
    target = Target(TURN_END if units else "chat", preset.model.layer)
    made = actor(preset.model, folder, extraction, {target: schema}, THREADS)
    return made, made.prepare(pairs)


PARTS: dict[str, Callable[[Pipeline, argparse.Namespace], dict[str, Any]]] = {
    "cost": cost,
    "frozen": frozen,
    "whole": whole,
}

if __name__ == "__main__":
    main()
