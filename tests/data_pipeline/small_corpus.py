"""Helpers that several tests of the data room share."""

import json

TAG = "<|audioplaceholder|>"


def frames(samples: int) -> int:
    """A perception of one frame per 80 ms."""
    return -(-samples // 1280)


def write_manifest(path, rows):
    """Writes a NeMo manifest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    """Reads a NeMo manifest."""
    return [json.loads(line) for line in path.read_text().splitlines()]
