"""The last stage of `jobs/debias.py`: the chosen dose and its controls on the half that nothing was chosen on, the edit as a folder, the page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarm.audit.repair import LEVELS, repair
from sarm.audit.style_features import control_sets
from sarm.contracts.figures import plain_values
from sarm.contracts.folders import DEBIAS_FOLDER, DOSES_FOLDER
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.data.formats.feature_edit import FeatureEdit, sae_identity, save_edit
from sarm.data.formats.sae_folder import load_sae
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.terminal import say
from sarm.evaluate.benchmarks.items import scored_rows
from sarm.evaluate.benchmarks.paired import compare
from sarm.evaluate.benchmarks.registry import BENCHMARKS
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.edited_scores import Dose
from sarm.passes.models import hash_of_folder
from sarm.report.debias_page import build_page
from sarm.report.numbers import share
from sarm.report.pages import write_page
from sarm.settings.identity import identity
from sarm.stages.benchmark_scoring import Scores, items_table, make_items
from sarm.stages.debias_doses import Job, read_doses, rewards_of, score_doses

RESULTS = "debias.json"
_PERMUTATIONS = 2000


def measure(job: Job) -> Path:
    """The figures, the edits and the page, in `results` of the run's folder; returns the page."""
    fields = identity(job.settings.debias) | {"seed": job.session.run.seed}
    benchmarks = {one.source.name: one.digest for one in job.texts.benchmarks}
    folder = StageFolder(
        job.out / "results",
        DEBIAS_FOLDER,
        {**job.identity(), **fields, "benchmarks": benchmarks},
        {DOSES_FOLDER: (job.out / "doses", DOSES_FOLDER)},
    )

    def body(child: StageRun) -> Mapping[str, Any]:
        found = {name: _of_property(job, name, own, folder.folder) for name, own in read_doses(job).items()}
        content = {"facts": _facts(job), "properties": found}
        content = finite_or_null(plain_values(content))
        write_atomically(folder.folder / RESULTS, json.dumps(content, indent=2, allow_nan=False))
        write_page(build_page(content), folder.folder)
        for name in (RESULTS, "report.md", "report.html"):
            child.log_artifact(folder.folder / name)
        return {"figures": _figures(content["properties"])}

    job.session.stage("measure the edit", folder, body, resume=True)
    _say_figures(json.loads((folder.folder / RESULTS).read_text())["properties"])
    say(f"report: {folder.folder / 'report.html'}")
    return folder.folder / "report.html"


