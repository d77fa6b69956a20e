"""Public data fetched over HTTP: an interrupted transfer resumes where it was, and whole files are checked.

A file gets its name only once it is whole; until then it is `NAME.part`.
"""

import base64
import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tvq.errors import InputError

URLS = {"enwik8": "http://mattmahoney.net/dc/enwik8.zip", "pg19": "https://storage.googleapis.com"}
PG19_BUCKET = "deepmind-gutenberg"
ATTEMPTS = 5  # without progress
TIMEOUT, PAUSE = 60.0, 2.0  # seconds
CHUNK = 1 << 18
N_CONNECTION = 16
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
Progress = Callable[[int, int], Any]  # bytes so far, bytes in all


class Item(NamedTuple):
    """A file of a listing: its name below the folder, bytes, MD5 in base64."""

    name: str
    size: int
    md5: str


def fetch(url: str, path: Path, *, progress: Callable[[int, int], Any], md5: str = "") -> None:
    """Downloads `url` to `path`. `progress` is called with the bytes so far and in total.

    InputError: it cannot be fetched, or has another MD5 (base64); there is then no file of that name.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, reason = 0, ""
    while failures < ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        try:
            total = _transfer(url, part, before, progress)
        except BROKEN as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise InputError(f"cannot fetch {url} ({error}); give the right --url, or --input") from error
            now = part.stat().st_size if part.exists() else 0
            failures, reason = (failures + 1 if now == before else 1), str(error)
            time.sleep(PAUSE * failures)
            continue
        except ValueError as error:  # no URL at all
            raise InputError(f"cannot fetch {url} ({error}); give the right --url, or --input") from error
        _check(url, part, total, md5)
        part.replace(path)
        return
    raise InputError(f"cannot fetch {url} ({reason}); what has arrived is kept, the same command resumes")


def _transfer(url: str, part: Path, start: int, progress: Progress) -> int:
    """Appends what is missing; returns the total bytes that the server states, 0 if it states none."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return start  # all of it is there
    with response:
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if not goes_on:
            start = 0
        total = start + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                start += len(chunk)
                progress(start, total)
    if start < total:
        raise ConnectionError(f"{start} of {total} bytes came")
    return total


def _check(url: str, part: Path, total: int, md5: str) -> None:
    size = part.stat().st_size
    with part.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
    if (total and size != total) or (md5 and digest != md5):
        part.unlink()
        raise InputError(
            f"{url} arrived as {size} bytes of MD5 {digest}, not {total or size} of {md5 or 'any'};"
            " it is removed, the same command fetches it again"
        )


def listed(url: str, bucket: str, prefix: str) -> Iterator[Item]:
    """The objects of a public bucket with this prefix, by the JSON interface of Google Cloud Storage.

    InputError: it cannot be listed.
    """
    page = ""
    while True:
        query = urllib.parse.urlencode({"prefix": prefix, "pageToken": page})
        address = f"{url}/storage/v1/b/{bucket}/o?{query}"
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
                listing = json.load(response)
            items = [Item(o["name"], int(o["size"]), o["md5Hash"]) for o in listing["items"]]
        except (*BROKEN, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"cannot list {address} ({error!r}); give the right --url, or --input"
            ) from error
        yield from items
        if "nextPageToken" not in listing:
            return
        page = listing["nextPageToken"]


def pg19(url: str, folder: Path, progress: Progress) -> None:
    """Downloads all books of PG-19 and their metadata to `folder`; those that are there already stay.

    InputError: one cannot be fetched; the others are kept.
    """
    names = ("train/", "validation/", "test/", "metadata.csv")
    items = [item for name in names for item in listed(url, PG19_BUCKET, name) if not item.name.endswith("/")]
    missing = [item for item in items if not (folder / item.name).exists()]
    total = sum(item.size for item in items)
    done = total - sum(item.size for item in missing)
    with ThreadPoolExecutor(N_CONNECTION) as pool:
        get = lambda item: fetch(
            f"{url}/{PG19_BUCKET}/{urllib.parse.quote(item.name)}",
            folder / item.name,
            progress=lambda *_: None,
            md5=item.md5,
        )
        try:
            for item, _ in zip(missing, pool.map(get, missing), strict=True):
                done += item.size
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def enwik8(url: str, path: Path, progress: Progress) -> None:
    """Downloads enwik8.zip to `path`, if it is not there. InputError: it cannot be fetched."""
    if not path.exists():
        fetch(url, path, progress=progress)


FETCH = {"enwik8": enwik8, "pg19": pg19}
