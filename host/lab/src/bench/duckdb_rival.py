"""Sorts log.parquet with DuckDB and casts its columns to those of a data set's impressions.

The arguments: what is sorted, `rows` by their own time or `requests` by that of their first row;
the threads; the limit of memory. Prints the version of DuckDB.
"""

import shutil
import sys

import duckdb

order, threads, memory = sys.argv[1:]
orders = {
    "rows": "shown_at, request_id",
    "requests": "min(shown_at) OVER (PARTITION BY user_id, placement, request_id), request_id",
}
connection = duckdb.connect()
connection.execute(f"SET threads = {threads}; SET memory_limit = '{memory}'")
connection.execute("SET temp_directory = 'duckdb'; SET enable_progress_bar = false")
connection.execute(f"""
    COPY (
        SELECT request_id AS request, shown_at AS time_ms, closed_at AS outcome_ms,
            user_id AS user, item_id AS item,
            (list_position(['home', 'search', 'related'], placement) - 1)::UINTEGER AS surface,
            (clicked::UINTEGER + 2 * bought)::UINTEGER AS actions, 3::UINTEGER AS known,
            false AS history_only, watch_ratio::FLOAT AS value_watch_ratio,
            hash(device) AS device, battery::FLOAT AS battery
        FROM 'log.parquet' ORDER BY {orders[order]}
    ) TO 'duckdb.parquet' (FORMAT parquet, COMPRESSION zstd)
""")
shutil.rmtree("duckdb", ignore_errors=True)
print(duckdb.__version__)
