"""Downloads from a local server that drops connections, ignores ranges and lies."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data import books
from tvq.data import download
from tvq.programs import prepare

CONTENT = bytes(range(256)) * 40


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; drops the connection of each path after the bytes in `tears`, one per request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tears: dict[str, list[int]] = {}
        self.knows_ranges = True
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        wanted = self.headers["Range"]
        self.server.asked.append((address.path, wanted))
        if address.path == f"/storage/v1/b/{download.PG19_BUCKET}/o":
            self.send(self.listing(urllib.parse.parse_qs(address.query)))
        elif address.path not in self.server.files:
            self.send_error(404)
        else:
            content = self.server.files[address.path]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if wanted and self.server.knows_ranges and start >= len(content):
                self.send_error(416)
            elif wanted and self.server.knows_ranges:
                self.send(content[start:], 206)
            else:
                self.send(content)

    def send(self, content: bytes, status: int = 200) -> None:
        tears = self.server.tears.get(self.path, [])
        end = tears.pop(0) if tears else len(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:end])

    def listing(self, query: dict[str, list[str]]) -> bytes:
        """Two objects a page."""
        names = [name.removeprefix(f"/{download.PG19_BUCKET}/") for name in sorted(self.server.files)]
        names = [name for name in names if name.startswith(query["prefix"][0])]
        start = int(query.get("pageToken", ["0"])[0])
        items = []
        for name in names[start : start + 2]:
            content = self.server.files[f"/{download.PG19_BUCKET}/{name}"]
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            items.append({"name": name, "size": str(len(content)), "md5Hash": md5})
        more = {"nextPageToken": str(start + 2)} if start + 2 < len(names) else {}
        return json.dumps({"items": items} | more).encode()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with Server() as server:
        server.files["/file"] = CONTENT
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_torn_and_resumed(server, tmp_path):
    server.tears["/file"] = [1000, 0, 0, 0, 3000]
    seen: list[tuple[int, int]] = []
    download.fetch(f"{server.url}/file", tmp_path / "got", progress=lambda *found: seen.append(found))
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, *["bytes=1000-"] * 4, "bytes=4000-"]
    assert {total for _, total in seen} == {len(CONTENT)}
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_given_up_and_gone_on_with(server, tmp_path):
    server.tears["/file"] = [500, 0, 0, 0, 0]
    with pytest.raises(
        ValueError, match=r"cannot fetch http.*/file \(.*; what has arrived is kept, the same"
    ):
        download.fetch(f"{server.url}/file", tmp_path / "got", progress=lambda *_: None)
    assert not (tmp_path / "got").exists()
    download.fetch(f"{server.url}/file", tmp_path / "got", progress=lambda *_: None)
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert server.asked[-1] == ("/file", "bytes=500-")


def test_a_server_without_ranges(server, tmp_path):
    server.tears["/file"], server.knows_ranges = [700], False
    download.fetch(f"{server.url}/file", tmp_path / "got", progress=lambda *_: None)
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_all_had_come_before_the_kill(server, tmp_path):
    (tmp_path / "got.part").write_bytes(CONTENT)
    download.fetch(f"{server.url}/file", tmp_path / "got", progress=lambda *_: None)
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_wrong_checksum(server, tmp_path):
    (tmp_path / "got.part").write_bytes(b"of another file")
    right = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    fetch = lambda: download.fetch(
        f"{server.url}/file", tmp_path / "got", progress=lambda *_: None, md5=right
    )
    with pytest.raises(ValueError, match=f"/file arrived as {len(CONTENT)} bytes of MD5 .*; it is removed"):
        fetch()
    assert list(tmp_path.iterdir()) == []
    fetch()
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_no_such_address(server, tmp_path):
    with pytest.raises(ValueError, match=r"/gone \(HTTP Error 404.*; give the right --url, or --input"):
        download.fetch(f"{server.url}/gone", tmp_path / "got", progress=lambda *_: None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"cannot list http.*Connection refused.*; give the right --url"):
        download.pg19("http://127.0.0.1:9", tmp_path, lambda *_: None)


def put_library(server: Server) -> None:
    root = f"/{download.PG19_BUCKET}"
    for split, n in (("train", 5), ("validation", 1), ("test", 1)):
        for i in range(n):
            server.files[f"{root}/{split}/{i}.txt"] = books.book(100 * n + i).encode()
    server.files[f"{root}/metadata.csv"] = b"0,a,1,b\n"


@pytest.mark.parametrize("kind", download.FETCH)
def test_what_is_no_address(tmp_path, kind):
    with pytest.raises(ValueError, match=r"cannot (fetch|list) nowhere.*unknown url type.*right --url"):
        download.FETCH[kind]("nowhere", tmp_path / "raw", lambda *_: None)


def test_a_list_that_is_none(server, monkeypatch):
    monkeypatch.setattr(Handler, "listing", lambda *_: b'{"kind": "storage#objects"}')
    with pytest.raises(ValueError, match=r"cannot list .*KeyError\('items'\)"):
        list(download.listed(server.url, download.PG19_BUCKET, "train/"))


def test_pg19(server, tmp_path):
    put_library(server)
    raw = tmp_path / "raw"
    (raw / "train").mkdir(parents=True)
    (raw / "train" / "0.txt").write_bytes(server.files[f"/{download.PG19_BUCKET}/train/0.txt"])
    command = {"kind": "pg19", "download": True, "url": server.url, "input": str(raw), "pieces": 120}
    prepare.prepare(prepare.Options(**command, output=str(tmp_path / "out")))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [split["n_document"] for split in manifest["splits"].values()] == [5, 1, 1]
    assert (raw / "metadata.csv").exists()
    fetched = [path for path, _ in server.asked if not path.startswith("/storage")]
    assert len(fetched) == 7
    server.asked.clear()
    prepare.prepare(prepare.Options(**command, output=str(tmp_path / "again")))
    assert all(path.startswith("/storage") for path, _ in server.asked), "nothing is fetched twice"


def test_enwik8_that_is_another_file(server, tmp_path):
    server.files["/enwik8.zip"] = CONTENT
    raw, out = tmp_path / "enwik8.zip", tmp_path / "out"
    options = prepare.Options(
        kind="enwik8", download=True, url=f"{server.url}/enwik8.zip", input=str(raw), output=str(out)
    )
    with pytest.raises(ValueError, match=r"enwik8\.zip is damaged or incomplete"):
        prepare.prepare(options)
    assert [path.name for path in tmp_path.iterdir()] == ["enwik8.zip"]
    assert Path(raw).read_bytes() == CONTENT
