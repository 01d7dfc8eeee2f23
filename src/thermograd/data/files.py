"""Finding, checking and (only when asked) downloading the files of a data set."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import DataError
from ..progress import bar

__all__ = ["data_folder", "digest", "download", "find", "read_bytes"]

_VARIABLE = "THERMOGRAD_DATA"
_BLOCK = 1 << 20


def data_folder(folder: str | os.PathLike[str] | None) -> Path:
    """``folder``, or the environment variable ``THERMOGRAD_DATA``, or ``data`` in the current folder."""
    return Path(folder or os.environ.get(_VARIABLE) or "data").expanduser()


def candidates(folder: Path, places: Sequence[str], names: Iterable[str]) -> list[Path]:
    """Every path where one of ``names`` may lie: ``folder`` itself, then each of ``places`` below it."""
    return [folder / place / name for place in ("", *places) for name in names]


def find(folder: Path, places: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first file that exists among the candidates."""
    return next((path for path in candidates(folder, places, names) if path.is_file()), None)


def absent(
    title: str, folder: Path, places: Sequence[str], names: Sequence[str], *, chosen: bool, url: str | None
) -> DataError:
    """The error that says which files of a data set were looked for, where, and what to do."""
    where = ", ".join(str(folder / place) if place else str(folder) for place in ("", *places))
    why = "" if folder.is_dir() else f" (there is no folder {folder.absolute()})"
    hint = "the folder passed" if chosen else f"where {_VARIABLE} points, or data/ in the current folder without it"
    fetch = f"; or pass download=True to fetch it from {url}" if url else ""
    way = f"give another folder, or none and set {_VARIABLE}," if chosen else f"pass folder=..., or set {_VARIABLE},"
    return DataError(
        f"{title} is not there{why}; looked for {' or '.join(names)} in {where}",
        expected=f"the files of {title} in or below {folder.absolute()}, which is {hint}",
        remedy=f"{way} to the folder that holds the files{fetch}",
    )


def digest(content: bytes | memoryview, kind: str = "sha256") -> str:
    """Hexadecimal checksum of ``content``."""
    return hashlib.new(kind, content, usedforsecurity=False).hexdigest()


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked when it is gzipped (by its first bytes, not its name).

    Raises:
        DataError: the gzip stream is damaged, or the file cannot be read.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}", expected="a whole file", remedy="delete it and fetch it again"
        ) from error


def download(url: str, target: Path, md5: str) -> Path:
    """Fetch ``url`` into ``target``: into a temporary file, checked, then renamed, so no half file is left.

    Raises:
        DataError: the address cannot be reached, or what came is not the published file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "thermograd"})
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            checksum = _copy(request, out, f"Downloading {target.name}")
        if checksum != md5:
            raise DataError(
                f"what {url} sent has MD5 {checksum}",
                expected=f"MD5 {md5}, the published file",
                remedy="try again later, or fetch the file by hand",
            )
        shutil.move(name, target)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{url} cannot be fetched: {error}",
            expected="a reachable address",
            remedy=f"check the network, or fetch the file by hand and put it into {target.parent}",
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _copy(request: urllib.request.Request, out: object, description: str) -> str:
    checksum = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(request, timeout=60) as response:
        size = response.headers.get("Content-Length")
        with bar(description, int(size) if size else None) as progress:
            while block := response.read(_BLOCK):
                out.write(block)  # type: ignore[attr-defined]
                checksum.update(block)
                progress.advance(len(block))
    return checksum.hexdigest()
