"""Find the image files below a folder: each real file once, nothing hidden, regular files only."""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path

from fastprompt.data.formats import is_image_name, why_not_opened

SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "network trash folder", "temporary items"),  # macOS
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),  # Windows
        *("@eadir", "#recycle", "#snapshot", "@__thumb", "@recycle", "@recently-snapshot", "@tmp"),  # Synology, QNAP
        *("lost+found", "__pycache__"),
    )
)
"""Folders that operating systems, NAS boxes and tools create, in lower case; hidden ones (.git) are separate."""
SYSTEM_FILES = frozenset(
    ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "pspbrwse.jbf")
)
"""Files that file managers and photo programs create, in lower case; hidden ones (.DS_Store) are separate."""

SYSTEM_FOLDER = "hidden or system folder(s)"
SYSTEM_FILE = "hidden or system file(s)"
HIDDEN_IMAGE = "hidden file(s) with the name of an image"
NO_IMAGE = "file(s) without an image extension"
SPECIAL = "special file(s), such as pipes and sockets"
LOOP = "link(s) to a folder above"
AGAIN = "further name(s) of a file or folder that is already included"
LOOSE = "image(s) beside the class folders"
BESIDE = "image(s) in folders beside the splits"
EMPTY = "folder(s) without images beside the splits"
EXAMPLES = 3

Identity = tuple[int, int] | str
"""Identifies a file or folder under all its names: device and inode, or the path behind all links."""


class LeftOut:
    """The files and folders that a search for images left out, and why."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}  # by reason

    def add(self, reason: str, path: str | os.PathLike[str]) -> None:
        """Record `path`; recording it again has no effect."""
        self._paths.setdefault(reason, {})[os.fspath(path)] = None

    def counts(self) -> dict[str, int]:
        """Return the number of files and folders left out, by reason."""
        return {reason: len(paths) for reason, paths in sorted(self._paths.items())}

    def message(self, root: str | os.PathLike[str]) -> str | None:
        """Describe in one line with examples what was left out of `root`; None if there is nothing to report.

        Files that systems leave everywhere (.DS_Store, Thumbs.db) are counted but not reported.
        """
        told = {reason: list(paths) for reason, paths in self._paths.items() if reason != SYSTEM_FILE}
        if not told:
            return None
        parts = [
            f"{len(paths)} {reason} ({_by_extension(paths, root) if reason == NO_IMAGE else _examples(paths, root)})"
            for reason, paths in told.items()
        ]
        return f"{os.fspath(root)}: left out {'; '.join(parts)}"


def _examples(paths: list[str], root: str | os.PathLike[str]) -> str:
    return ", ".join(_below(path, root) for path in paths[:EXAMPLES]) + (", ..." if len(paths) > EXAMPLES else "")


def _by_extension(paths: list[str], root: str | os.PathLike[str]) -> str:
    examples: dict[str, str] = {}
    for path in paths:
        examples.setdefault(extension(path), path)
    counted = Counter(extension(path) for path in paths).most_common(10)
    return "; ".join(
        f"{count} {suffix or 'without extension'}"
        + (f", {reason}" if (reason := why_not_opened(suffix)) else "")
        + f", e.g. {_below(examples[suffix], root)}"
        for suffix, count in counted
    ) + ("; ..." if len(examples) > len(counted) else "")


def _below(path: str, root: str | os.PathLike[str]) -> str:
    return os.path.relpath(path, root) if path.startswith(os.path.join(root, "")) else path


def extension(path: str) -> str:
    """Return the extension of a file's name in lower case, with the dot; empty if it has none."""
    return os.path.splitext(path)[1].lower()


def is_system_folder(name: str) -> bool:
    """Whether a folder of that name is hidden or a system folder."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name. Raises ValueError if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"cannot read the folder {os.fspath(folder)}: {error.strerror}") from error


def subfolders(folder: str | os.PathLike[str], left_out: LeftOut) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden and system folders and links upwards."""
    names = []
    for entry in entries(folder):
        if not _is_dir(entry):
            continue
        if is_system_folder(entry.name):
            left_out.add(SYSTEM_FOLDER, entry.path)
        elif _leads_up(entry):
            left_out.add(LOOP, entry.path)
        else:
            names.append(entry.name)
    return names


def loose_images(folder: str | os.PathLike[str]) -> list[str]:
    """Return the paths of the files in `folder` itself that have an image extension."""
    return [entry.path for entry in entries(folder) if _why_no_image(entry.name) is None and not _is_dir(entry)]


def images_below(folder: str | os.PathLike[str], left_out: LeftOut) -> dict[str, Identity | None]:
    """Return the image files in `folder` and below with the identity of each, in torchvision ImageFolder's order.

    Links are followed. A file or folder with several names is returned once, preferably under a name that is not a
    link. A broken link with an image extension is included with None, because an image is missing.

    Raises:
        ValueError: a folder cannot be listed.
    """
    search = _Search(left_out)
    search.visit(os.fspath(folder))
    while search.links:
        search.follow(search.links.pop(0))
    return {path: search.found[path] for path in sorted(search.found, key=os.path.split)}


class _Search:
    """The state of `images_below`; links are followed after everything else was visited."""

    def __init__(self, left_out: LeftOut) -> None:
        self.left_out = left_out
        self.found: dict[str, Identity | None] = {}
        self.links: list[os.DirEntry[str]] = []
        self._files: set[Identity] = set()
        self._folders: set[Identity] = set()

    def visit(self, start: str) -> None:
        """Collect what is in a folder and below it; queue links for later."""
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            inside = entries(folder)
            this = _identity(folder, os.stat(folder))
            if this in self._folders:
                self.left_out.add(AGAIN, folder)
                continue
            self._folders.add(this)
            for entry in inside:
                if _is_link(entry):
                    self.links.append(entry)
                elif not _is_dir(entry):
                    self._take(entry)
                elif is_system_folder(entry.name):
                    self.left_out.add(SYSTEM_FOLDER, entry.path)
                else:
                    waiting.append(entry.path)

    def follow(self, link: os.DirEntry[str]) -> None:
        """Collect what a link points to, unless that is a folder above it."""
        if not _is_dir(link):
            self._take(link)
        elif is_system_folder(link.name):
            self.left_out.add(SYSTEM_FOLDER, link.path)
        elif _leads_up(link):
            self.left_out.add(LOOP, link.path)
        else:
            self.visit(link.path)

    def _take(self, entry: os.DirEntry[str]) -> None:
        reason = _why_no_image(entry.name)
        if reason is not None:
            self.left_out.add(reason, entry.path)
            return
        try:
            info = os.stat(entry.path)
        except OSError:
            self.found[entry.path] = None
            return
        this = _identity(entry.path, info)
        if not stat.S_ISREG(info.st_mode):
            self.left_out.add(SPECIAL, entry.path)
        elif this in self._files:
            self.left_out.add(AGAIN, entry.path)
        else:
            self._files.add(this)
            self.found[entry.path] = this


def _why_no_image(name: str) -> str | None:
    """Return why a file is left out because of its name, or None."""
    if name.startswith(".") and not name.startswith("._") and is_image_name(name):
        return HIDDEN_IMAGE
    if name.startswith(".") or name.lower() in SYSTEM_FILES:
        return SYSTEM_FILE
    return None if is_image_name(name) else NO_IMAGE


def _identity(path: str, info: os.stat_result) -> Identity:
    return (info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or getattr(entry, "is_junction", bool)()


def _leads_up(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is a link to one of its parents."""
    if not _is_link(entry):
        return False
    target, holder = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
    return Path(holder).is_relative_to(target)
