"""The pages of whatever a writer wrote are those of its footer; those of another place, or of another file, are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stream.footers import _check_magic
from stream.pages import check_chunk

ROWS, GROUP = 400, 100
WRITERS: dict[str, dict[str, Any]] = {
    "plain": {"use_dictionary": False},
    "dictionary": {"use_dictionary": True},
    "version 2": {"data_page_version": "2.0"},
    "version 2 and dictionary": {"data_page_version": "2.0", "use_dictionary": True},
    "checksums": {"write_page_checksum": True},
    "many pages": {"data_page_size": 500, "write_batch_size": 3},
    "an index": {"write_page_index": True, "data_page_size": 500},
    "no statistics": {"write_statistics": False},
    "old": {"version": "1.0"},
    **{codec: {"compression": codec} for codec in ("none", "gzip", "brotli", "zstd", "lz4")},
}


def table(seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    texts = [rng.bytes(int(rng.integers(1, 40))) for _ in range(ROWS)]
    structs = [{"bytes": text, "path": None if number % 3 else "a"} for number, text in enumerate(texts)]
    return pa.table({"image": structs, "label": rng.integers(0, 5, ROWS), "list": [[1] * (n % 4) for n in range(ROWS)]})


def chunks(path: Path) -> list[tuple[int, int, int]]:
    """Where each column chunk begins and ends in a file, and how many values it has."""
    footer, found = pq.read_metadata(path), []
    for group in range(footer.num_row_groups):
        for leaf in range(footer.num_columns):
            column = footer.row_group(group).column(leaf)
            first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            found.append((first, first + column.total_compressed_size, column.num_values))
    return found


@pytest.mark.parametrize("options", WRITERS.values(), ids=list(WRITERS))
def test_only_a_chunk_itself_passes(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=GROUP, **options)
    data = memoryview(path.read_bytes())
    found = chunks(path)
    assert len(found) == ROWS // GROUP * 4
    for first, end, values in found:
        check_chunk(data[first:end], values)
        before = max(0, first - 4)
        for wrong in (
            data[first + 1 : end + 1],
            data[first : end - 1],
            data[before : before + end - first],
        ):
            with pytest.raises(ValueError, match="page"):
                check_chunk(wrong, values)
        with pytest.raises(ValueError, match="hold"):
            check_chunk(data[first:end], values + 1)


def test_another_groups_pages_do_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=GROUP)
    data = memoryview(path.read_bytes())
    images = chunks(path)[::4]
    for number, (first, end, values) in enumerate(images):
        other = images[number - 1][0]
        with pytest.raises(ValueError, match="page"):
            check_chunk(data[other : other + end - first], values)


def test_a_flipped_bit_is_seen_where_the_writer_kept_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=GROUP, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    first, end, values = chunks(path)[0]
    data[end - 3] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        check_chunk(memoryview(data)[first:end], values)


def test_rubbish_ends_soon_in_an_error() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = rng.bytes(int(rng.integers(1, 300)))
        with pytest.raises(ValueError):  # noqa: PT011 (any of them)
            check_chunk(memoryview(data), 10**6)
    for byte in (0x15, 0x19, 0x1C, 0xFF, 0xF9):
        with pytest.raises(ValueError):  # noqa: PT011
            check_chunk(memoryview(bytes([byte]) * 10_000), 10**6)


def test_only_the_end_of_a_parquet_file_is_one() -> None:
    _check_magic(b"....PAR1")
    for data in (b"", b"PAR", b"PAR1.", b"....PAR2"):
        with pytest.raises(ValueError, match="whole parquet"):
            _check_magic(data)
