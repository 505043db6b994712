"""What other libraries' files have no field for, in `origin.json` beside them: which rows the SAE takes, and where it comes from."""

import json
from pathlib import Path
from typing import Any

from sarm.data.formats.sae_weights import SaeWeights

ORIGIN = "origin.json"


def write_origin(weights: SaeWeights, folder: Path) -> None:
    """Write it into the folder of the library's own files."""
    (folder / ORIGIN).write_text(
        json.dumps(
            {
                "input": weights.input,
                "k": weights.k,
                "signed": weights.rule == "signed_topk",
                "metadata": weights.metadata,
            },
            indent=2,
        )
    )


def read_origin(folder: Path, input: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """`input` and `metadata` as this platform wrote them, else the given ones."""
    if not (folder / ORIGIN).is_file():
        return {"input": input, "metadata": metadata}
    said = json.loads((folder / ORIGIN).read_text())
    return {"input": said["input"], "metadata": said["metadata"]}
