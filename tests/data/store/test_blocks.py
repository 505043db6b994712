from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.data.store.blocks import plan_blocks, read_block


def write(folder: Path, sizes: list[int], group_rows: int, letters: int = 400) -> list[Path]:
    """Files of `sizes` rows whose values say where they are."""
    files, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"part-{number:05}.parquet"
        values = list(range(first, first + size))
        table = {"row_id": values, "text": [f"{i} " * (letters // 4) for i in values], "key": [i // 5 for i in values]}
        pq.write_table(pa.table(table), path, row_group_size=group_rows, write_page_checksum=True, compression="none")
        files.append(path)
        first += size
    return files


@pytest.mark.parametrize(("group_rows", "kilobytes"), [(7, 1), (7, 40), (1000, 1), (1000, 64), (50, 4096)])
def test_every_row_is_in_one_block_in_order(tmp_path, group_rows, kilobytes):
    files = write(tmp_path, [403, 1, 120], group_rows)
    blocks = plan_blocks(files, kilobytes)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    read = [i for block in blocks for i in read_block(block, ["row_id"]).column(0).to_pylist()]
    assert read == list(range(524))
    assert plan_blocks(files, kilobytes) == blocks


@given(st.integers(1, 600))
def test_a_limit_keeps_the_first_rows(tmp_path_factory, limit):
    folder = tmp_path_factory.getbasetemp() / "limited"
    files = write(folder, [300, 224], 100) if not folder.exists() and not folder.mkdir() else sorted(folder.iterdir())
    blocks = plan_blocks(files, 16, limit_rows=limit)
    read = [i for block in blocks for i in read_block(block, ["row_id"]).column(0).to_pylist()]
    assert read == list(range(min(limit, 524)))


def test_a_small_corpus_still_has_blocks_for_several_actors(tmp_path):
    assert len(plan_blocks(write(tmp_path, [2000], 1000), 1024)) >= 16


def test_neighbours_that_belong_together_stay_together(tmp_path):
    files = write(tmp_path, [403, 120], 50)
    blocks = plan_blocks(files, 1, together="key")
    assert sum(block.num_rows for block in blocks) == 523
    seen: list[set[int]] = [set(read_block(block, ["key"]).column(0).to_pylist()) for block in blocks]
    in_one_file = [block.file for block in blocks]
    for a in range(len(blocks) - 1):
        assert in_one_file[a] != in_one_file[a + 1] or not seen[a] & seen[a + 1]


def test_a_damaged_file_is_named(tmp_path):
    (path,) = write(tmp_path, [200], 100)
    (block, *_) = plan_blocks([path], 1024)
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"part-00000\.parquet is damaged"):
        read_block(block)
