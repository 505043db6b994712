"""The report of a run, built from its finished folders: report.json, report.md, report.html, and pictures in MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.folders import BASELINES
from sarm.contracts.manifest import MANIFEST, Manifest, parse_manifest
from sarm.data.formats.sarm_folder import read_latents
from sarm.data.store.pairs import load_pairs
from sarm.data.store.parts import read_parts
from sarm.engine.mlflow import run_card
from sarm.engine.mlflow.ui_command import ui_command
from sarm.engine.session import Session
from sarm.evaluate.statistics import reliability_bins
from sarm.interpret.attribution import pair_explanation, top_features
from sarm.report import figures
from sarm.report.dictionary_note import dictionary_note_of
from sarm.report.report import Report, ReportFiles, as_dict, describe_features, describe_pair, write_report
from sarm.settings.evaluation import EvaluationSettings
from sarm.stages.report_citation import citation_of
from sarm.stages.report_notes import NAMES, name_of, notes_of

# Metrics of the parent run, and whose accuracy each is.
_COMPARED = {
    "heldout_accuracy": "sarm",
    "scalar_head_accuracy": "scalar_head",
    "probe_accuracy": "probe",
    "length_baseline_accuracy": "shorter_answer",
}
_READABLE = (
    "fvu_pca", "reward_fidelity", "num_alive_at_reward", "always_on_share", "dense_share", "latents_half_margin", "latents_ninety_margin",
    "names_auc", "sarm_minus_scalar",
)  # fmt: skip
_CONTEXTS_SHOWN, _PAIRS_SHOWN = 3, 6


def report(session: Session, title: str, evaluation: EvaluationSettings) -> tuple[ReportFiles, dict[str, Any]]:
    """Write the report beside the stage folders and log it to the parent run; returns its files and its content."""
    folders = session.folders
    manifests = _manifests(folders.out)
    metrics = json.loads((folders.evaluation / "metrics.json").read_text())
    scores = read_parts(folders.evaluation / "sarm_scores")
    features = pq.read_table(folders.evaluation / "features.parquet")
    contexts = pq.read_table(folders.evaluation / "contexts.parquet")
    top = top_features(features, evaluation.top_features)
    raising, lowering = (
        describe_features(table, contexts, _CONTEXTS_SHOWN, metrics.get("names", {}))
        for table in (top.raising, top.lowering)
    )
    accuracies = [
        {
            "name": name_of(key, metrics),
            "accuracy": metrics[key]["accuracy"],
            "ci95": metrics[key]["accuracy_ci95"],
        }
        for key in NAMES
        if metrics.get(key, {}).get("accuracy") is not None
    ]
    pictures = _pictures(
        session=session,
        metrics=metrics,
        scores=scores,
        features=features,
        accuracies=accuracies,
        raising=raising,
        lowering=lowering,
    )
    content = Report(
        title=title,
        facts=_facts(manifests, metrics),
        headline=_headline(manifests, metrics) | {"intercept": top.intercept, "num_always_on": top.always_on.num_rows},
        accuracies=accuracies,
        stages=[_stage_row(name, manifest) for name, manifest in manifests.items()],
        subsets=metrics["sarm"].get("by_subset", {}),
        calibration={key: metrics["sarm"].get(key) for key in ("nll", "brier", "ece")},
        raising=raising,
        lowering=lowering,
        pairs=_explained_pairs(session, scores),
        rejected_rows=_rejected(manifests),
        figures={caption: figures.as_svg(figure) for caption, figure in pictures.items()},
        notes=[*notes_of(metrics), *dictionary_note_of(folders.sarm)],
        citation=citation_of(title, folders, manifests),
        ui_command=ui_command(session.tracker.uri, session.tracker.experiment_id),
    )
    files = write_report(content, folders.out)
    compared = _compared(content.headline, metrics)
    _log(session=session, content=content, files=files, pictures=pictures, compared=compared)
    for data in map(run_card.data_set, manifests.values()):
        if data is not None:
            session.tracker.parent.log_data_set(data)
    return files, as_dict(content)


def _log(
    session: Session,
    content: Report,
    files: ReportFiles,
    pictures: Mapping[str, Any],
    compared: Mapping[str, float],
) -> None:
    """Pictures, files, the figures that runs are compared by, and a description, into the parent run."""
    parent = session.tracker.parent
    for caption, figure in pictures.items():
        parent.log_figure(figure, f"figures/{caption.lower().replace(' ', '_').replace(',', '')}.png")
    for path in files:
        parent.log_artifact(path)
    parent.log_metrics(compared)
    parent.log_table([dict(row) for row in content.accuracies], "accuracies.json")
    settings = {key: content.facts[key] for key in ("model", "layer", "d_sae", "k")}
    parent.log_params(settings)
    parent.set_tags({run_card.NOTE: run_card.description(settings, run_card.origin(), _figures(content.headline))})


def _compared(headline: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that people compare runs by: accuracies with their intervals, the dictionary's quality, what it cost.

    The plot of MLflow's comparison starts with the metric that was logged first: held-out accuracy.
    """
    accuracies: dict[str, Any] = {}
    for name, key in _COMPARED.items():
        measured = metrics.get(key, {})
        accuracies[name] = measured.get("accuracy")
        accuracies |= dict(zip((f"{name}_low", f"{name}_high"), measured.get("accuracy_ci95") or (), strict=False))
    accuracies |= {key: headline[key] for key in ("mean_margin", "num_heldout_pairs", "peak_rss_gb", "total_seconds")}
    accuracies |= {f"sae_{key}": headline[key] for key in ("fvu", "alive_at_reward", "dead_share")}
    accuracies |= {key: headline.get(key) for key in _READABLE}
    return {key: value for key, value in accuracies.items() if value is not None}


