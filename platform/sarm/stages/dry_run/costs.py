"""Time, memory, disk and GPU-hours of each stage, from the settings, the sizes of the sources and the model's dimensions.

The formulas are in `formulas`; what is added here are the seconds that processes take to start.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sarm.data.formats.model_shapes import shape_of
from sarm.engine.ray.machine import BANDWIDTHS, PEAK_SHARE, PEAKS, Machine
from sarm.settings.contexts import ContextsSettings
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.sae import SaeSettings
from sarm.stages.dry_run.formulas import (
    extracted,
    forward_gb,
    reward_depths,
    reward_flops,
    reward_gb,
    sae_flops,
    sae_rows,
    text_rows,
    trains_weights,
)
from sarm.stages.dry_run.rounding import count
from sarm.stages.dry_run.scaling import (
    all_reduce_seconds,
    busy_share,
    reward_gradient_bytes,
    sae_gradient_bytes,
    sae_step_seconds,
)
from sarm.stages.dry_run.source_sizes import sizes_of
from sarm.stages.dry_run.stage_cost import Known, StageCost
from sarm.stages.fitting import fitted

_GB = 1e9
# A process with torch and Ray, before it holds anything.
_PROCESS_GB = 0.6
# Starting Ray, the processes of a pass, the workers of a training.
_RAY_SECONDS, _PASS_SECONDS, _TRAINING_SECONDS = 10.0, 8.0, 15.0
# Bytes of text that one process cleans and hashes a second, and bytes that it keeps of each text to recognise duplicates.
_PREPARED_BYTES_A_SECOND, _SEEN_BYTES = 10e6, 200
# Two training states of weights and both moments lie beside what is trained.
_STATE_BYTES = 2 * 12


def stage_costs(config: Any, machine: Machine) -> list[StageCost]:
    """The cost of every stage that the config has settings of, in the order in which they run.

    Raises UserError for a source that cannot be opened.
    """
    config = fitted(config, machine).config
    parts = {name: getattr(config, name, None) for name in ("model", "data", "extraction")}
    model = parts["model"] if isinstance(parts["model"], ModelSettings) else None
    sizes = sizes_of(config.run.out, parts["data"], parts["extraction"] or ExtractionSettings())
    known = Known(config=config, run=config.run, machine=machine, sizes=sizes, shape=shape_of(model) if model else None)
    return list(_costs(known))


def _costs(known: Known) -> Iterator[StageCost]:
    config = known.config

    def has(*names: str) -> bool:
        return all(getattr(config, name, None) is not None for name in names)

    if has("data"):
        yield _prepare(known)
    if has("model", "extraction"):
        yield _extract(known)
    if has("sae"):
        yield _train_sae(known) if has("model") else _unknown("train_sae")
    if has("model", "reward"):
        yield _train_sarm(known)
    if has("evaluation"):
        yield _evaluate(known) if has("model", "reward") else _unknown("evaluate")
    in_pipeline = not has("pages") or config.pages.in_pipeline
    if has("contexts") and in_pipeline:
        yield _contexts(known) if has("model") else _unknown("collect_contexts")
    if has("pages") and in_pipeline:
        # At most as many as there are latents.
        pages = min(config.pages.features, config.sae.d_sae if has("sae") else config.pages.features)
        yield StageCost(
            stage="feature_pages",
            seconds=2 + 0.005 * pages,
            gpu_hours=0.0,
            host_gb=_PROCESS_GB,
            gpu_gb=None,
            disk_gb=2e-5 * pages,
            work=f"{pages:,} features",
        )


def _unknown(stage: str, work: str = "the size of its input is not known") -> StageCost:
    return StageCost(stage=stage, seconds=None, gpu_hours=None, host_gb=None, gpu_gb=None, disk_gb=None, work=work)


def _prepare(known: Known) -> StageCost:
    texts, pairs = known.sizes.corpus, known.sizes.pairs
    if pairs is None or known.sizes.unknown:
        return _unknown("prepare_data", f"{', '.join(known.sizes.unknown)}: size not known")
    rows = (texts.rows if texts else 0) + pairs.train + pairs.heldout
    read = 4.4 * ((texts.tokens if texts else 0) + (pairs.train + pairs.heldout) * pairs.tokens_a_pair)
    work = f"{count(texts.rows)} texts, " if texts else ""
    work += f"{count(pairs.train)} training pairs, {count(pairs.heldout)} held out"
    memory = 0.4 + rows * _SEEN_BYTES / _GB
    return StageCost(
        stage="prepare_data",
        seconds=3 + read / _PREPARED_BYTES_A_SECOND,
        gpu_hours=0.0,
        host_gb=memory,
        gpu_gb=None,
        disk_gb=0.6 * read / _GB,
        work=work,
        rows=rows,
    )


def _extract(known: Known) -> StageCost:
    extraction, run, model, shape = known.config.extraction, known.run, known.model, known.shape
    texts, pairs = known.sizes.texts, known.sizes.pairs
    if shape is None:
        return _unknown("extract_activations", f"the dimensions of {model.name} are not known here")
    if texts is None and pairs is None:
        return _unknown("extract_activations")
    layers = {model.layer, *extraction.layers}
    work = extracted(
        shape=shape,
        texts=texts,
        pairs=pairs,
        units=extraction.units,
        layers=layers,
        word_share=extraction.word_share,
    )
    seconds, gpu_hours = known.time(work.flops, run.num_actors, model.dtype)
    of_texts = len({unit == TURN_END for unit in extraction.units}) if texts is not None else 0
    passes = of_texts + 2
    memory = forward_gb(shape, max(layers), model.dtype, extraction.batch_tokens)
    tokens = [f"{count(texts.tokens)} tokens of text"] if texts else []
    tokens += [f"{count((pairs.train + pairs.heldout) * pairs.tokens_a_pair)} of pairs"] if pairs else []
    rows = ", ".join(f"{count(number)} rows of {unit}" for unit, number in work.rows.items())
    said = f"{' and '.join(tokens)}, {work.flops:.2e} FLOPs; {rows}" + (
        f", each at {len(layers)} layers" if len(layers) > 1 else ""
    )
    # If texts or pairs are unknown, the figures would count only the other.
    if texts is None and known.sizes.unknown:
        return _unknown("extract_activations")
    return StageCost(
        stage="extract_activations",
        seconds=_RAY_SECONDS + passes * _PASS_SECONDS + seconds,
        gpu_hours=gpu_hours,
        host_gb=_PROCESS_GB + (0.5 if known.machine.num_gpus else memory),
        gpu_gb=memory,
        disk_gb=work.disk_bytes / _GB,
        work=said,
        rows=sum(work.rows.values()),
    )


def _train_sae(known: Known) -> StageCost:
    sae, run, shape, texts, pairs = known.config.sae, known.run, known.shape, known.sizes.texts, known.sizes.pairs
    if shape is None or (texts is None and known.sizes.unknown) or (texts is None and pairs is None):
        return _unknown("train_sae")
    also = getattr(known.config, "also", None)
    saes = [sae, *(other for _, other, _ in also.beside(sae, run.seed))] if also is not None else [sae]
    extraction = getattr(known.config, "extraction", None) or ExtractionSettings()
    unit = TURN_END if sae.recipe == "turn_ends" else extraction.units[0]
    of_texts = text_rows(texts, unit, extraction.word_share) if texts is not None else 0.0
    chat_rows = 2 * pairs.train if pairs is not None else 0.0
    rows = sae_rows(sae, of_texts, chat_rows)
    flops = sum(sae_flops(shape.d_in, one, rows) for one in saes)
    seconds, gpu_hours = _sae_time(known, saes, rows, flops)
    weights = sum(2 * shape.d_in * one.d_sae for one in saes)
    shared = known.num_workers if sae.split == "latents" else 1
    memory = (16 * weights / shared + sae.batch_size * (shape.d_in * 16 + 4 * 16384)) / _GB
    read = (of_texts + chat_rows) * 2 * shape.d_in / _GB
    return StageCost(
        stage="train_sae",
        seconds=_TRAINING_SECONDS + seconds,
        gpu_hours=gpu_hours,
        host_gb=_PROCESS_GB + min(read, 2.0) + (0.0 if known.machine.num_gpus else memory),
        gpu_gb=memory,
        disk_gb=weights * (4 + _STATE_BYTES) / _GB,
        work=f"{count(rows)} rows, {flops:.2e} FLOPs; {sae.d_sae:,} latents, {sae.k} active"
        + (f"; {len(saes)} SAEs" if len(saes) > 1 else ""),
        rows=rows,
    )


def _sae_time(known: Known, saes: Sequence[SaeSettings], rows: float, flops: float) -> tuple[float, float]:
    """(seconds, GPU-hours) of SAEs that learn from so many rows each: on GPUs, most of a step is reading memory."""
    shape, sae, workers = known.shape, known.config.sae, known.num_workers
    assert shape is not None
    gpu, steps = known.machine.planned_gpu, rows / sae.batch_size

    def of_a_step(rows: float) -> float:
        peak, bandwidth = PEAKS[gpu][0], BANDWIDTHS[gpu]
        return sum(sae_step_seconds(shape.d_in, one, rows, peak, PEAK_SHARE, bandwidth) for one in saes)

    gpu_hours = steps * of_a_step(sae.batch_size) / 3600
    if not known.machine.num_gpus:
        return known.time(flops, known.run.num_workers, "bfloat16", training=True)[0], gpu_hours
    reduced = sum(all_reduce_seconds(sae_gradient_bytes(shape.d_in, one.d_sae), workers) for one in saes)
    # Dictionaries that are split by latents send codes instead, which are small.
    return steps * (of_a_step(sae.batch_size / workers) + (reduced if sae.split == "rows" else 0.0)), gpu_hours


def _train_sarm(known: Known) -> StageCost:
    model, reward, run, shape, pairs = known.model, known.config.reward, known.run, known.shape, known.sizes.pairs
    if shape is None or pairs is None:
        return _unknown("train_sarm")
    tokens = pairs.train * pairs.tokens_a_pair
    depths = reward_depths(model, reward, shape)
    flops = sum(reward_flops(shape, depth, reward, tokens) for depth in depths)
    seconds, gpu_hours = known.time(flops, run.num_workers, known.reward_dtype, training=True)
    seconds /= busy_share(reward.batch_pairs, known.num_workers)
    if known.machine.num_gpus and trains_weights(reward):
        steps = pairs.train * reward.epochs / reward.batch_pairs
        gradients = sum(reward_gradient_bytes(shape.weights_a_block * depth, reward.precision) for depth in depths)
        seconds += steps * all_reduce_seconds(gradients, known.num_workers)
    sae = getattr(known.config, "sae", None)
    dictionary = 2 * shape.d_in * sae.d_sae if sae else 0
    memory = reward_gb(shape, max(depths), reward, known.num_workers) + 4 * dictionary / _GB
    weights = sum(shape.backbone(depth) for depth in depths) + dictionary
    states = _STATE_BYTES * shape.backbone(max(depths))
    loaded = 4 * shape.backbone(max(depths)) / _GB
    # MLflow has a copy of a registered model only where it is asked for one.
    copies = 2 if run.mlflow_models == "copy" else 1
    others = f", and {', '.join(reward.baselines)}" if reward.baselines else ""
    return StageCost(
        stage="train_sarm",
        seconds=_TRAINING_SECONDS * len(depths) + seconds,
        gpu_hours=gpu_hours,
        host_gb=_PROCESS_GB + (loaded if known.machine.num_gpus else memory),
        gpu_gb=memory,
        disk_gb=(4 * copies * weights + states) / _GB,
        work=f"SARM{others}: {reward.epochs} epoch{'s' * (reward.epochs > 1)} of {count(pairs.train)} pairs, {flops:.2e} FLOPs, ZeRO {reward.zero_stage}",
        rows=pairs.train * reward.epochs,
    )


def _evaluate(known: Known) -> StageCost:
    model, reward, run, shape, pairs = known.model, known.config.reward, known.run, known.shape, known.sizes.pairs
    if shape is None or pairs is None:
        return _unknown("evaluate")
    depths = reward_depths(model, reward, shape)
    tokens = pairs.heldout * pairs.tokens_a_pair
    flops = sum(2.0 * shape.weights_a_block * depth * tokens for depth in depths)
    seconds, gpu_hours = known.time(flops, run.num_actors, model.dtype)
    batch = known.config.extraction.batch_tokens if getattr(known.config, "extraction", None) else 2048
    memory = forward_gb(shape, max(depths), model.dtype, batch)
    return StageCost(
        stage="evaluate",
        seconds=5 * len(depths) + seconds,
        gpu_hours=gpu_hours,
        host_gb=_PROCESS_GB + memory,
        gpu_gb=memory,
        disk_gb=2 * pairs.heldout * 100 / _GB,
        work=f"{count(pairs.heldout)} held-out pairs with {len(depths)} model{'s' * (len(depths) > 1)}",
        rows=pairs.heldout,
    )


def _contexts(known: Known) -> StageCost:
    contexts: ContextsSettings = known.config.contexts
    run, model, shape, texts, pairs = known.run, known.model, known.shape, known.sizes.texts, known.sizes.pairs
    if shape is None or pairs is None or (contexts.corpus and texts is None):
        return _unknown("collect_contexts")
    split = {"heldout": pairs.heldout, "train": pairs.train, "none": 0.0}
    read = split.get(contexts.split, pairs.train + pairs.heldout)
    tokens = read * pairs.tokens_a_pair
    if contexts.corpus and texts is not None:
        share = min(1.0, contexts.max_texts / max(1.0, texts.rows)) if contexts.max_texts else 1.0
        tokens += texts.tokens * share
    # A part left out is a forward pass over one answer and its prompt; a pair's tokens are the upper bound.
    answers = min(contexts.span_answers, 2 * read) if contexts.span_contexts else 0
    tokens += answers * contexts.span_pieces * pairs.tokens_a_pair
    flops = 2.0 * shape.weights_a_block * model.layer * tokens
    seconds, gpu_hours = known.time(flops, run.num_actors, model.dtype)
    memory = forward_gb(shape, model.layer, model.dtype, contexts.batch_tokens)
    sae = getattr(known.config, "sae", None)
    kept = (sae.d_sae if sae else 0) * (contexts.top + 10 * contexts.per_decile) * 400 / _GB
    return StageCost(
        stage="collect_contexts",
        seconds=10 + seconds,
        gpu_hours=gpu_hours,
        host_gb=_PROCESS_GB + (0.5 if known.machine.num_gpus else memory),
        gpu_gb=memory,
        disk_gb=min(kept, tokens * 10 / _GB),
        work=f"{count(tokens)} tokens",
    )
