"""Download one pinned file from a package index in environments without pip (those of uv, for example).

The index is the one that pip or uv would use: it is taken from their environment variables, then from pip's
configuration files. Its pages are read through the simple API (PEP 503 and 691). A file is accepted only if it has the
pinned sha256, so it does not matter which index or mirror serves it.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import netrc
import os
import re
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, Request, build_opener, url2pathname

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


class NotOnIndex(RuntimeError):
    """No index has the file with the pinned sha256; the message says what each of them answered."""


@dataclass
class Places:
    """Where to look: first `links` (folders or pages of links), then `indexes`, in order."""

    indexes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def places() -> Places:
    """Return the places named by the environment and pip's configuration files; PyPI if they name no index."""
    config = pip_configuration()

    def words(key: str, *variables: str) -> list[str]:
        for variable in (f"PIP_{key.upper().replace('-', '_')}", *variables):
            if os.environ.get(variable):
                return [re.sub(r"^[\w.-]+=", "", word) for word in _words(variable)]  # uv's name=url
        return config.get(key, "").split()

    links = words("find-links", "UV_FIND_LINKS")
    if [word.lower() for word in words("no-index", "UV_NO_INDEX")] in (["1"], ["true"], ["yes"], ["on"]):
        return Places([], links)
    first = words("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL") or [PYPI]
    return Places([*first, *words("extra-index-url", "UV_INDEX", "UV_EXTRA_INDEX_URL")], links)


def _words(variable: str) -> list[str]:
    return re.split(r"[\s,]+" if variable == "UV_FIND_LINKS" else r"\s+", os.environ[variable].strip())


def pip_configuration() -> dict[str, str]:
    """Return the options of pip's configuration files for `pip download`; later files override earlier ones."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return {}
    import platformdirs

    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    folders = [Path(folder) for folder in platformdirs.site_config_dir("pip", False, multipath=True).split(os.pathsep)]
    folders += [Path("/etc"), Path.home() / ("pip" if sys.platform == "win32" else ".pip"), Path.home() / ".config/pip"]
    folders += [Path(platformdirs.user_config_dir("pip", False, roaming=True)), Path(sys.prefix)]
    files = [*(folder / name for folder in folders), *([Path(named)] if named else [])]
    parser = configparser.RawConfigParser()
    try:
        parser.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise NotOnIndex(f"pip's configuration cannot be read: {error}") from error
    sections = [dict(parser[section]) for section in ("global", "download") if parser.has_section(section)]
    return {key.replace("_", "-"): value for section in sections for key, value in section.items()}


def download(package: str, filename: str, sha256: str, target: Path) -> None:
    """Download the file to `target` and verify it.

    Raises:
        NotOnIndex: no place has the file.
        OSError: `target` could not be written.
    """
    where, reasons = places(), []
    pages = [*where.links, *(f"{index.rstrip('/')}/{_normalised(package)}/" for index in where.indexes)]
    for page in pages:
        try:
            urls = [url for name, url in links(page) if name == filename]
            if not urls:
                reasons.append(f"{_shown(page)} does not list it")
            for url in urls:
                content = _get(url, credentials_of=page)[0]
                found = hashlib.sha256(content).hexdigest()
                if found == sha256:
                    target.write_bytes(content)
                    return
                reasons.append(f"{_shown(url)} has sha256 {found} instead of the pinned one")
        except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
            reasons.append(f"{_shown(page)}: {error}")
    raise NotOnIndex("; ".join(reasons) or "no index is configured")


def links(page: str) -> Iterator[tuple[str, str]]:
    """Yield (file name, address) of the files listed by a folder or an index page."""
    if "://" not in page:
        page = Path(page).expanduser().resolve().as_uri()
    if urlsplit(page).scheme == "file":
        folder = Path(url2pathname(urlsplit(page).path))
        if (folder / "index.html").is_file():
            page = (folder / "index.html").as_uri()
        elif folder.is_dir():
            yield from ((path.name, path.as_uri()) for path in sorted(folder.iterdir()))
            return
    content, kind, address = _get(page, credentials_of=page)
    if "json" in kind:
        files = [(str(file["filename"]), str(file["url"])) for file in json.loads(content)["files"]]
    else:
        anchors = _Anchors()
        anchors.feed(content.decode("utf-8", "replace"))
        files = [(unquote(urlsplit(href).path.rpartition("/")[2]), href) for href in anchors.hrefs]
    yield from ((name, urljoin(address, url)) for name, url in files)


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]


def _get(url: str, credentials_of: str) -> tuple[bytes, str, str]:
    """Return content, content type and final address. User and password of the index `credentials_of` are used too."""
    parts, index = urlsplit(url), urlsplit(credentials_of)
    if parts.scheme not in ("https", "http", "file"):
        raise ValueError(f"address must be http, https or file, got {_shown(url)}")
    host = parts.netloc.rpartition("@")[2]
    request = Request(urlunsplit(parts._replace(netloc=host, fragment="")), headers={"Accept": ACCEPT})
    login = _netrc(parts.hostname)
    for user in (index, parts):
        if user.username is not None and user.netloc.rpartition("@")[2] == host:
            login = (unquote(user.username), unquote(user.password or ""))
    if login is not None:  # not sent to a host that this one redirects to
        pair = base64.b64encode(":".join(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {pair}")
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or pip_configuration().get("cert"))
    timeout = float(os.environ.get("PIP_DEFAULT_TIMEOUT") or 60)
    try:
        with build_opener(HTTPSHandler(context=context)).open(request, timeout=timeout) as answer:
            return answer.read(), answer.headers.get("Content-Type", ""), answer.url
    except HTTPError as error:
        error.close()
        raise OSError(f"answered {error.code} {error.reason}") from error


def _netrc(host: str | None) -> tuple[str, str] | None:
    try:
        found = netrc.netrc().authenticators(host) if host else None
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2] or "") if found else None


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _shown(url: str) -> str:
    """Return the address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
