"""Downloads that can be resumed and are never believed: what arrives counts only once it has been checked."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from certbench.contract import Reporter
from certbench.data.places import Damaged

_TIMEOUT = 30.0
_CHUNK = 1 << 16


class DownloadError(Exception):
    """Why no address, or the one tried, gave what was wanted."""


def partial_path(target: Path) -> Path:
    """Where the beginning of a download waits for its rest; its ending still says how the content is packed."""
    return target.with_name(f"partial.{target.name}")


def download(
    urls: list[str], target: Path, limit: int, check: Callable[[Path], object], reporter: Reporter
) -> Path:
    """A file with what the first address serves that passes ``check`` and has at most ``limit`` bytes.

    It is :func:`partial_path` of ``target``, where the next call also goes on after an interruption. What fails the
    check is removed.

    Raises:
        DownloadError: no address served it.
    """
    partial = partial_path(target)
    failures = []
    for url in urls:
        try:
            resumed = _download_one(url, partial, limit, reporter)
            if resumed and not _passes(check, partial):  # the beginning may be another file's
                partial.unlink()
                _download_one(url, partial, limit, reporter)
            check(partial)
            return partial
        except Damaged as damage:
            partial.unlink()
            failures.append(f"{url}: serves something else, {damage}")
        except DownloadError as error:
            failures.append(f"{url}: {error}")
    raise DownloadError("; ".join(failures))


def _passes(check: Callable[[Path], object], path: Path) -> bool:
    try:
        check(path)
    except Damaged:
        return False
    return True


def _download_one(url: str, target: Path, limit: int, reporter: Reporter) -> bool:
    """Append to ``target`` what is missing, or write it anew; whether the former."""
    have = target.stat().st_size if target.exists() else 0
    with _open(url, have) as response:
        resumed = have > 0 and _continues(response, have)
        start = have if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else 0
        if total > limit:
            raise DownloadError(f"{total:,} bytes offered, more than the {limit:,} it may have")
        reporter.stage(f"fetching {url.rsplit('/', 1)[-1]}", total, "byte")
        with target.open("ab" if resumed else "wb") as stream:
            done = start
            for chunk in _reading(response):
                done += len(chunk)
                if done > limit:
                    target.unlink()
                    raise DownloadError(f"sends more than the {limit:,} bytes it may have")
                stream.write(chunk)
                reporter.advance(done)
    if done != total > 0:
        raise DownloadError(
            f"broke off after {done:,} of {total:,} bytes; run this again to go on from there"
        )
    return resumed


def _open(url: str, have: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "certbench", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _open(url, 0)  # what is there is as long as the file, or longer, and not known to be good
        raise DownloadError(f"HTTP status {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(_reason(error)) from None
    return response


def _continues(response: http.client.HTTPResponse, have: int) -> bool:
    return response.status == http.HTTPStatus.PARTIAL_CONTENT and response.headers.get(
        "Content-Range", ""
    ).startswith(f"bytes {have}-")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _reading(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Chunks of a response, its failures kept apart from those of the disk they are written to."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(f"broke off: {_reason(error)}; run this again to go on from there") from None
        if not chunk:
            return
        yield chunk
