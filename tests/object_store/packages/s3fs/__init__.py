"""Stands in for s3fs in processes that tests start."""

from tests.object_store.emulated import S3FileSystem

__all__ = ["S3FileSystem"]