def _of_property(job: Job, name: str, own: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that is reported of one property."""
    contrast = job.texts.contrasts[name]
    quads = contrast.half(chooses_half=False)
    shown = {key: own[key] for key in ("num_candidates", "num_prompts", "num_pairs", "left_out", "differ_in_more", "spared", "features", "plain", "doses", "chosen")}  # fmt: skip
    chosen = own["chosen"]
    latents = [] if chosen is None else [row["joint"] for row in own["features"][chosen["rank"]][: chosen["features"]]]
    edit = Dose(tuple(latents), 1.0 if chosen is None else chosen["share"])
    controls = {} if chosen is None else _controls(job, own, latents)
    items, of_benchmarks = make_items(job.texts.benchmarks, (), 0)
    # What only benchmarks need is not scored under the controls.
    doses = [Dose(), edit, *(Dose(tuple(map(int, row)), edit.share) for rows in controls.values() for row in rows)]
    doses = doses[:1] if chosen is None else doses
    scores = score_doses(job, f"{name}: the edit and its controls", doses, [one for quad in quads for one in quad.ids], folder / name)  # fmt: skip
    before = rewards_of(quads, scores, 0)
    content: dict[str, Any] = {"title": contrast.own.title, **shown, "chosen_on": _halves(job, name)}
    content["repair"] = repair(before, rewards_of(quads, scores, min(1, len(doses) - 1)))
    content["controls"] = _against(before, quads, scores, {kind: len(rows) for kind, rows in controls.items()})
    content["benchmarks"] = {}
    if chosen is not None:
        if job.texts.benchmarks:
            job.texts.by_id.update(of_benchmarks)
            both = score_doses(job, f"{name}: benchmarks", doses[:2], list(of_benchmarks), folder / name / "benchmarks")
            content["benchmarks"] = _benchmarks(job, items, both)
        content["edit"] = str(_save(job, edit, folder / "edits" / name).relative_to(folder))
    return content


def _controls(job: Job, own: Mapping[str, Any], latents: Sequence[int]) -> dict[str, np.ndarray]:
    return control_sets(
        density_S=np.array(own["density"], float),
        size_S=np.array(own["size"], float),
        candidates=np.array(own["candidates"], np.int64),
        chosen=np.array(latents, np.int64),
        count=job.settings.debias.controls,
        seed=job.session.run.seed,
    )


def _against(before: Any, quads: Any, scores: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    """What each set of control features does to the accuracies, and the share of the loss that it repairs."""
    found: dict[str, Any] = {}
    place = 2
    for kind, count in counts.items():
        repairs = [repair(before, rewards_of(quads, scores, place + number)) for number in range(count)]
        place += count
        shares = [one.repaired.value for one in repairs if one.repaired is not None]
        found[kind] = {
            "sets": count,
            "change": {level: [one.change[level].value for one in repairs] for level in LEVELS},
            "repaired": shares,
            "repaired_median": float(np.median(shares)) if shares else None,
            "repaired_largest": max(shares, default=None),
            "flips_repaired": [one.flips_repaired and one.flips_repaired.value for one in repairs],
        }
    return found


def _benchmarks(job: Job, items: list[dict[str, Any]], scores: Any) -> dict[str, Any]:
    """Figures of every benchmark after the edit (`a`) and before it (`b`), with the interval of the difference."""
    tables = []
    for place in (1, 0):
        by_id = {
            one: {"score": own[place], "num_tokens": None, "was_truncated": False, "reason": None}
            for one, own in scores.items()
        }
        lacking = {item["completion_id"] for item in items} - by_id.keys()
        by_id |= {one: {"score": np.nan, "num_tokens": None, "was_truncated": False, "reason": "rejected"} for one in lacking}  # fmt: skip
        table = items_table(items, Scores(by_id=by_id, num_cached=0, num_scored=0, forward_tokens=0, forward_seconds=0))
        tables.append(table)
    found = {}
    for one in job.texts.benchmarks:
        benchmark = BENCHMARKS[one.source.name]
        after, before = (benchmark.with_partners(scored_rows(table, benchmark.name)) for table in tables)
        compared = compare(benchmark, after, before, _PERMUTATIONS, job.session.run.seed)
        found[benchmark.name] = {"title": benchmark.title, "num_rows": compared.num_rows, "figures": compared.figures}
    return found


def _save(job: Job, dose: Dose, folder: Path) -> Path:
    saes = [load_sae(one.folder)[0] for one in job.dictionaries]
    splices = dose.splices(job.dictionaries, saes)
    layers = {one.layer: sae_identity(one.folder) for one in job.dictionaries}
    edit = FeatureEdit(
        splices=splices,
        positions=job.settings.debias.positions,
        model=hash_of_folder(Path(job.spec.place)),
        origins=tuple(layers[splice.layer] for splice in splices),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_edit(edit, folder)
    return folder


def _halves(job: Job, name: str) -> dict[str, int]:
    return {
        half: len({quad.prompt_id for quad in job.texts.contrasts[name].half(chooses_half=chooses)})
        for half, chooses in (("chosen", True), ("reported", False))
    }


def _facts(job: Job) -> dict[str, Any]:
    return {
        "model": job.settings.model,
        "layers": ", ".join(str(one.layer) for one in job.dictionaries),
        "positions": job.settings.debias.positions,
        "dtype": job.spec.dtype,
        "protocol version": PROTOCOL_VERSION,
        "seed": job.session.run.seed,
        "controls": job.settings.debias.controls,
    }


def _figures(properties: Mapping[str, Any]) -> dict[str, float]:
    figures = {}
    for name, own in properties.items():
        figures[f"{name}_lost"] = own["repair"]["lost"]
        if own["chosen"] is not None:
            figures |= {f"{name}_{level}_change": own["repair"]["change"][level]["value"] for level in LEVELS}
            if own["repair"]["repaired"] is not None:
                figures[f"{name}_repaired"] = own["repair"]["repaired"]["value"]
    return figures


def _say_figures(properties: Mapping[str, Any]) -> None:
    for name, own in properties.items():
        found = own["repair"]
        if own["chosen"] is None:
            say(f"{name:<12} costs {share(found['lost'])} of hard accuracy; no dose repairs any of it within the allowed cost")  # fmt: skip
            continue
        chosen, back = own["chosen"], found["repaired"]
        say(f"{name:<12} costs {share(found['lost'])}; {chosen['features']} features by {chosen['rank']} at {chosen['share']:g} repair {share(back and back['value'])}, hard {share(found['change']['hard']['value'])}")  # fmt: skip
