"""The stages that extract: corpus/v1 and pairs/v1 to activations/v1, all layers and units of a pass at once."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.tables import SENTENCE, activations_table
from sarm.data.formats.models import check_model, model_folder
from sarm.data.sources.pair_notes import truncation_note
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.pairs import PAIR_COLUMNS, of_split, pair_numbers
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.sentences import SPLITTERS
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.stages import plan
from sarm.stages.plan import Key

if TYPE_CHECKING:
    from sarm.contracts.passes import Target
    from sarm.engine.passes import Pass

_NAMES = {
    "all": "extract sentence ends",
    "train": "extract chat ends",
    "heldout": "extract held-out chat ends",
    plan.UNPAIRED: "extract turn ends of further responses",
}
_NAMES_OF_UNIT = {
    "token": "extract tokens",
    "chat": "extract conversation ends",
    TURN_END: "extract turn ends of texts",
}
_NAME_OF_RESPONSES = "extract turn ends of responses"
_TEXT_COLUMNS = ("row_id", "text")
_RESPONSE_COLUMNS = ("pair_id", "split", "prompt", "chosen", "rejected")


def extract(session: Session, model: ModelSettings, extraction: ExtractionSettings) -> None:
    """corpus/v1 and pairs/v1 -> activations/v1 of the texts, of the training responses' ends, and of the held-out ones'."""
    chat = check_model(model)
    for layer in extraction.layers:
        _check_layer(model, layer)
    planned = plan.activations(session.folders, model, extraction)
    for split, units in _passes(extraction):
        folders_of = {"all": session.folders.corpus, plan.UNPAIRED: session.folders.responses}
        source = folders_of.get(split, session.folders.pairs)
        if split in folders_of and not source.exists():
            continue
        folders = {key: folder.open() for key, folder in planned.items() if key[0] == split and key[1] in units}
        name = _NAMES[split]
        if split == "all":
            name = _NAMES_OF_UNIT.get("".join(units), name)
            _check_units(source, units)
        names = {key: _NAME_OF_RESPONSES if key[:2] == ("train", TURN_END) else name for key in folders}
        targets = {key: folder.folder for key, folder in planned.items()}
        body = _Extraction(
            session=session, model=model, extraction=extraction, chat=chat, name=name, source=source, targets=targets
        )
        session.stages(names, folders, body, resume=True)


def _passes(extraction: ExtractionSettings) -> list[tuple[str, tuple[str, ...]]]:
    """(split, units) of each pass: texts as answers are other sequences than texts, responses with branches are not."""
    plain = tuple(unit for unit in extraction.units if unit != TURN_END)
    ends = (TURN_END,) if TURN_END in extraction.units else ()
    of_texts = [("all", units) for units in (plain, ends) if units]
    unpaired = [(plan.UNPAIRED, ends)] if ends else []
    return [*of_texts, ("train", ("chat", *ends)), *unpaired, ("heldout", ("chat",))]


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
        from sarm.nn.pretrained import read_config

        # Targets of one pass have one run.
        child = next(iter(children.values()))
        model, folder = self.model, model_folder(self.model)
        d_in = read_config(folder, model.layer, revision=model.revision, gguf_file=model.gguf_file).hidden_size
        about = {Target(unit, layer): self._about(d_in, layer) for _, unit, layer in children}
        schemas = {target: activations_table(d_in, own, kinds=target.unit == TURN_END) for target, own in about.items()}
        work = self._pass(list(children), folder, schemas)
        counts = run_over(work, self.session.run, self.session.cluster, child.log_metrics)
        return {
            key: {
                **self._counted(target, counts[target], work.outputs[target].folder, child),
                "activations": about[target],
            }
            for key, target in zip(children, about, strict=True)
        }

    def _pass(self, keys: Sequence[Key], folder: str, schemas: Mapping["Target", pa.Schema]) -> "Pass":
        from sarm.engine.passes import Pass
        from sarm.engine.ray.block_actor import Inputs, Output
        from sarm.passes.turn_ends import response_row_ids

        def inputs_of(unit: str) -> Inputs | None:
            """Of responses every one is a row, whichever pairs it is in."""
            return Inputs(_RESPONSE_COLUMNS, response_row_ids, "row_id") if not is_text and unit == TURN_END else None

        split = keys[0][0]
        is_text = split in ("all", plan.UNPAIRED)
        files = sorted(self.source.glob("*.parquet"))
        return Pass(
            name=self.name,
            blocks=plan_blocks(
                files,
                self.extraction.block_kilobytes,
                together=None if is_text else "prompt_id",
                limit_rows=self._limit(files) if split == "all" else None,
            ),
            columns=_text_columns(keys, files) if is_text else PAIR_COLUMNS,
            keep=None if is_text else functools.partial(of_split, split=split),
            actor=_actor(keys),
            arguments={
                "model": self.model,
                "folder": folder,
                "extraction": self.extraction,
                "schemas": dict(schemas),
            },
            outputs={
                target: Output(self.targets[split, target.unit, target.layer], own, inputs_of(target.unit))
                for target, own in schemas.items()
            },
            id_columns=("row_id",) if is_text else ("pair_id", "split"),
            input_ids=None if is_text else pair_numbers,
            output_id="row_id",
        )

    def _counted(self, target: "Target", counts: dict[str, Any], folder: Path, child: StageRun) -> dict[str, Any]:
        """A target's counts as its manifest has them, without the moments, which become its statistics."""
        from sarm.data.store.activations import statistics_of

        statistics = statistics_of(counts.pop("moments"))
        (folder / "statistics.json").write_text(json.dumps(statistics))
        if counts["rejected"]:
            rows = [{"reason": reason, "rows": rows} for reason, rows in counts["rejected"].items()]
            child.log_table(rows, "rejected.json")
        if num := counts.get("contents_with_control_tokens"):
            say(f"{self.name}: {num:,} contents spell control tokens, which are encoded as text")
        if note := truncation_note(counts.get("truncated", 0), counts.get("rows", 0), self.model.max_length):
            say(f"{self.name}: {note}")
        if target.unit == TURN_END and SENTENCE not in counts.get("kinds", {}):
            say(_no_sentences(self.extraction))
        return plan.with_figures(
            counts, "rows", "kinds", "truncated", "contents_with_control_tokens", "tokens_per_second", "padding_share"
        )

    def _about(self, d_in: int, layer: int) -> dict[str, Any]:
        read_at = self.model.rewarded_token
        return {
            **({} if read_at == "end_of_turn" else {"rewarded_token": read_at}),
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
        extraction = self.extraction
        limits = [extraction.limit_rows]
        if extraction.limit_tokens is not None:
            limits.append(rows_within(files, extraction.limit_tokens, "tokens", self._tokens))
        if extraction.limit_sentences is not None:
            limits.append(rows_within(files, extraction.limit_sentences, "sentences", self._sentences))
        return min((limit for limit in limits if limit is not None), default=None)

    def _tokens(self, texts: Sequence[str]) -> Iterable[int]:
        from sarm.data.tokens.windows import num_tokens

        return num_tokens(texts, self.chat)

    def _sentences(self, texts: Sequence[str]) -> Iterable[int]:
        split = SPLITTERS[self.extraction.sentence_ends]
        return (len(split(text)) for text in texts)


def rows_within(
    files: Sequence[Path], limit: int, what: str, counts_of: Callable[[Sequence[str]], Iterable[int]]
) -> int:
    """How many of the first texts have at most `limit` tokens or sentences (`what`) together, counted by `counts_of`.

    Raises UserError if the first text alone has more.
    """
    rows = total = 0
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for count in counts_of(batch.column("text").to_pylist()):
                    if total + count > limit:
                        if rows == 0:
                            raise UserError(
                                f"the first text has {count:,} {what}, more than --limit-{what} {limit:,}. Pass more."
                            )
                        say(f"{rows:,} texts of {total:,} {what} are within --limit-{what} {limit:,}")
                        return rows
                    rows, total = rows + 1, total + count
    return rows


def _check_layer(model: ModelSettings, layer: int) -> None:
    from sarm.nn.pretrained import read_config

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


def _text_columns(keys: Sequence[Key], files: Sequence[Path]) -> tuple[str, ...]:
    """`chat` needs conversations, `turn_end` takes the last answers of those that there are."""
    asked = {unit for _, unit, _ in keys}
    has_messages = "chat" in asked or (TURN_END in asked and "messages" in pq.read_schema(files[0]).names)
    of_responses = ("prompt_id",) if keys[0][0] == plan.UNPAIRED else ()
    return (*_TEXT_COLUMNS, "messages", *of_responses) if has_messages else _TEXT_COLUMNS


def _actor(keys: Sequence[Key]) -> Callable[..., Any]:
    from sarm.passes.activations import ChatActivations, TextActivations
    from sarm.passes.turn_ends import PairTurnEnds, TextTurnEnds

    split, has_ends = keys[0][0], any(unit == TURN_END for _, unit, _ in keys)
    if split in ("all", plan.UNPAIRED):
        return TextTurnEnds if has_ends else TextActivations
    return PairTurnEnds if has_ends else ChatActivations


def _no_sentences(extraction: ExtractionSettings) -> str:
    other = "" if extraction.word_share else ", or --extraction.word-share for ends behind words"
    return (
        f"no sentence ends before its answer does by --extraction.sentence-ends {extraction.sentence_ends}, so turns end "
        f"{'behind words and ' if extraction.word_share else ''}behind whole answers alone. Pass texts with sentences{other}."
    )
