"""Rows of Parquet files as JSON values, through pyarrow (the extra `parquet`)."""

import datetime
import decimal
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH_ROWS = 1024


def parquet_values(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a file as an object, its values as pyarrow gives them (see `plain`).

    Raises:
        ValueError: pyarrow is not installed, or cannot read the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}:1: file: expected pyarrow for a Parquet file, got no such package; "
            "pip install 'wizard-engine[parquet]'"
        ) from None
    number = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    yield row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}:{number}: file: expected a readable Parquet file, got {error}") from None


def plain(value: Any) -> Any:
    """The value in JSON types: dates and decimals as text, NaN (how pandas writes null) as None.

    Raises:
        ValueError: an infinity, bytes that are no UTF-8, or another type that JSON has no form for.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and not math.isinf(value):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise ValueError(f"column: expected a value that JSON has a form for, got {type(value).__name__} {value!r:.40}")
