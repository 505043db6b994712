"""How much there is to read: from finished folders, else from the sources that the settings name.

Built-in sources know their sizes; of files, the first rows are read and the bytes are counted; of Hugging Face data sets a few are known.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sarm.data.sources.built_in import CHARACTERS_A_TOKEN, PAIR_SOURCES, TEXT_SOURCES, TOKENS_A_SENTENCE
from sarm.settings.data import DataSettings
from sarm.settings.extraction import ExtractionSettings

_SAMPLED_ROWS = 200
_READ_BYTES = 1 << 26
# What stands around a row's text in its line: names of columns, quotes, numbers.
_AROUND_A_TEXT, _AROUND_A_PAIR = 12, 60


class Texts(NamedTuple):
    """Texts of a corpus; tokens and sentences are estimates unless the source is built in."""

    rows: float
    tokens: float
    sentences: float
    basis: str

    def limited(self, share: float) -> "Texts":
        return Texts(self.rows * share, self.tokens * share, self.sentences * share, self.basis)


class Pairs(NamedTuple):
    """Preference pairs on both sides of the split; tokens of a pair count its prompt once."""

    train: float
    heldout: float
    tokens_a_pair: float
    basis: str


class Sizes(NamedTuple):
    """What the stages read; None where it is not known."""

    texts: Texts | None
    """What extraction reads: the corpus, up to its limits."""
    pairs: Pairs | None
    corpus: Texts | None = None
    unknown: tuple[str, ...] = ()
    """Data sets of unknown size."""


def sizes_of(out: Path, data: DataSettings | None, extraction: ExtractionSettings = ExtractionSettings()) -> Sizes:
    """Texts that extraction reads, and pairs: counted where `corpus` and `pairs` are finished, else from the sources.

    Raises UserError for a source that cannot be opened.
    """
    texts = _counted_texts(out / "corpus") or (_texts(data) if data else None)
    pairs = _counted_pairs(out / "pairs", data) or (_pairs(data) if data else None)
    unknown = []
    if isinstance(texts, str):
        unknown.append(texts)
        texts = _by_limit(extraction)
    if isinstance(pairs, str):
        unknown.append(pairs)
        pairs = None
    return Sizes(texts and _limited(texts, extraction), pairs, texts, tuple(unknown))


def _by_limit(extraction: ExtractionSettings) -> Texts | None:
    """An upper bound, where the source is not known and extraction stops at a number of tokens or of sentences."""
    limits = {
        "--limit-tokens": extraction.limit_tokens,
        "--limit-sentences": extraction.limit_sentences and extraction.limit_sentences * TOKENS_A_SENTENCE,
    }
    known = {flag: float(tokens) for flag, tokens in limits.items() if tokens is not None}
    if not known:
        return None
    flag = min(known, key=known.__getitem__)
    return Texts(known[flag] / 1000, known[flag], known[flag] / TOKENS_A_SENTENCE, f"at most, by {flag}")


def _limited(texts: Texts, extraction: ExtractionSettings) -> Texts:
    shares = [1.0]
    if extraction.limit_rows is not None:
        shares.append(extraction.limit_rows / max(1.0, texts.rows))
    if extraction.limit_tokens is not None:
        shares.append(extraction.limit_tokens / max(1.0, texts.tokens))
    if extraction.limit_sentences is not None:
        shares.append(extraction.limit_sentences / max(1.0, texts.sentences))
    return texts.limited(min(shares))


def _counted_texts(corpus: Path) -> Texts | None:
    counts = _counts(corpus)
    if not counts.get("characters"):
        return None
    tokens = counts["characters"] / CHARACTERS_A_TOKEN
    # Where the texts are those of built-in sources alone, their tokens and sentences are known better.
    known = [TEXT_SOURCES.get(source) for source in counts.get("sources", {})]
    sentences = tokens / TOKENS_A_SENTENCE
    if known and all(known):
        rows, all_tokens, ends = (sum(column) for column in zip(*(one[:3] for one in known if one), strict=True))
        tokens, sentences = counts["rows"] * all_tokens / rows, counts["rows"] * ends / rows
    return Texts(float(counts["rows"]), tokens, sentences, f"counted in {corpus}")


def _counted_pairs(folder: Path, data: DataSettings | None) -> Pairs | None:
    splits = _counts(folder).get("splits")
    if not splits:
        return None
    sources = _counts(folder).get("sources") or dict.fromkeys(data.pairs if data else ())
    known = [PAIR_SOURCES[source].tokens_a_pair for source in sources if source in PAIR_SOURCES]
    tokens = sum(known) / len(known) if known else 500.0
    return Pairs(float(splits.get("train", 0)), float(splits.get("heldout", 0)), tokens, f"counted in {folder}")


def _counts(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "manifest.json").read_text())["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _texts(data: DataSettings) -> Texts | str | None:
    """The sum over sources; the name of a source whose size is not known."""
    total = Texts(0, 0, 0, "")
    for spec in data.texts:
        if (known := TEXT_SOURCES.get(spec)) is not None:
            rows, tokens, sentences = map(float, known[:3])
        elif spec.startswith("hf:"):
            if data.max_texts is None:
                return spec
            rows, tokens = float(data.max_texts), data.max_texts * 1000.0
            sentences = tokens / TOKENS_A_SENTENCE
        else:
            rows, characters = _text_files(spec, data.text_field)
            tokens = characters / CHARACTERS_A_TOKEN
            sentences = tokens / TOKENS_A_SENTENCE
        share = min(1.0, data.max_texts / max(1.0, rows)) if data.max_texts else 1.0
        total = Texts(total.rows + rows * share, total.tokens + tokens * share, total.sentences + sentences * share, "")
    return total._replace(basis=_basis(data.texts)) if data.texts else None


def _pairs(data: DataSettings) -> Pairs | str | None:
    count = tokens = 0.0
    for spec in data.pairs:
        if (known := PAIR_SOURCES.get(spec)) is not None:
            rows, each = float(known.rows), float(known.tokens_a_pair)
        elif spec.startswith("hf:"):
            if data.max_pairs is None:
                return spec
            rows, each = float(data.max_pairs), 500.0
        else:
            rows, characters = _pair_files(spec, data.column_names)
            each = characters / max(1.0, rows) / CHARACTERS_A_TOKEN
        kept = min(rows, data.max_pairs or rows)
        count, tokens = count + kept, tokens + kept * each
    if not count:
        return None
    heldout = data.heldout_share * count
    return Pairs(count - heldout, heldout, tokens / count, _basis(data.pairs))


def _basis(specs: tuple[str, ...]) -> str:
    kinds = {"hf" if spec.startswith("hf:") else "known" if ":" in spec else "files" for spec in specs}
    said = {"known": "known", "hf": "known or assumed for the data set", "files": "bytes counted, first rows read"}
    return ", ".join(said[kind] for kind in sorted(kinds))


def _text_files(spec: str, text_field: str) -> tuple[float, float]:
    """(rows, characters) of a path or glob."""
    from sarm.data.sources.places import source_files
    from sarm.data.sources.texts import TextRecord, open_texts

    files = source_files(spec, ())
    rows = islice(open_texts(str(files[0]), text_field), _SAMPLED_ROWS)
    return _scaled(files, (len(row.text) for row in rows if isinstance(row, TextRecord)), _AROUND_A_TEXT)


def _pair_files(spec: str, columns: dict[str, str]) -> tuple[float, float]:
    """(pairs, characters) of a path, pattern or folder."""
    from sarm.data.sources.layouts.registry import RowOutcome
    from sarm.data.sources.pairs import check_source, row_outcomes
    from sarm.data.sources.places import source_files

    check_source(spec, columns)
    files = source_files(spec, ())
    found = row_outcomes(str(files[0]), columns, _SAMPLED_ROWS)
    used = [outcome.pairs for outcome in found if isinstance(outcome, RowOutcome) and outcome.reason is None]
    lengths = (
        sum(
            sum(len(message["content"]) for message in pair.prompt) + len(pair.chosen) + len(pair.rejected)
            for pair in pairs
        )
        for pairs in used
    )
    rows, characters = _scaled(files, lengths, _AROUND_A_PAIR)
    return rows * sum(map(len, used)) / max(1, len(used)), characters


def _scaled(files: list[Path], lengths: Iterator[int], around: int) -> tuple[float, float]:
    """(rows, characters) of all files, from the characters of the first rows and the bytes of the files."""
    from sarm.data.sources.files import format_of

    found = list(lengths)
    if not found:
        return 0.0, 0.0
    mean = sum(found) / len(found)
    if len(found) < _SAMPLED_ROWS and len(files) == 1:
        return float(len(found)), float(sum(found))
    if all(file.name.endswith(".parquet") for file in files):
        import pyarrow.parquet as pq

        rows = float(sum(pq.read_metadata(file).num_rows for file in files))
    elif all(file.name.endswith(".jsonl") for file in files):
        rows = float(sum(map(_lines, files)))
    else:
        unpacked = sum(file.stat().st_size * format_of(file).unpacked for file in files)
        rows = unpacked / (mean + around)
    return rows, rows * mean


def _lines(path: Path) -> float:
    """Lines of a file; of a large one by those of its beginning."""
    with path.open("rb") as file:
        beginning = file.read(_READ_BYTES)
    share = len(beginning) / max(1, path.stat().st_size)
    return beginning.count(b"\n") / max(share, 1e-12)
