"""The table of timm's names: complete, read to the share that the page says, and refused for the reasons it gives."""

from __future__ import annotations

import re
from pathlib import Path

import backbones
import pytest
import timm

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "results" / "backbones.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w.]+)` \| (\w+) \| (\d+) \| (?:yes|no: (.+)) \|$", re.MULTILINE)
ROWS = {name: (kind, int(names), refused) for name, kind, names, refused in ROW.findall(TABLE)}
READ = {kind: name for name, (kind, _, refused) in sorted(ROWS.items(), reverse=True) if not refused}
OTHER_KINDS = [
    "eva02_tiny_patch14_224",
    "vit_base_mci_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch16_dinov3",
    "vit_so150m_patch16_reg4_map_256",
    "vit_tiny_r_s16_p8_224",
]
"""Further configurations of a class."""


def test_the_page_says_what_the_table_holds() -> None:
    read, total = sum(n for _, n, refused in ROWS.values() if not refused), sum(n for _, n, _ in ROWS.values())
    assert read >= 0.95 * total
    assert f"**{read} of {total} names are read, {read / total:.1%}**" in TABLE
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert f"{read} of {total} names" in page


def test_the_table_is_complete() -> None:
    if f"timm {timm.__version__}:" not in TABLE:
        pytest.skip("the table is of another version of timm")
    assert {name: n for name, (_, n, _) in ROWS.items()} == dict(backbones.architectures())


@pytest.mark.parametrize("arch", [name for name, (_, _, refused) in ROWS.items() if refused])
def test_what_is_refused_is_refused_by_name(arch: str) -> None:
    kind, _, refused = ROWS[arch]
    assert backbones.attempt(arch) == (kind, refused, None)


@pytest.mark.parametrize("arch", sorted({*READ.values(), *OTHER_KINDS} & ROWS.keys()))
def test_what_is_read_equals_timm(arch: str) -> None:
    outcome = backbones.attempt(arch)
    assert (outcome.kind, outcome.refused) == (ROWS[arch][0], "")
    assert outcome.error is not None
    assert outcome.error <= backbones.TOLERANCE
