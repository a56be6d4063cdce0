from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastprompt import fetch, package_index
from fastprompt.fetch import FetchError, Wheel, read_wheel_member
from fastprompt.package_index import PYPI, NotOnIndex, download, links, places

NAME, CONTENT = "no_such_package_of_ours-9.9-py3-none-any.whl", b"a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Index(ThreadingHTTPServer):
    """A package index on this machine: path -> (content type, content) or an address to redirect to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, tuple[str, bytes] | str] = {}
        self.login: str | None = None
        self.asked: list[tuple[str, str | None]] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization")
        self.server.asked.append((self.path, authorization))
        page = self.server.pages.get(self.path)
        if self.server.login is not None and authorization != self.server.login:
            self.send_error(401)
        elif page is None:
            self.send_error(404)
        elif isinstance(page, str):
            self.send_response(302)
            self.send_header("Location", page)
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Type", page[0])
            self.send_header("Content-Length", str(len(page[1])))
            self.end_headers()
            self.wfile.write(page[1])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def make_index() -> Iterator[Any]:
    servers: list[Index] = []

    def make() -> Index:
        server = Index()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of this machine, no proxy, no cache."""
    for name in list(package_index.os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", package_index.os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "xdg"))
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package_index.sys, "prefix", str(tmp_path / "prefix"))


def json_page(*files: tuple[str, str]) -> tuple[str, bytes]:
    body = {"meta": {"api-version": "1.0"}, "files": [{"filename": name, "url": url} for name, url in files]}
    return "application/vnd.pypi.simple.v1+json", json.dumps(body).encode()


def html_page(*hrefs: str) -> tuple[str, bytes]:
    return "text/html; charset=utf-8", "".join(f'<a href="{href}">a file</a>' for href in hrefs).encode()


def fetched(tmp_path: Path, sha256: str = SHA256) -> bytes:
    download("No_such.package-of-ours", NAME, sha256, tmp_path / NAME)
    return (tmp_path / NAME).read_bytes()


def test_json_index_of_pips_environment(make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = make_index()
    index.login = "Basic " + base64.b64encode(b"me@work:p:w").decode()
    index.pages = {
        "/simple/no-such-package-of-ours/": json_page(("other.whl", "x"), (NAME, f"../../files/{NAME}")),
        f"/files/{NAME}": ("application/octet-stream", CONTENT),
    }
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me%40work:p%3Aw@{index.host}/simple")
    assert fetched(tmp_path) == CONTENT
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{index.host}/simple")
    with pytest.raises(NotOnIndex, match="answered 401") as caught:
        fetched(tmp_path)
    assert "secret" not in str(caught.value)


def test_html_index_of_uvs_environment(make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = make_index()
    index.pages = {
        "/no-such-package-of-ours/": html_page(f"/f/{NAME}#sha256={SHA256}"),
        f"/f/{NAME}": ("x", CONTENT),
    }
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://{index.host}/gone/")
    monkeypatch.setenv("UV_INDEX", f"ours=http://{index.host}/")
    assert fetched(tmp_path) == CONTENT


def test_pips_configuration_files(make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = make_index()
    index.pages = {"/no-such-package-of-ours/": html_page(NAME), f"/no-such-package-of-ours/{NAME}": ("x", CONTENT)}
    monkeypatch.delenv("PIP_CONFIG_FILE")
    (tmp_path / "xdg" / "pip").mkdir(parents=True)
    (tmp_path / "xdg" / "pip" / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:9/\n")
    (tmp_path / "config" / "pip").mkdir(parents=True)
    user = tmp_path / "config" / "pip" / "pip.conf"
    user.write_text(
        f"[global]\nindex-url = http://127.0.0.1:9/%(x)s\n[download]\nextra_index_url =\n  http://{index.host}\n"
    )
    assert places().indexes == ["http://127.0.0.1:9/%(x)s", f"http://{index.host}"]
    assert fetched(tmp_path) == CONTENT
    monkeypatch.setenv("PIP_CONFIG_FILE", package_index.os.devnull)
    assert places().indexes == [PYPI]
    monkeypatch.delenv("PIP_CONFIG_FILE")
    user.write_text("index-url = nothing above it\n")
    with pytest.raises(NotOnIndex, match=r"(?s)pip's configuration cannot be read.*pip\.conf"):
        places()


def test_folders_and_indexes_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an index of the network: a folder of wheels, and an index in files."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotOnIndex, match="no index is configured"):
        fetched(tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'nowhere'} {tmp_path / 'wheels'}")
    assert fetched(tmp_path) == CONTENT
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    project = tmp_path / "simple" / "no-such-package-of-ours"
    project.mkdir(parents=True)
    (project / "index.html").write_bytes(html_page(f"../../wheels/{NAME}#sha256={SHA256}")[1])
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    (tmp_path / NAME).unlink()
    assert fetched(tmp_path) == CONTENT


def test_only_the_pinned_content_counts(make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An index with another file of that name is passed over for one that has the right one."""
    wrong, right = make_index(), make_index()
    for index, content in ((wrong, b"another"), (right, CONTENT)):
        index.pages = {"/no-such-package-of-ours/": html_page(NAME), f"/no-such-package-of-ours/{NAME}": ("x", content)}
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{wrong.host}")
    with pytest.raises(NotOnIndex, match="instead of the pinned one"):
        fetched(tmp_path)
    assert not (tmp_path / NAME).exists()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://{right.host}")
    assert fetched(tmp_path) == CONTENT


def test_passwords_stay_with_their_host(make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, foreign = make_index(), make_index()
    ours.pages = {
        "/no-such-package-of-ours/": json_page((NAME, f"http://{foreign.host}/{NAME}"), (NAME, "moved")),
        "/no-such-package-of-ours/moved": f"http://{foreign.host}/moved",
    }
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{ours.host}")
    with pytest.raises(NotOnIndex):
        fetched(tmp_path)
    foreign.pages = {f"/{NAME}": ("x", b"no"), "/moved": ("x", CONTENT)}
    assert fetched(tmp_path) == CONTENT
    assert all(login is not None for _, login in ours.asked)
    assert {path for path, _ in foreign.asked} == {f"/{NAME}", "/moved"}
    assert all(login is None for _, login in foreign.asked)


def test_other_kinds_of_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="address must be http, https or file"):
        list(links("ftp://127.0.0.1/simple/"))


def test_a_wheel_is_fetched_without_pip(
    make_index: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("no_such_package_of_ours/file.bin", b"pinned")
    content = (tmp_path / NAME).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    index = make_index()
    index.pages = {
        "/no-such-package-of-ours/": json_page((NAME, NAME)),
        f"/no-such-package-of-ours/{NAME}": ("x", content),
    }
    monkeypatch.setattr(fetch, "pip_is_installed", lambda: False)
    monkeypatch.setattr(fetch, "_run", lambda *_: pytest.fail("a program was started"))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.host}")
    member = hashlib.sha256(b"pinned").hexdigest()
    wheel = Wheel(
        "no-such-package-of-ours", "9.9", sha256, "no_such_package_of_ours/file.bin", member, 0.1, "licence: X"
    )
    assert read_wheel_member(wheel) == b"pinned"
    assert "licence: X" in capsys.readouterr().err
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.host}/elsewhere")
    with pytest.raises(FetchError, match=r"answered 404 .*FASTPROMPT_WHEELS"):
        read_wheel_member(wheel)
