"""`make bench BENCH=quality`: whether a SARM ranks as its baselines do, on unseen prompts. Writes outputs/bench/quality.json.

Four systems, three seeds, the demo's settings: SARM, a scalar head on the same truncated backbone, one on the whole backbone, and a
SARM whose encoder is random. Beside them what needs no training: a logistic probe on the truncated backbone's frozen activations, and the
shorter answer. Trainings are pieces: each leaves a file under outputs/quality/runs, and a call goes on with those that
are missing, for `--minutes` at most. Every run and the summary are in MLflow, experiment `quality`.

    python tests/bench/bench_quality.py --pairs pairs.jsonl.gz --minutes 90

`--pieces` names some of the trainings, so that processes of one thread each share them, which is more than one process of two threads does:

    OMP_NUM_THREADS=1 python tests/bench/bench_quality.py --pieces sarm-0 scalar-0
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from quality_data import FULL_DEPTH, chat_of, prepare, preset

from sarm.data.formats.models import model_folder
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import token_batches
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.session import open_session
from sarm.evaluate.intervals import difference_interval, share_interval
from sarm.evaluate.statistics import pair_credit
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.stages.evaluate_frozen import probe_scores, read_frozen
from sarm.stages.reward_models import build_model
from sarm.training.head_start import start_head_
from sarm.training.reward import parameter_groups, train_reward
from sarm.training.reward_engine import LocalEngine

ROOT = Path(__file__).parents[2]
SHARED_PAIRS = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless" / "pairs.jsonl.gz"
SEEDS = (0, 1, 2)


class System(NamedTuple):
    """Which backbone and head, and the settings that differ from the demo's."""

    folder: str
    has_sae: bool
    changes: dict[str, Any]


SYSTEMS = {
    "sarm": System("truncated", True, {}),
    "scalar": System("truncated", False, {}),
    "random_encoder": System("truncated", True, {"encoder": "random_matched"}),
    "random_directions": System("truncated", True, {"encoder": "random"}),
    "scalar_full": System("full", False, {}),
}


REFERENCES = ("probe", "shorter")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=Path, default=SHARED_PAIRS, help="preference pairs beside the demo's")
    parser.add_argument("--root", type=Path, default=ROOT / "outputs" / "quality")
    parser.add_argument("--minutes", type=float, default=90.0, help="start no training after that")
    pieces = [f"{name}-{seed}" for seed in SEEDS for name in SYSTEMS]
    parser.add_argument("--pieces", nargs="*", choices=pieces, default=pieces, help="do these trainings alone")
    arguments = parser.parse_args()
    if not arguments.pairs.exists():
        raise SystemExit(f"no pairs at {arguments.pairs}. Pass --pairs FILE.")
    root, began = arguments.root.absolute(), time.monotonic()
    prepare(root, arguments.pairs.absolute())
    runs = root / "runs"
    runs.mkdir(exist_ok=True)
    tracker = Tracker(RunSettings(out=root / "study", experiment="quality"), "quality study", _parent_id(root))
    (root / "mlflow_run").write_text(tracker.parent.run_id)
    for seed in SEEDS:
        for name in SYSTEMS:
            target = runs / f"{name}-{seed}.parquet"
            is_due = target.stem in arguments.pieces and not target.exists()
            if not is_due or time.monotonic() - began > 60 * arguments.minutes:
                continue
            with tracker.stage(f"{name}, seed {seed}", None, {"system": name, "seed": seed}) as child:
                scores, figures = train_and_score(root, name, seed, lambda step, m: child.log_metrics(m, step))
                child.log_metrics(figures)
                partial = target.with_suffix(".partial")
                pq.write_table(scores.replace_schema_metadata({"figures": json.dumps(figures)}), partial)
                partial.rename(target)
            print(f"{name}, seed {seed}: {figures}", flush=True)
    for trained in sorted(runs.glob("sarm-*.parquet"))[:1]:
        write_references(root, pq.read_table(trained), runs)
    summary = summarise(runs)
    tracker.parent.log_metrics(_flat(summary))
    tracker.parent.log_text(json.dumps(summary, indent=2), "quality.json")
    if all(len(summary["systems"].get(name, {}).get("by_seed", ())) == len(SEEDS) for name in SYSTEMS):
        tracker.parent.end("FINISHED")
    out = ROOT / "outputs" / "bench" / "quality.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=2))
    show(summary)


