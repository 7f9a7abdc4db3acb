"""The page structure of a parquet column chunk: whether these bytes can be the ones that the footer speaks of.

Thrift's compact protocol is read as far as page headers need it (Apache Thrift, thrift-compact-protocol.md; Apache
Parquet, parquet.thrift).
"""

import zlib
from typing import Any

DATA_PAGE, DATA_PAGE_V2 = 0, 3
TYPE, SIZE, CRC, HEADER, HEADER_V2 = 1, 3, 4, 5, 8  # fields of a PageHeader
VALUES = 1  # the field of either data page header


def check_chunk(data: memoryview, values: int) -> None:
    """Raise ValueError unless `data` is a whole column chunk of so many values, its pages following one another."""
    position = found = 0
    try:
        while position < len(data):
            header, position = _struct(data, position)
            end = position + header[SIZE]
            if not position <= end <= len(data):
                raise ValueError("a page ends outside its column")
            if CRC in header and zlib.crc32(data[position:end]) != header[CRC] % 2**32:
                raise ValueError("a page has another checksum")
            if header[TYPE] in (DATA_PAGE, DATA_PAGE_V2):
                found += header[HEADER if header[TYPE] == DATA_PAGE else HEADER_V2][VALUES]
            position = end
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("there is no page where one should begin") from error
    if found != values:
        raise ValueError(f"its pages hold {found:,} values and not {values:,}")


def _struct(data: memoryview, position: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = _integer(data, position)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        else:
            fields[number], position = _value(data, position, kind)
    return fields, position + 1


def _value(data: memoryview, position: int, kind: int) -> tuple[Any, int]:
    """A value of this type, other than a boolean field."""
    if kind in (1, 2, 3):
        return data[position], position + 1
    if kind in (4, 5, 6):
        return _integer(data, position)
    if kind == 7:
        return None, position + 8
    if kind == 8:
        length, position = _varint(data, position)
        return None, position + length
    if kind in (9, 10):
        head = data[position]
        count, position = (head >> 4, position + 1) if head >> 4 < 15 else _varint(data, position + 1)
        if count > len(data):
            raise IndexError
        for _ in range(count):
            _, position = _value(data, position, head & 15)
        return None, position
    if kind == 12:
        return _struct(data, position)
    raise LookupError(kind)


def _integer(data: memoryview, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise LookupError("no integer")
