"""What contents of pairs spell that looks like a template's own, counted over files."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from sarm.contracts.ids import stable_int
from sarm.contracts.passes import Spelled
from sarm.data.tokens.chat import ChatTokenizer

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
    return {"contents_with_control_tokens": found.control_tokens, "contents_already_templated": found.templated}
