import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sarm.contracts.tables import activations_table
from sarm.data.store.activations import activation_table
from sarm.data.store.blocks import plan_blocks
from sarm.data.store.parts import (
    AuditError,
    audit,
    finished_table,
    has_part,
    part_name,
    read_counts,
    remove_temporaries,
    with_sink_columns,
    write_part,
    write_rejected,
)

SCHEMA = activations_table(4, {"dtype": "float16"})


def rows(ids: list[int], reject: list[str | None] | None = None) -> pa.Table:
    columns = {name: list(range(len(ids))) for name in ("position", "token_id", "num_tokens")}
    columns |= {"row_id": ids, "doc_id": ["d"] * len(ids), "side": ["text"] * len(ids), "truncated": [False] * len(ids)}
    columns["reject"] = reject or [None] * len(ids)
    return activation_table(columns, torch.arange(4.0 * len(ids)).view(-1, 4), "float16", with_sink_columns(SCHEMA))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"row_id": pa.array(range(6), pa.int64())}), path, row_group_size=3)
    return plan_blocks([path], 1024)


def check(folder, blocks):
    return audit(folder, blocks, ["row_id"], lambda t: t.column("row_id").to_pylist(), "row_id", ["side", "position"])


def test_a_part_holds_the_kept_rows_and_counts_the_others(tmp_path, corpus):
    write_part(
        finished_table(rows([0, 1, 2, 3, 4, 5], [None, "overflow", None, None, None, None]), SCHEMA), tmp_path, 0
    )
    counts = read_counts(tmp_path)
    assert (counts["rows"], counts["rejected"]) == (5, {"overflow": 1})
    assert check(tmp_path, corpus) == {"audited_rows": 6, "audited_blocks": 1}
    assert write_rejected(tmp_path) == 1
    assert pq.read_table(tmp_path / "rejected.parquet").to_pylist() == [
        {"row_id": 1, "pair_id": None, "side": "text", "position": 1, "reason": "overflow"}
    ]


def test_writing_again_replaces(tmp_path):
    for ids in ([0, 1, 2], [0, 1]):
        write_part(finished_table(rows(ids), SCHEMA), tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["part-000003.parquet"]
    assert read_counts(tmp_path)["rows"] == 2


def test_a_torn_part_is_not_done_and_goes(tmp_path):
    write_part(finished_table(rows([0, 1, 2]), SCHEMA), tmp_path, 0)
    path = tmp_path / part_name(0)
    path.write_bytes(path.read_bytes()[:-9])
    assert not has_part(tmp_path, 0)
    assert not path.exists()


def test_what_a_killed_writer_left_is_no_part(tmp_path):
    (tmp_path / f".{part_name(0)}.abc.tmp").write_bytes(b"PAR1")
    assert not has_part(tmp_path, 0)
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 3, 4], "1 rows of .* neither there nor rejected, e.g. 5"),
        ([0, 1, 2, 3, 4, 5, 9], "1 rows are not of block 0"),
    ],
)
def test_the_audit_notices_lost_and_foreign_rows(tmp_path, corpus, ids, message):
    write_part(finished_table(rows(ids), SCHEMA), tmp_path, 0)
    with pytest.raises(AuditError, match=message):
        check(tmp_path, corpus)


def test_the_audit_notices_doubled_rows(tmp_path, corpus):
    once = rows([0, 1, 2, 3, 4, 5])
    write_part(finished_table(pa.concat_tables([once, once.slice(2, 1)]), SCHEMA), tmp_path, 0)
    with pytest.raises(AuditError, match=r"1 rows of block 0 .* are there twice"):
        check(tmp_path, corpus)


def test_a_block_that_comes_twice_is_noticed(tmp_path, corpus):
    for number in (0, 1):
        write_part(finished_table(rows([0, 1, 2, 3, 4, 5]), SCHEMA), tmp_path, number)
    with pytest.raises(AuditError, match="6 ids are in more than one block"):
        check(tmp_path, [corpus[0], corpus[0]._replace(number=1)])
