import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.store.activation_stores import D_IN, numbered, table_of, write_store

from sarm.data.store.activations import ActivationStore, file_moments, statistics_of, vectors, write_activation_file
from sarm.settings.checks import UserError


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    """50 rows in files of 10."""
    return ActivationStore(
        write_store(tmp_path / "store", [table_of(numbered(i, 10), i) for i in range(0, 50, 10)])
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(bits=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=4, max_size=40))
def test_every_16_bit_pattern_comes_back(dtype, bits):
    x = torch.tensor(bits[: len(bits) // 4 * 4], dtype=torch.int16).view(-1, 4).view(getattr(torch, dtype))
    sink = pa.BufferOutputStream()
    write_activation_file(table_of(x, dtype=dtype), sink)
    found = vectors(pq.read_table(pa.BufferReader(sink.getvalue())), dtype)
    assert found.dtype == x.dtype
    assert torch.equal(found.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_vectors_are_rounded_to_the_nearest(dtype):
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vectors(table_of(x, dtype=dtype), dtype), x.to(getattr(torch, dtype)))


@given(start=st.integers(0, 30), length=st.integers(0, 30))
def test_vectors_of_a_slice_are_the_slice_of_the_vectors(start, length):
    table = table_of(numbered(0, 30))
    assert torch.equal(
        vectors(table.slice(start, length), "float16"), vectors(table, "float16")[start : start + length]
    )


def test_vectors_of_a_table_in_chunks():
    table = pa.concat_tables([table_of(numbered(0, 4)), table_of(numbered(4, 3)).slice(1)])
    assert torch.equal(vectors(table, "float16").float(), torch.cat([numbered(0, 4), numbered(5, 2)]))


def test_a_store_reads_back_keys_and_vectors_in_file_order(store):
    keys, x = store.read()
    assert keys.column_names == ["row_id", "doc_id", "side", "position"]
    assert keys["row_id"].to_pylist() == list(range(50))
    assert torch.equal(x, numbered(0, 50))
    assert x.dtype == torch.float32
    assert (store.d_in, store.num_rows, store.metadata["layer"]) == (D_IN, 50, 1)


def test_the_format_is_plain_fixed_width_bytes_with_checksums(store):
    group = pq.ParquetFile(store.files[0]).metadata.row_group(0)
    column = group.column(group.num_columns - 1)
    assert (column.path_in_schema, column.compression, column.has_dictionary_page) == (
        "activation",
        "UNCOMPRESSED",
        False,
    )
    assert pq.read_schema(store.files[0]).field("activation").type == pa.binary(2 * D_IN)


def test_an_unfinished_folder_is_refused(tmp_path):
    write_store(tmp_path / "a", [table_of(numbered(0, 3))], finish=False)
    with pytest.raises(UserError, match="unfinished"):
        ActivationStore(tmp_path / "a")
    with pytest.raises(UserError, match="no folder"):
        ActivationStore(tmp_path / "b")


def test_an_empty_store_is_refused(tmp_path):
    write_store(tmp_path / "a", [table_of(numbered(0, 0))])
    with pytest.raises(UserError, match="holds no activations"):
        ActivationStore(tmp_path / "a")


@pytest.mark.parametrize("other", [{"layer": 2}, {"model": "else"}, {"dtype": "bfloat16"}])
def test_files_of_different_activations_are_refused(tmp_path, other):
    folder = write_store(tmp_path / "a", [table_of(numbered(0, 3)), table_of(numbered(3, 3), 3, **other)])
    with pytest.raises(UserError, match=r"part-000001\.parquet holds activations of .*extract again"):
        ActivationStore(folder)


def test_files_of_different_width_are_refused(tmp_path):
    folder = write_store(tmp_path / "a", [table_of(numbered(0, 3)), table_of(numbered(3, 3)[:, :4].contiguous(), 3)])
    with pytest.raises(UserError, match=r"part-000001\.parquet holds activations of"):
        ActivationStore(folder)


def test_a_flipped_bit_in_a_vector_is_noticed(store):
    path = store.files[2]
    raw = bytearray(path.read_bytes())
    # Neither the first nor the last row: those stand as statistics outside of the checked pages too.
    place = raw.index(numbered(25, 1).half().numpy().tobytes())
    raw[place + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"part-000002\.parquet is damaged.*extract again"):
        store.read()


def test_a_file_that_breaks_off_is_noticed(store):
    store.files[1].write_bytes(store.files[1].read_bytes()[:-50])
    with pytest.raises(UserError, match=r"part-000001\.parquet is damaged"):
        store.read()


def test_a_file_that_breaks_off_is_noticed_on_opening(store):
    store.files[1].write_bytes(store.files[1].read_bytes()[:-50])
    with pytest.raises(UserError, match=r"part-000001\.parquet is damaged"):
        ActivationStore(store.folder)


def test_statistics_over_files_equal_those_over_all_rows():
    x = torch.randn(70, D_IN, generator=torch.Generator().manual_seed(1)) * 3 + 5
    parts = [table_of(part) for part in x.split([1, 40, 29])]
    found = statistics_of([file_moments(part, "float16") for part in parts])
    stored = x.half().double().numpy()
    assert found["rows"] == 70
    np.testing.assert_allclose(found["mean"], stored.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], stored.std(0), rtol=1e-9)
    np.testing.assert_allclose(found["mean_norm"], np.linalg.norm(stored, axis=1).mean(), rtol=1e-12)
    json.dumps(found, allow_nan=False)


def test_statistics_of_equal_rows_have_no_deviation():
    found = statistics_of([file_moments(table_of(torch.full((5, D_IN), 0.1)), "float16")])
    np.testing.assert_allclose(found["std"], 0.0, atol=1e-8)


def test_vectors_of_another_width_than_the_file_says_are_refused(tmp_path):
    folder = write_store(tmp_path / "a", [table_of(numbered(0, 3))])
    wide = table_of(torch.cat([numbered(0, 3), numbered(0, 3)], 1)).replace_schema_metadata(
        table_of(numbered(0, 3)).schema.metadata
    )
    write_activation_file(wide, folder / "part-000000.parquet")
    with pytest.raises(
        UserError, match=r"part-000000\.parquet holds fixed_size_binary\[24\] values, expected 12 bytes for d_in 6"
    ):
        ActivationStore(folder)