def train_and_score(root: Path, name: str, seed: int, log: Any) -> tuple[pa.Table, dict[str, float]]:
    """One training, and its rewards of the held-out pairs."""
    system = SYSTEMS[name]
    folder = root / system.folder
    config = preset(folder, FULL_DEPTH if system.folder == "full" else None)
    reward: RewardSettings = replace(config.reward, **system.changes)
    chat, row_tokens = chat_of(config), config.model.max_length
    train, heldout = (load_pairs(folder / "pairs", split) for split in ("train", "heldout"))
    groups = list(prompt_groups(train, chat))
    began = time.monotonic()
    sae = folder / "sae" if system.has_sae else None
    chat_ends = folder / "activations" / "chat"
    model = build_model(config.model, model_folder(config.model), sae, chat, reward, seed, chat_ends)
    start_head_(model, chat_ends, train, seed, groups, reward.encoder)
    heldout_groups = list(prompt_groups(heldout, chat))
    engine = LocalEngine(model.train(), parameter_groups(model, reward), reward.max_grad_norm)
    train_reward(engine, groups, reward, seed, row_tokens, chat.pad_id, log)
    rewards, alive = score(model.eval(), heldout_groups, row_tokens, chat.pad_id)
    sources = {row["pair_id"]: row["subset"] for row in heldout.select(["pair_id", "subset"]).to_pylist()}
    rows = [
        {
            "pair_id": pair.pair_id,
            "prompt_id": group.prompt_id,
            "source": sources[pair.pair_id],
            "chosen_reward": rewards[group.prompt_id, pair.chosen],
            "rejected_reward": rewards[group.prompt_id, pair.rejected],
        }
        for group in heldout_groups
        for pair in group.pairs
    ]
    table = pa.Table.from_pylist(rows)
    margins_N = np.array([row["chosen_reward"] - row["rejected_reward"] for row in rows])
    figures = {
        "heldout_accuracy": float(pair_credit(margins_N).mean()),
        "train_pairs": float(sum(len(group.pairs) for group in groups)),
        "seconds": time.monotonic() - began,
    }
    return table, figures | ({"alive_at_reward": alive} if alive is not None else {})


@torch.inference_mode()
def score(
    model: SarmForSequenceClassification, groups: list[PromptGroup], row_tokens: int, pad_id: int
) -> tuple[dict[Any, float], float | None]:
    """Reward of every response by (prompt, place), and the share of latents that fire at any of them."""
    rewards: dict[Any, float] = {}
    fired = torch.zeros(model.config.d_sae, dtype=torch.bool)
    for batch in token_batches([row for group in groups for row in group.rows(row_tokens)], 2048, pad_id):
        output = model(**batch.model_inputs())
        rewards |= dict(zip(batch.keys, output.logits.squeeze(-1).tolist(), strict=True))
        if output.latent_indices is not None:
            fired[output.latent_indices[output.latent_values > 0]] = True
    return rewards, float(fired.float().mean()) if len(fired) else None


def write_references(root: Path, like: pa.Table, runs: Path) -> None:
    """The rewards of what is not trained, for the pairs of `like`, beside those of the trainings."""
    config = preset(root / "truncated")
    names = ("pair_id", "prompt_id", "source", "chosen_reward", "rejected_reward")
    like = like.select(names).cast(
        pa.schema([(n, pa.float32() if n.endswith("reward") else pa.string()) for n in names])
    )
    with open_session(config) as session:
        probe = probe_scores(read_frozen(session), like)
    texts = {row["pair_id"]: row for row in load_pairs(config.run.out / "pairs", "heldout").to_pylist()}
    shorter = like
    for side in ("chosen", "rejected"):
        place, name = like.schema.get_field_index(f"{side}_reward"), f"{side}_reward"
        rewards = [-float(len(texts[pair_id][side])) for pair_id in like["pair_id"].to_pylist()]
        shorter = shorter.set_column(place, name, pa.array(rewards, pa.float32()))
    for name, scores in zip(REFERENCES, (probe, shorter), strict=True):
        pq.write_table(scores.replace_schema_metadata({"figures": "{}"}), runs / f"{name}-0.parquet")


