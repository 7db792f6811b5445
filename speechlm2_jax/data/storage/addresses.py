"""Addresses of storage: `s3://bucket/a.wav`, `https://host/a.wav`. All else is a path."""

import posixpath
import re
from urllib.parse import unquote, urlsplit, urlunsplit

from speechlm2_jax.settings import SettingsError

FILE = "file"
"""The scheme of paths of this machine."""
HTTP = ("http", "https")
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
}
"""Schemes that fsspec reads -> the package that each needs."""
SCHEMES = (FILE, *HTTP, *PACKAGES)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_CONTROL = re.compile(r"[\x00-\x20\x7f\\]")


def scheme_of(path: str) -> str:
    """The scheme of an address in small letters; `file` of a path."""
    match = _ADDRESS.match(path)
    return match[1].lower() if match else FILE


def is_remote(path: str) -> bool:
    """Whether this is an address of storage that is reached through a library."""
    return scheme_of(path) != FILE


def normalised(address: str) -> str:
    """One spelling of an address: no port that goes without saying, no `.` and `..`.

    Raises SettingsError for one of an unknown scheme, and for spellings that programs read
    differently: of several addresses in one, with a user's name, with a backslash.
    """
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        raise SettingsError(
            f"{address}: {scheme}:// is not supported; expected a path or one of "
            f"{', '.join(f'{name}://' for name in SCHEMES)}"
        )
    if "::" in address or _CONTROL.search(address):
        raise SettingsError(f"{address!r}: not one plain address")
    if scheme not in HTTP:
        return f"{scheme}://{_path(address, address.partition('://')[2])}"
    parts = urlsplit(address)
    if "@" in parts.netloc or not parts.netloc:
        raise SettingsError(f"{address!r}: expected {scheme}://HOST/PATH, without a user's name")
    host = parts.netloc.lower().removesuffix(_DEFAULT_PORTS[scheme])
    return urlunsplit((scheme, host, _path(address, parts.path), parts.query, ""))


def _path(address: str, path: str) -> str:
    """A path without `.` and `..`. Raises SettingsError where these are hidden by encoding."""
    decoded = path
    while (further := unquote(decoded)) != decoded:
        decoded = further
    plain, hidden = path.split("/"), decoded.replace("\\", "/").split("/")
    if hidden.count("..") + hidden.count(".") != plain.count("..") + plain.count("."):
        raise SettingsError(f"{address!r}: hides `..` by encoding")
    if "." not in plain and ".." not in plain:
        return path
    return posixpath.normpath("/" + path.lstrip("/"))[not path.startswith("/") :]


def is_below(address: str, root: str) -> bool:
    """Whether a normalised address is a normalised root, or something in it."""
    one, other = urlsplit(address), urlsplit(root)
    if (one.scheme, one.netloc) != (other.scheme, other.netloc):
        return False
    folder = other.path.rstrip("/")
    return one.path == folder or one.path.startswith(folder + "/")


def joined(folder: str, name: str) -> str:
    """The address of a file by its name relative to a folder."""
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def parent(address: str) -> str:
    """The folder of a file, with the query of its address."""
    base, mark, query = address.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def name_of(address: str) -> str:
    """The last part of an address."""
    return address.partition("?")[0].rstrip("/").rpartition("/")[2]
