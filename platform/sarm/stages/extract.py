"""The stages that extract: corpus/v1 and pairs/v1 to activations/v1, all layers and units of a pass at once."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.tables import activations_table
from sarm.data.formats.models import check_model, model_folder
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.pairs import PAIR_COLUMNS, of_split, pair_numbers
from sarm.data.tokens.chat import ChatTokenizer
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.stages import plan
from sarm.stages.plan import Key

if TYPE_CHECKING:
    from sarm.contracts.passes import Target
    from sarm.engine.ray.passes import Pass

_NAMES = {"all": "extract sentence ends", "train": "extract chat ends", "heldout": "extract held-out chat ends"}
_NAMES_OF_UNIT = {"token": "extract tokens", "chat": "extract conversation ends"}
_TEXT_COLUMNS = ("row_id", "text")


def extract(session: Session, model: ModelSettings, extraction: ExtractionSettings) -> None:
    """corpus/v1 and pairs/v1 -> activations/v1 of the texts, of the training responses' ends, and of the held-out ones'."""
    chat = check_model(model)
    for layer in extraction.layers:
        _check_layer(model, layer)
    planned = plan.activations(session.folders, model, extraction)
    for split, name in _NAMES.items():
        source = session.folders.corpus if split == "all" else session.folders.pairs
        if split == "all" and not source.exists():
            continue
        folders = {key: folder.open() for key, folder in planned.items() if key[0] == split}
        if split == "all":
            name = _NAMES_OF_UNIT.get("".join(extraction.units), name)
            _check_units(source, extraction.units)
        targets = {key: folder.folder for key, folder in planned.items()}
        body = _Extraction(
            session=session, model=model, extraction=extraction, chat=chat, name=name, source=source, targets=targets
        )
        session.stages(dict.fromkeys(folders, name), folders, body, resume=True)


@dataclass(frozen=True)
class _Extraction:
    """The body of one split's stages."""

    session: Session
    model: ModelSettings
    extraction: ExtractionSettings
    chat: ChatTokenizer
    name: str
    source: Path
    targets: Mapping[Key, Path]

    def __call__(self, children: Mapping[Key, StageRun]) -> dict[Key, dict[str, Any]]:
        from sarm.contracts.passes import Target
        from sarm.engine.ray.passes import run_over
        from sarm.nn.backbone import read_config

        # Targets of one pass have one run.
        child = next(iter(children.values()))
        model, folder = self.model, model_folder(self.model)
        d_in = read_config(folder, model.layer, revision=model.revision, gguf_file=model.gguf_file).hidden_size
        about = {Target(unit, layer): self._about(d_in, layer) for _, unit, layer in children}
        work = self._pass(
            list(children), folder, {target: activations_table(d_in, own) for target, own in about.items()}
        )
        counts = run_over(work, self.session.run, self.session.cluster, child.log_metrics)
        return {
            key: {**self._counted(counts[target], work.outputs[target].folder, child), "activations": about[target]}
            for key, target in zip(children, about, strict=True)
        }

    def _pass(self, keys: Sequence[Key], folder: str, schemas: Mapping["Target", pa.Schema]) -> "Pass":
        from sarm.engine.ray.block_actor import Output
        from sarm.engine.ray.passes import Pass
        from sarm.passes.activations import ChatActivations, TextActivations

        split = keys[0][0]
        is_text = split == "all"
        files = sorted(self.source.glob("*.parquet"))
        return Pass(
            name=self.name,
            blocks=plan_blocks(
                files,
                self.extraction.block_kilobytes,
                together=None if is_text else "prompt_id",
                limit_rows=self._limit(files) if is_text else None,
            ),
            columns=_text_columns(keys) if is_text else PAIR_COLUMNS,
            keep=None if is_text else functools.partial(of_split, split=split),
            actor=TextActivations if is_text else ChatActivations,
            arguments={
                "model": self.model,
                "folder": folder,
                "extraction": self.extraction,
                "schemas": dict(schemas),
            },
            outputs={
                target: Output(self.targets[split, target.unit, target.layer], own) for target, own in schemas.items()
            },
            id_columns=("row_id",) if is_text else ("pair_id", "split"),
            input_ids=None if is_text else pair_numbers,
            output_id="row_id",
        )

    def _counted(self, counts: dict[str, Any], folder: Path, child: StageRun) -> dict[str, Any]:
        """A target's counts as its manifest has them, without the moments, which become its statistics."""
        from sarm.data.store.activations import statistics_of

        statistics = statistics_of(counts.pop("moments"))
        (folder / "statistics.json").write_text(json.dumps(statistics))
        if counts["rejected"]:
            rows = [{"reason": reason, "rows": rows} for reason, rows in counts["rejected"].items()]
            child.log_table(rows, "rejected.json")
        if num := counts.get("contents_with_control_tokens"):
            say(f"{self.name}: {num:,} contents spell control tokens, which are encoded as text")
        return plan.with_figures(
            counts, "rows", "truncated", "contents_with_control_tokens", "tokens_per_second", "padding_share"
        )

    def _about(self, d_in: int, layer: int) -> dict[str, Any]:
        return {
            "d_in": d_in,
            "dtype": self.extraction.dtype,
            "layer": layer,
            "model": self.model.name,
            "revision": self.model.revision,
            "tokenizer": self.chat.tokenizer_hash,
            "template": self.chat.template_hash,
            "protocol_version": PROTOCOL_VERSION,
        }

    def _limit(self, files: Sequence[Path]) -> int | None:
        limits = [self.extraction.limit_rows]
        if self.extraction.limit_tokens is not None:
            limits.append(rows_within(files, self.chat, self.extraction.limit_tokens))
        return min((limit for limit in limits if limit is not None), default=None)


def rows_within(files: Sequence[Path], chat: ChatTokenizer, limit_tokens: int) -> int:
    """How many of the first texts have at most `limit_tokens` tokens together.

    Raises UserError if the first text alone has more.
    """
    from sarm.data.tokens.windows import num_tokens

    rows = tokens = 0
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for count in num_tokens(batch.column("text").to_pylist(), chat):
                    if tokens + count > limit_tokens:
                        if rows == 0:
                            raise UserError(
                                f"the first text has {count:,} tokens, more than --limit-tokens {limit_tokens:,}. Pass more."
                            )
                        say(f"{rows:,} texts of {tokens:,} tokens are within --limit-tokens {limit_tokens:,}")
                        return rows
                    rows, tokens = rows + 1, tokens + count
    return rows


def _check_layer(model: ModelSettings, layer: int) -> None:
    from sarm.nn.backbone import read_config

    try:
        read_config(model_folder(model), layer, revision=model.revision, gguf_file=model.gguf_file)
    except ValueError as error:
        raise UserError(f"--layers: {error}") from error


def _check_units(corpus: Path, units: Sequence[str]) -> None:
    files = sorted(corpus.glob("*.parquet"))
    if "chat" in units and files and "messages" not in pq.read_schema(files[0]).names:
        raise UserError(
            f"--units chat takes the final token of conversations, and {corpus} holds plain texts. Prepare conversations "
            "(--data.text-field messages), or pass other --units; the ends of preference pairs are extracted in any case."
        )


def _text_columns(keys: Sequence[Key]) -> tuple[str, ...]:
    return (*_TEXT_COLUMNS, "messages") if any(unit == "chat" for _, unit, _ in keys) else _TEXT_COLUMNS