def summarise(runs: Path) -> dict[str, Any]:
    """Accuracy of each system, mean over its seeds, and differences from SARM over the seeds that both have; intervals over prompts."""
    credits: dict[str, dict[int, Any]] = {name: {} for name in (*SYSTEMS, *REFERENCES)}
    alive: dict[str, list[float]] = {}
    prompts_N = sources_N = None
    for path in sorted(runs.glob("*.parquet")):
        name, _, seed = path.stem.rpartition("-")
        table = pq.read_table(path).sort_by("pair_id")
        margins_N = table["chosen_reward"].to_numpy() - table["rejected_reward"].to_numpy()
        credits[name][int(seed)] = pair_credit(margins_N)
        prompts_N = np.array(table["prompt_id"].to_pylist())
        sources_N = np.array(["demo" if str(s).startswith("demo") else "other" for s in table["source"].to_pylist()])
        figures = json.loads((table.schema.metadata or {})[b"figures"])
        if "alive_at_reward" in figures:
            alive.setdefault(name, []).append(figures["alive_at_reward"])
    if prompts_N is None or sources_N is None:
        return {"systems": {}, "sarm_minus": {}}

    def measured(values_N: Any, interval: Any) -> dict[str, Any]:
        def with_interval(of_N: Any) -> dict[str, Any]:
            return {"value": float(values_N[of_N].mean()), "ci95": list(interval(values_N[of_N], prompts_N[of_N]))}

        by_source = {str(source): with_interval(sources_N == source) for source in np.unique(sources_N)}
        return {**with_interval(np.full(len(values_N), True)), "by_source": by_source}

    systems, sarm_minus = {}, {}
    for name, by_seed in credits.items():
        if not by_seed:
            continue
        mean_N = np.mean(list(by_seed.values()), axis=0)
        systems[name] = {
            **measured(mean_N, share_interval),
            "by_seed": {seed: float(one.mean()) for seed, one in sorted(by_seed.items())},
            **({"alive_at_reward": float(np.mean(alive[name]))} if name in alive else {}),
        }
        ours = credits["sarm"]
        common = sorted(ours if name in REFERENCES else by_seed.keys() & ours.keys())
        if name != "sarm" and common:
            gain_N = np.mean([ours[seed] - by_seed.get(seed, mean_N) for seed in common], axis=0)
            sarm_minus[name] = {**measured(gain_N, difference_interval), "seeds": common}
    return {
        "systems": systems,
        "sarm_minus": sarm_minus,
        "heldout_pairs": len(prompts_N),
        "heldout_prompts": len(np.unique(prompts_N)),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the summary as a table: all held-out pairs, then those of each source."""

    def cells(one: dict[str, Any], sign: str) -> str:
        parts = [one, *one["by_source"].values()]
        return "  ".join(f"{p['value']:{sign}.3f} [{p['ci95'][0]:{sign}.3f}, {p['ci95'][1]:{sign}.3f}]" for p in parts)

    print(f"{'':25s}all, then by source: {', '.join(next(iter(summary['systems'].values()))['by_source'])}")
    for name, one in summary["systems"].items():
        seeds = " ".join(f"{value:.3f}" for value in one["by_seed"].values())
        alive = f"  alive at the reward {one['alive_at_reward']:.3f}" if "alive_at_reward" in one else ""
        print(f"{name:25s}{cells(one, '')}  seeds {seeds}{alive}")
    for name, one in summary["sarm_minus"].items():
        print(f"{'sarm - ' + name:25s}{cells(one, '+')}")


def _flat(summary: dict[str, Any]) -> dict[str, float]:
    found = {}
    for part in ("systems", "sarm_minus"):
        for name, one in summary[part].items():
            low, high = one["ci95"]
            found |= {f"{part}/{name}": one["value"], f"{part}/{name}/low": low, f"{part}/{name}/high": high}
            if "alive_at_reward" in one:
                found[f"{part}/{name}/alive_at_reward"] = one["alive_at_reward"]
    return found


def _parent_id(root: Path) -> str | None:
    path = root / "mlflow_run"
    return path.read_text().strip() if path.exists() else None


if __name__ == "__main__":
    main()
