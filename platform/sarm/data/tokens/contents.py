"""What contents of pairs and of requests spell that looks like a template's own, counted over all of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from sarm.contracts.ids import stable_int
from sarm.contracts.passes import SPELLED_COUNTS, Spelled
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.templated_text import control_spelled_in, template_spelled_in

_COLUMNS = ("split", "prompt", "chosen", "rejected")


def count_spelled(files: Sequence[Path], split: str, chat: ChatTokenizer) -> dict[str, int]:
    """How many distinct contents of these pairs/v1 (`split` "all" for every one) spell control tokens of the tokenizer, or turns."""
    found = Spelled()
    seen: set[int] = set()
    for path in files:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(_COLUMNS)):
                for row in batch.to_pylist():
                    if split not in ("all", row["split"]):
                        continue
                    for text in (*(message["content"] for message in row["prompt"]), row["chosen"], row["rejected"]):
                        spelled = chat.spelled_in([text])
                        if any(spelled) and (key := stable_int(text)) not in seen:
                            seen.add(key)
                            found += spelled
    return dict(zip(SPELLED_COUNTS, found, strict=True))


def count_spelled_texts(texts: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How many distinct contents of these (prompt as a JSON list of role, content and more; answer) spell control tokens, or turns, of some template in use."""
    prompts: set[str] = set()
    contents: set[str] = set()
    for prompt, answer in texts:
        prompts.add(prompt)
        contents.add(answer)
    contents |= {content for prompt in prompts for _, content, *_ in json.loads(prompt)}
    templated = sum(template_spelled_in(content) is not None for content in contents)
    return dict(zip(SPELLED_COUNTS, (sum(map(control_spelled_in, contents)), templated), strict=True))
