"""What makes a recording unusable."""

CAUSES = {
    "missing": "the file does not exist",
    "unreadable": "the file cannot be decoded",
    "empty": "there are no samples",
    "not_finite": "a sample is NaN, infinite or absurdly large",
    "truncated": "the file ends before its declared duration",
    "longer_than_declared": "the file is longer than its declared duration",
    "no_such_channel": "the file has no such channel",
    "timed_out": "the storage does not deliver it in time",
    "unreachable": "the storage fails, or cannot be reached",
    "incomplete": "the storage delivers less than it announces",
    "forbidden": "the storage refuses to give it",
    "not_allowed": "settings do not allow its address (`allowed_roots`, `allowed_schemes`)",
    "changed": "its row of the manifest, or its tar, is not what it was when it was read first",
    "no_row": "no row of the manifest describes it (a member of a stream's tar)",
    "bad_row": "its row of the manifest cannot be read (of a stream)",
    "longer_than_buckets": "it is longer than all shapes, which were planned by a sample",
    "longer_than_model": "it lasts more frames than the model has positions",
}


class AudioError(ValueError):
    """A recording that cannot be used; `cause` is a key of CAUSES, for counting.

    `path` is its file, empty where that is not known.
    """

    def __init__(self, message: str, *, cause: str, path: str = "") -> None:
        super().__init__(message)
        self.cause, self.path = cause, path
