"""Stands in for gcsfs in processes that tests start."""

from tests.object_store.emulated import GCSFileSystem

__all__ = ["GCSFileSystem"]
