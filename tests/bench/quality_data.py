"""The pairs, activations and dictionary of the quality study: stages of the platform, so that finished ones are left alone."""

import json
from dataclasses import replace
from pathlib import Path

from sarm.data.formats.models import model_folder
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.engine.ray.machine import this_machine
from sarm.engine.session import open_session
from sarm.settings.data import DataSettings
from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings
from sarm.stages.extract import extract
from sarm.stages.fitting import fitted
from sarm.stages.plan import sae_activations
from sarm.stages.prepare import prepare as prepare_sources
from sarm.stages.train_sae import train_sae

# A pair's tokens at most, prompt counted once: what fits a study of twelve trainings on two cores.
MAX_TOKENS = 192
HELDOUT_SHARE = 0.3
FULL_DEPTH = 30
CHAT_EPOCHS = 60


def preset(out: Path, depth: int | None = None) -> Pipeline:
    """The demo's settings over the study's pairs."""
    demo = fitted(PRESETS["demo-papers"][1], this_machine()).config
    return replace(
        demo,
        run=RunSettings(out=out, cpus_per_worker=1, experiment="quality"),
        data=replace(
            demo.data, pairs=(str(out.parent / "pairs.jsonl"),), heldout_share=HELDOUT_SHARE, max_pairs_per_prompt=4
        ),
        model=replace(demo.model, layer=depth or demo.model.layer),
        # Thirteen hundred chat ends keep some 400 latents busy, whatever there are: 16 d_in would be mostly silent.
        sae=replace(
            demo.sae, d_sae=4 * 576, aux_k=256, dead_after_rows=1500, aux_coefficient=0.25, chat_epochs=CHAT_EPOCHS
        ),
    )


def chat_of(config: Pipeline) -> ChatTokenizer:
    """The tokenizer of the study's model."""
    return load_chat_tokenizer(config.model, model_folder(config.model))


def write_short_pairs(root: Path, source: Path) -> None:
    """`root/pairs.jsonl`: pairs of `source` and of the demo that need at most `MAX_TOKENS` tokens, and at most 4 of a prompt."""
    target = root / "pairs.jsonl"
    if target.exists():
        return
    data = DataSettings(pairs=(str(source), "demo:harm"), heldout_share=HELDOUT_SHARE, max_pairs_per_prompt=4)
    prepare_pairs(data, root / "all_pairs")
    chat = chat_of(preset(root / "truncated"))
    lines = []
    for split in ("train", "heldout"):
        table = load_pairs(root / "all_pairs", split)
        rows = {row["pair_id"]: row for row in table.to_pylist()}
        for group in prompt_groups(table, chat):
            for pair in group.pairs:
                alone = group._replace(tokens=[group.tokens[pair.chosen], group.tokens[pair.rejected]])
                if sum(len(row.ids) for row in alone.rows(chat.max_length)) <= MAX_TOKENS:
                    row = rows[pair.pair_id]
                    lines.append(
                        {**{key: row[key] for key in ("prompt", "chosen", "rejected")}, "subset": row["source"]}
                    )
    partial = target.with_suffix(".partial")
    partial.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    partial.rename(target)


def prepare(root: Path, source: Path) -> None:
    """Pairs, activations at the truncation and at full depth, and the dictionary, under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    write_short_pairs(root, source)
    for name, depth in (("truncated", None), ("full", FULL_DEPTH)):
        config = preset(root / name, depth)
        if depth is not None:
            # Only the heads' start needs activations of the whole model.
            config = replace(config, data=replace(config.data, texts=()))
        with open_session(config) as session:
            prepare_sources(session, config.data)
            extract(session, config.model, config.extraction)
            if depth is None:
                activations = sae_activations(session.folders, config.data, config.sae, config.extraction.units)
                train_sae(session, config.sae, activations)
