"""The report of a run, built from its finished folders: report.json, report.md, report.html, and pictures in MLflow."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sarm.config import Evaluation
from sarm.data.parts import part_files
from sarm.data.sarm_artifacts import load_sarm
from sarm.data.statistics import reliability_bins
from sarm.interpret import figures
from sarm.interpret.attribution import pair_explanation, top_features
from sarm.interpret.report import Report, ReportFiles, as_dict, describe_features, describe_pair, write_report
from sarm.manifest import MANIFEST, Manifest, parse_manifest
from sarm.runtime.plan import BASELINES
from sarm.runtime.session import Session
from sarm.runtime.training.reward_training import load_pairs

_NAMES = {
    "sarm": "SARM",
    **BASELINES,
    "probe": "logistic probe, frozen backbone",
    "shorter_answer": "shorter answer",
    "longer_answer": "longer answer",
    "random": "random",
}
_CONTEXTS_SHOWN, _PAIRS_SHOWN = 3, 6


def report(session: Session, title: str, evaluation: Evaluation) -> tuple[ReportFiles, dict[str, Any]]:
    """Write the report beside the stage folders and log it to the parent run; returns its files and its content."""
    folders = session.folders
    manifests = _manifests(folders.out)
    metrics = json.loads((folders.evaluation / "metrics.json").read_text())
    scores = ds.dataset([str(p) for p in part_files(folders.evaluation / "sarm_scores")]).to_table()
    features = pq.read_table(folders.evaluation / "features.parquet")
    contexts = pq.read_table(folders.evaluation / "contexts.parquet")
    raising, lowering = (
        describe_features(table, contexts, _CONTEXTS_SHOWN) for table in top_features(features, evaluation.top_features)
    )
    accuracies = [
        {"name": label, "accuracy": metrics[key]["accuracy"], "ci95": metrics[key]["accuracy_ci95"]}
        for key, label in _NAMES.items()
        if metrics.get(key, {}).get("accuracy") is not None
    ]
    pictures = _pictures(session, metrics, scores, features, accuracies, raising, lowering)
    content = Report(
        title=title,
        facts=_facts(manifests, metrics),
        headline=_headline(manifests, metrics),
        accuracies=accuracies,
        stages=[_stage_row(name, manifest) for name, manifest in manifests.items()],
        subsets=metrics["sarm"].get("by_subset", {}),
        calibration={key: metrics["sarm"].get(key) for key in ("nll", "brier", "ece")},
        raising=raising,
        lowering=lowering,
        pairs=_explained_pairs(session, scores),
        rejected_rows=_rejected(manifests),
        figures={caption: figures.as_svg(figure) for caption, figure in pictures.items()},
        notes=_notes(metrics),
        ui_command=_ui_command(session.tracker.uri),
    )
    files = write_report(content, folders.out)
    parent = session.tracker.parent
    for caption, figure in pictures.items():
        parent.log_figure(figure, f"figures/{caption.lower().replace(' ', '_').replace(',', '')}.png")
    for path in files:
        parent.log_artifact(path)
    parent.log_metrics({key: value for key, value in content.headline.items() if isinstance(value, int | float)})
    parent.log_table(accuracies, "accuracies.json")
    return files, as_dict(content)


def _ui_command(uri: str) -> str:
    """`make ui` opens the database that runs use by default; any other place is named."""
    default = f"sqlite:///{Path.cwd() / 'outputs' / 'mlflow.db'}"
    return "make ui" if uri == default else f"make ui MLFLOW_URI={shlex.quote(uri)}"


def _manifests(out: Path) -> dict[str, Manifest]:
    """Finished stages by name, oldest first."""
    found = {
        path.parent.relative_to(out).as_posix(): parse_manifest(path.read_bytes())
        for path in out.glob("**/" + MANIFEST)
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].created, item[0])))


def _headline(manifests: dict[str, Manifest], metrics: dict[str, Any]) -> dict[str, Any]:
    sae = manifests["sae"].counts["figures"]
    headline = {
        "heldout_accuracy": metrics["sarm"].get("accuracy"),
        "heldout_accuracy_ci95": metrics["sarm"].get("accuracy_ci95"),
        "length_baseline_accuracy": metrics["shorter_answer"].get("accuracy"),
        "scalar_head_accuracy": metrics.get("scalar_head", {}).get("accuracy"),
        "probe_accuracy": metrics["probe"].get("accuracy"),
        "random_accuracy": metrics["random"].get("accuracy"),
        "num_heldout_pairs": metrics["sarm"].get("num_pairs"),
        "num_heldout_prompts": metrics["sarm"].get("num_prompts"),
        "mean_margin": metrics["sarm"].get("mean_margin"),
        "fvu": metrics["sae_on_heldout"]["fvu"],
        "fvu_sentence_ends": sae.get("fvu_text"),
        "alive_at_reward": sae.get("alive_at_reward"),
        "dead_share": sae.get("dead_share"),
        "completeness": metrics["completeness"],
        "protocol_version": metrics.get("protocol_version", 1),
        "peak_rss_gb": max(manifest.counts.get("peak_rss_gb", 0.0) for manifest in manifests.values()),
    }
    seconds = {name: manifest.counts.get("seconds") for name, manifest in manifests.items()}
    return {**headline, "total_seconds": sum(s for s in seconds.values() if s), "stage_seconds": seconds}


def _facts(manifests: dict[str, Manifest], metrics: dict[str, Any]) -> dict[str, Any]:
    sarm, sae, pairs = manifests["sarm"], manifests["sae"], manifests["pairs"]
    return {
        "model": sarm.config["name"],
        "layer": sarm.config["layer"],
        "d_sae": sae.config["d_sae"],
        "k": sae.config["k"],
        "training pairs": sarm.counts["figures"]["num_pairs"],
        "training prompts": sarm.counts["figures"]["num_prompts"],
        "held-out pairs": metrics["sarm"].get("num_pairs"),
        "held-out prompts": metrics["sarm"].get("num_prompts"),
        "split": f"prompts whose hash falls in the first {pairs.config['heldout_share']:.0%}",
        # An evaluation that says none is older than the second.
        "protocol version": metrics.get("protocol_version", 1),
        "ZeRO stage": sarm.config["zero_stage"],
        "code": sarm.git_commit[:12],
    }


def _stage_row(name: str, manifest: Manifest) -> dict[str, Any]:
    shown = {key: value for key, value in manifest.counts.get("figures", {}).items() if value is not None}
    text = ", ".join(
        f"{key.replace('_', ' ')} {value:,.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value:,}"
        for key, value in shown.items()
    )
    return {"stage": name, "seconds": manifest.counts.get("seconds"), "figures": text}


def _rejected(manifests: dict[str, Manifest]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, manifest in manifests.items():
        refused = dict(manifest.counts.get("rejected", {}))
        refused |= {
            key: manifest.counts[key]
            for key in ("duplicates", "contradictory", "over_prompt_cap", "truncated")
            if manifest.counts.get(key)
        }
        counts |= {f"{name}: {reason}": rows for reason, rows in refused.items() if rows}
    return counts


def _explained_pairs(session: Session, scores: pa.Table) -> list[dict[str, Any]]:
    """Pairs whose margins are spread over the whole range, worst first, each as a sum of features."""
    weight = load_sarm(session.folders.sarm).score.weight.detach().squeeze(0).numpy()
    pairs = {pair["pair_id"]: pair for pair in load_pairs(session.folders.pairs, "heldout").to_pylist()}
    margins = scores["chosen_reward"].to_numpy() - scores["rejected_reward"].to_numpy()
    order = np.argsort(margins)
    places = sorted({int(i) for i in np.linspace(0, len(order) - 1, _PAIRS_SHOWN)})
    rows = []
    for place in places:
        pair_id = scores["pair_id"][int(order[place])].as_py()
        pair = pairs[pair_id]
        rows.append(
            describe_pair(
                pair_explanation(scores, pair_id, weight, 8),
                pair["prompt"][-1]["content"],
                pair["chosen"],
                pair["rejected"],
            )
        )
    return rows


def _pictures(
    session: Session,
    metrics: dict[str, Any],
    scores: pa.Table,
    features: pa.Table,
    accuracies: list[dict[str, Any]],
    raising: list[dict[str, Any]],
    lowering: list[dict[str, Any]],
) -> dict[str, Any]:
    folders = session.folders
    histories = {
        path.name: json.loads((path / "history.json").read_text())
        for path in (folders.sae, folders.sarm, *(folders.out / name for name in BASELINES))
        if (path / "history.json").exists()
    }
    chosen, rejected = scores["chosen_reward"].to_numpy(), scores["rejected_reward"].to_numpy()
    rewards = {name: rows for kind, value in histories.items() if kind != "sae" for name, rows in value.items()}
    return {
        "Held-out accuracy": figures.accuracy_bars(accuracies),
        "Reward model training": figures.reward_curves(rewards),
        "SAE training": figures.sae_curves(histories["sae"]),
        "Rewards of held-out responses": figures.reward_histograms(chosen, rejected),
        "Calibration of held-out margins": figures.calibration_plot(*reliability_bins(chosen - rejected)),
        "Features by mean contribution": figures.contribution_bars(raising, lowering),
        "Head weight against frequency": figures.feature_scatter(features),
    }


def _notes(metrics: dict[str, Any]) -> list[str]:
    notes = [
        "Intervals resample prompts, since the pairs of one prompt depend on each other; the split was made by hash before anything was trained.",
        "Labels beside latents are the responses that fire them most, not explanations.",
    ]
    for name, difference in metrics["sarm_minus"].items():
        if difference.get("difference") is not None:
            low, high = difference["difference_ci95"]
            notes.append(
                f"SARM minus {_NAMES[name]}: {difference['difference']:+.3f} (95 % interval {low:+.3f} to {high:+.3f})."
            )
    return notes
