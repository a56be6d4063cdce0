"""A stand-in for the Hugging Face Hub: the part of its HTTP API that fetching and uploading small files uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from file_server import send


class Hub(ThreadingHTTPServer):
    """Repositories in memory, one commit each.

    Attributes:
        repositories: "owner/name", "datasets/owner/name" of a data set → file name → content.
        refused: repositories that answer 403. gated: those that answer that access must be asked for.
        damaged: "owner/name" → how many of the next downloads of its weights have a wrong byte.
        requests: (method, path) of every request.
        tokens: the authorization of every upload.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: set[str] = set()
        self.gated: set[str] = set()
        self.damaged: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str) -> str:
        """The id of a repository's commit: a digest of its files."""
        digest = hashlib.sha1(repository.encode())
        for name, content in sorted(self.repositories[repository].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refusal(self, repository: str) -> bool:
        """Answer for a repository that cannot be read; whether there was such an answer."""
        if repository in self.server.gated:
            self.answer(403, {"error": "ask"}, X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        elif repository in self.server.refused:
            self.answer(403, {"error": "no"}, X_Error_Message="no")
        elif repository not in self.server.repositories:
            self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        else:
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        words = path.strip("/").split("/")
        if words[:2] in (["api", "models"], ["api", "datasets"]):
            kind = "datasets/" if words[1] == "datasets" else ""
            repository, rest = kind + "/".join(words[2:4]), words[4:]
            if self.refusal(repository):
                return
            files, commit = self.server.repositories[repository], self.server.commit(repository)
            if rest[:1] == ["revision"] and rest[1] not in ("main", commit):
                self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            elif rest[:1] == ["tree"]:
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self.answer(200, listed)
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
            return
        first = 3 if words[0] == "datasets" else 2
        repository, name = "/".join(words[:first]), "/".join(words[first + 2 :])
        if self.refusal(repository):
            return
        content, commit = self.server.repositories[repository].get(name), self.server.commit(repository)
        if content is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        if self.command == "GET" and name.endswith(".safetensors") and self.server.damaged.get(repository, 0) > 0:
            self.server.damaged[repository] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        send(self, content, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.tokens.append(self.headers.get("Authorization"))
            if repository in self.server.refused:
                self.answer(403, {"error": "no"}, X_Error_Message="no")
                return
            self.server.repositories.setdefault(repository, {})
            self.answer(200, {"url": f"{self.server.address}/{repository}"})
            return
        words = path.strip("/").split("/")
        repository = "/".join(words[2:4])
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif words[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[repository][entry["value"]["path"]] = content
            commit = self.server.commit(repository)
            address = f"{self.server.address}/{repository}/commit/{commit}"
            self.answer(200, {"success": True, "commitOid": commit, "commitUrl": address})


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=lambda: hub.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def in_its_place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """The hub of this process until the end of the block, with an empty cache in `folder` and nobody logged in."""
    constants = huggingface_hub.constants
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
