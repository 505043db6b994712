"""Every bad input of the table: one clear line, status 2, before a cluster starts, and nothing that looks finished left behind.

Jobs run in this process as their scripts, which takes fractions of a second instead of seconds; the last tests run some as processes.
`python tests/bench/bench_bad_inputs.py` times each as a user meets it.
"""

import pytest
from tests.untrusted import rows_of_answers, rows_of_data, rows_of_models, rows_of_settings
from tests.untrusted.world import Row, World

ROWS = [row for part in (rows_of_settings, rows_of_data, rows_of_models, rows_of_answers) for row in part.TABLE.rows]


def test_the_table_is_whole():
    assert [row.number for row in ROWS] == list(range(1, 79))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number} {row.name}")
def test_a_bad_input(row: Row, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(row.check, str):
        pytest.skip(f"cannot be put in: {row.check}")
    if row.number >= 68:
        # Where answers are kept.
        monkeypatch.setenv("SARM_CACHE", str(world.tmp / "cache"))
    row.check(world)
