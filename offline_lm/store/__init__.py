"""The store: Delta tables of Parquet files, written with `deltalake`, read with DuckDB (DESIGN section 8)."""

from offline_lm.store.connect import connect
from offline_lm.store.tables import Store

__all__ = ["Store", "connect"]
