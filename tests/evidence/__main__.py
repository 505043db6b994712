"""`make evidence`: measure what is missing, and write the table of claims. Whatever is interrupted goes on where it was.

make evidence                                       everything: hours
make evidence CLAIMS=sarm_as_good_as_scalar         what decides one claim
make evidence PIECES=trainings/demo/fold0/seed0     some of the pieces
make evidence MINUTES=45                            begin no piece after so many minutes
make evidence MINUTES=0                             the table of what was measured before
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from tests.evidence import page, pieces
from tests.evidence.claims import CLAIMS
from tests.evidence.pieces import ROOT, Piece
from tests.evidence.trainings import training_pieces


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="make evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--claims", nargs="*", default=[], choices=[claim.name for claim in CLAIMS], metavar="CLAIM")
    parser.add_argument("--pieces", nargs="*", default=[], metavar="PIECE")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "evidence")
    settings = parser.parse_args(arguments)
    every = training_pieces()
    claims = [claim for claim in CLAIMS if not settings.claims or claim.name in settings.claims]
    try:
        asked = pieces.chosen(every, settings.pieces or sorted({claim.study for claim in claims}))
    except ValueError as error:
        parser.error(str(error))
    measure(asked, settings.work, settings.minutes)
    write(every)


def measure(asked: Sequence[Piece], work: Path, minutes: float) -> None:
    """Measure pieces that are missing, one after the other, and begin none when the time is over."""
    end = time.monotonic() + 60 * minutes
    left = pieces.missing(asked)
    print(f"evidence: {len(asked) - len(left)} of {len(asked)} pieces are measured", flush=True)
    for number, piece in enumerate(left):
        if time.monotonic() >= end:
            print(f"evidence: {len(left) - number} pieces are left for another time", flush=True)
            return
        kept = pieces.measure(piece, work)
        print(f"evidence: {piece.name} in {kept['seconds']} s", flush=True)


def write(every: Sequence[Piece]) -> None:
    """Write docs/evidence.md and outputs/evidence.json from all that was measured."""
    kept = {piece.name: found for piece in every if (found := pieces.read(piece)) is not None}
    made = page.rows(CLAIMS, every, kept)
    (ROOT / "docs" / "evidence.md").write_text(page.page(made, kept))
    out = ROOT / "outputs" / "evidence.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.as_json() for row in made], indent=1))
    for row in made:
        print(f"{row.verdict:14s} {row.claim.says}")


if __name__ == "__main__":
    main()
