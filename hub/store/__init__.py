"""What the hub keeps, behind one interface (`base.Store`): SQLite now, PostgreSQL beyond one machine."""

from .base import EdgeRow, Store, StoredRecord, StoreError, StreamRow

__all__ = ["EdgeRow", "Store", "StoreError", "StoredRecord", "StreamRow"]
