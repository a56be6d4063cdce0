from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
import pytest

from fastprompt import fetch
from fastprompt.fetch import FetchError, Wheel, cache_dir, fetch_deb, locked, read_wheel_member, write_cached

CONTENT = b"the pinned content"


def make_wheel(folder: Path, content: bytes = CONTENT) -> Wheel:
    wheel = Wheel("no-such-package-of-ours", "9.9", "", "no_such_package_of_ours/file.bin", "", 0.1, "licence: none")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
        archive.writestr(zipfile.ZipInfo(wheel.member), content)
    sha256 = hashlib.sha256((folder / wheel.filename).read_bytes()).hexdigest()
    return Wheel(wheel.package, wheel.version, sha256, wheel.member, hashlib.sha256(content).hexdigest(), 0.1, "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTPROMPT_WHEELS", raising=False)
    return tmp_path / "cache"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FASTPROMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastprompt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fastprompt"


def test_the_cache_of_earlier_versions_is_still_found(monkeypatch, tmp_path):
    """On macOS and Windows the platform's folder is another than ~/.cache/fastprompt."""
    monkeypatch.delenv("FASTPROMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "before"))
    own = tmp_path / "Library" / "Caches" / "fastprompt"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: own)
    assert cache_dir() == own
    (tmp_path / "before" / "fastprompt").mkdir(parents=True)
    assert cache_dir() == tmp_path / "before" / "fastprompt"
    own.mkdir(parents=True)
    assert cache_dir() == own


def test_wheel_is_read_from_a_named_folder_or_the_cache(tmp_path, monkeypatch, own_cache):
    wheel = make_wheel(own_cache / "wheels")
    assert read_wheel_member(wheel) == CONTENT
    (own_cache / "wheels" / wheel.filename).rename(tmp_path / wheel.filename)
    monkeypatch.setenv("FASTPROMPT_WHEELS", f"/nowhere:{tmp_path}")
    assert read_wheel_member(wheel) == CONTENT


def test_wheel_with_another_hash_is_refused(own_cache):
    wheel = make_wheel(own_cache / "wheels")
    make_wheel(own_cache / "wheels", b"something else")
    with pytest.raises(FetchError, match=f"{wheel.filename} has sha256 .* not the pinned {wheel.sha256}"):
        read_wheel_member(wheel)


def test_installed_package_serves_only_the_pinned_file(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "elsewhere")
    package = tmp_path / "site" / "no_such_package_of_ours"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    (package / "file.bin").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert read_wheel_member(wheel) == CONTENT

    (package / "file.bin").write_bytes(b"another version")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="could not download"):
        read_wheel_member(wheel)


def test_failed_download_says_what_to_do(tmp_path, monkeypatch, own_cache):
    wheel = make_wheel(tmp_path / "elsewhere")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError) as caught:
        read_wheel_member(wheel)
    for part in (
        "no-such-package-of-ours==9.9",
        wheel.filename,
        str(own_cache / "wheels"),
        "FASTPROMPT_WHEELS",
    ):
        assert part in str(caught.value)


def test_pip_downloads_from_an_index_and_checks_the_hash(tmp_path, monkeypatch, capsys):
    index = tmp_path / "index"
    wheel = make_wheel(index)
    with zipfile.ZipFile(index / wheel.filename, "a") as archive:  # pip wants metadata
        info = "no_such_package_of_ours-9.9.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: no-such-package-of-ours\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256((index / wheel.filename).read_bytes()).hexdigest()
    right = Wheel(wheel.package, wheel.version, sha256, wheel.member, wheel.member_sha256, 0.1, "licence: of this test")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert read_wheel_member(right) == CONTENT
    assert "licence: of this test" in capsys.readouterr().err
    with pytest.raises(FetchError, match="could not download"):
        read_wheel_member(wheel)  # its pinned hash is not that of the file on the index


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "entry"
    path.write_bytes(b"old")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ha")
        raise failure

    with pytest.raises(FetchError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_cached(path, half)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["entry"]


def test_cache_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "cache").write_text("")
    with (
        pytest.raises(FetchError, match="set FASTPROMPT_CACHE to another folder"),
        locked(cache_dir() / "x" / "y"),
    ):
        pass


def test_deb_without_apt(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="apt-get is not on this machine"):
        fetch_deb("dataset-fashion-mnist", [], tmp_path)


def test_deb_updates_lists_of_its_own_when_the_machine_has_none(monkeypatch, tmp_path):
    commands = []

    def apt(command, folder):
        commands.append(command)
        own_lists = any(option.startswith("Dir::State::lists=") for option in command)
        if command[0] == "apt-get" and "download" in command and own_lists:
            (folder / "package.deb").write_bytes(b"")
        if command[0] == "dpkg-deb":
            (folder / "root" / "usr").mkdir(parents=True)
            (folder / "root" / "usr" / "file").write_bytes(CONTENT)
        return subprocess.CompletedProcess(command, 0 if own_lists or command[0] == "dpkg-deb" else 100, "", "E: no")

    monkeypatch.setattr(fetch, "_run", apt)
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    fetch_deb("some-package", ["/usr/file"], tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [command[-1] for command in commands[:3]] == ["some-package", "update", "some-package"]
    with pytest.raises(FetchError, match="does not hold /usr/other"):
        fetch_deb("some-package", ["/usr/other"], tmp_path)


def test_importing_fetch_loads_no_torch():
    code = "import sys, fastprompt.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