def _figures(headline: Mapping[str, Any]) -> str:
    """The main result as a sentence."""
    if headline["heldout_accuracy"] is None:
        return ""
    low, high = headline["heldout_accuracy_ci95"]
    text = f"Held-out accuracy **{headline['heldout_accuracy']:.1%}** ({low:.1%} to {high:.1%}, 95 % interval) over {headline['num_heldout_pairs']:,} pairs"
    beside = headline["scalar_head_accuracy"]
    return f"{text}; a scalar head on the same backbone {beside:.1%}." if beside is not None else f"{text}."


def _manifests(out: Path) -> dict[str, Manifest]:
    """Finished stages by name, oldest first."""
    manifests = {
        path.parent.relative_to(out).as_posix(): parse_manifest(path.read_bytes())
        for path in out.glob("**/" + MANIFEST)
    }
    return dict(sorted(manifests.items(), key=lambda item: (item[1].created, item[0])))


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
        **_readable(metrics),
        "completeness": metrics["completeness"],
        "protocol_version": metrics.get("protocol_version", 1),
        "peak_rss_gb": max(manifest.counts.get("peak_rss_gb", 0.0) for manifest in manifests.values()),
    }
    seconds = {name: manifest.counts.get("seconds") for name, manifest in manifests.items()}
    total = sum(_own_seconds(manifest) or 0.0 for manifest in manifests.values())
    return {**headline, "total_seconds": total, "stage_seconds": seconds}


def _own_seconds(manifest: Manifest) -> float | None:
    """What a folder adds to the time of all: folders that one pass made say its whole time each."""
    seconds: float | None = manifest.counts.get("seconds")
    return None if seconds is None else seconds / float(manifest.counts.get("made_together", 1))


def _readable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the reward can be read, and what the dictionary costs; nothing of an evaluation that is older than these figures."""
    figures = dict(metrics.get("readability", {}))
    flat = {name: value["value"] if isinstance(value, Mapping) else value for name, value in figures.items()}
    intervals = {f"{name}_ci95": value["ci95"] for name, value in figures.items() if isinstance(value, Mapping)}
    dictionary = (
        {name: metrics["sae_on_heldout"].get(name) for name in ("fvu_pca", "reward_fidelity")} if figures else {}
    )
    beside = metrics.get("sarm_minus", {}).get("scalar_head", {})
    difference = {
        "sarm_minus_scalar": beside.get("difference"),
        "sarm_minus_scalar_ci95": beside.get("difference_ci95"),
    }
    return {**dictionary, **flat, **intervals, **(difference if beside else {})}


def _facts(manifests: dict[str, Manifest], metrics: dict[str, Any]) -> dict[str, Any]:
    sarm, sae, pairs = manifests["sarm"], manifests["sae"], manifests["pairs"]
    # A SARM that was imported says neither its model nor how it was trained.
    trained_on = sarm.counts.get("figures", {})
    return {
        "model": sarm.config.get("name", sarm.config.get("imported")),
        "layer": sarm.config["layer"],
        "d_sae": sae.config["d_sae"],
        "k": sae.config["k"],
        "training pairs": trained_on.get("num_pairs"),
        "training prompts": trained_on.get("num_prompts"),
        "held-out pairs": metrics["sarm"].get("num_pairs"),
        "held-out prompts": metrics["sarm"].get("num_prompts"),
        "split": f"prompts whose hash falls in the first {pairs.config['heldout_share']:.0%}",
        # An evaluation that says none is older than the second.
        "protocol version": metrics.get("protocol_version", 1),
        "ZeRO stage": sarm.config.get("zero_stage"),
        "code": sarm.git_commit[:12],
    }


def _stage_row(name: str, manifest: Manifest) -> dict[str, Any]:
    shown = {key: value for key, value in manifest.counts.get("figures", {}).items() if value is not None}
    # Of turn ends, how many there are of each kind.
    shown = {
        name: number
        for key, value in shown.items()
        for name, number in (value if isinstance(value, dict) else {key: value}).items()
    }
    text = ", ".join(
        f"{key.replace('_', ' ')} {value:,.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value:,}"
        for key, value in shown.items()
    )
    return {"stage": name, "seconds": manifest.counts.get("seconds"), "own_seconds": _own_seconds(manifest), "figures": text}  # fmt: skip


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
    (weight,) = read_latents(session.folders.sarm, "score.weight")
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
        # An SAE from elsewhere has none.
        **({"SAE training": figures.sae_curves(histories["sae"])} if "sae" in histories else {}),
        "Rewards of held-out responses": figures.reward_histograms(chosen, rejected),
        "Calibration of held-out margins": figures.calibration_plot(*reliability_bins(chosen - rejected)),
        "Features by mean contribution": figures.contribution_bars(raising, lowering),
        "Head weight against frequency": figures.feature_scatter(features),
    }
