"""Writes the files beside it: one log, by several writers of Parquet and their own types.

    pip install pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 duckdb==2.0.1 && python make.py
"""

from datetime import datetime, timezone
from decimal import Decimal

import duckdb
import pandas
import polars
import pyarrow
import pyarrow.parquet as parquet

TIMES = [datetime(2025, 11, 24, 10, 0, s, 250_000, tzinfo=timezone.utc) for s in range(5)]
ROWS = {
    "customer": ["u-1", "u-2", "u-1", "u-3", "u-2"],
    "sku": [7, 8, 9, 7, 8],
    "shown_at": TIMES,
    "clicked": [True, False, None, True, False],
    "revenue": [12.5, None, 0.25, None, 3.0],
    "stock": [3.0, None, 5.0, 0.0, 1.0],
    "tags": [["new", "red"], [], None, ["sale"], ["red"]],
    "page": [{"position": 1}, {"position": None}, {"position": 3}, None, {"position": 5}],
}
TYPES = {
    "customer": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    "sku": pyarrow.uint16(),
    "shown_at": pyarrow.timestamp("ns", "Europe/Berlin"),
    "clicked": pyarrow.bool_(),
    "revenue": pyarrow.decimal128(12, 3),
    "stock": pyarrow.float16(),
    "tags": pyarrow.list_(pyarrow.large_string()),
    "page": pyarrow.struct([("position", pyarrow.int8())]),
}


def table(types):
    columns = dict(ROWS)
    if pyarrow.types.is_decimal(types["revenue"]):
        columns["revenue"] = [None if x is None else Decimal(str(x)) for x in ROWS["revenue"]]
    if pyarrow.types.is_dictionary(types["customer"]):
        columns["customer"] = pyarrow.array(ROWS["customer"]).dictionary_encode()
    if pyarrow.types.is_float16(types["stock"]):
        plain = pyarrow.array(ROWS["stock"], pyarrow.float32())
        columns["stock"] = plain.cast(pyarrow.float16())
    arrays = [pyarrow.array(columns[name]) if not isinstance(columns[name], list)
              else pyarrow.array(columns[name], types[name]) for name in types]
    return pyarrow.table(dict(zip(types, arrays)))


plain = {**TYPES, "customer": pyarrow.string(), "sku": pyarrow.int64(),
         "revenue": pyarrow.float64(), "stock": pyarrow.float32(),
         "shown_at": pyarrow.timestamp("us", "UTC")}
parquet.write_table(table(TYPES), "pyarrow-types.parquet", compression="gzip", row_group_size=2,
                    data_page_version="2.0")
parquet.write_table(table({**plain, "shown_at": pyarrow.timestamp("ms")}), "pyarrow-int96.parquet",
                    compression="lz4", use_deprecated_int96_timestamps=True, use_dictionary=False)
frame = table(plain).to_pandas()
# What pandas makes of whole numbers with a null.
frame["stock"] = frame["stock"].astype("float64")
frame.to_parquet("pandas.parquet")
polars.from_arrow(table(plain)).write_parquet("polars.parquet")
log = table(plain)
duckdb.sql("COPY (SELECT * REPLACE (revenue::DECIMAL(9, 2) AS revenue, sku::HUGEINT AS sku, "
           "shown_at AT TIME ZONE 'UTC' AS shown_at) FROM log) TO 'duckdb.parquet' "
           "(FORMAT parquet, COMPRESSION zstd)")
