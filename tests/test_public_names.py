"""The package's public names: found at run time, seen by type checkers, the same in both."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastprompt as fp


def names_seen_by_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(fp.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_what_run_time_finds() -> None:
    assert names_seen_by_type_checkers() == fp._PUBLIC


@pytest.mark.parametrize("name", fp.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(fp, name) is not None
    assert name in dir(fp)


def test_an_unknown_name_is_an_attribute_error_naming_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pgn_config'"):
        _ = fp.pgn_config
