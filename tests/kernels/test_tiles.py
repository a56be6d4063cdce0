from __future__ import annotations

import pytest
import torch

from fastprompt.kernels.tiles import Tiles, as_family, family, pick

CPU = torch.device("cpu")
TABLE = (
    Tiles({"BLOCK": 16}, families=("gfx",)),
    Tiles({"BLOCK": 32}, limits={"K": 16, "M": 256}),
    Tiles({"BLOCK": 64}, num_warps=8),
)


def test_the_first_row_that_fits_is_taken() -> None:
    assert pick(TABLE, CPU, K=16, M=256).sizes["BLOCK"] == 32
    assert pick(TABLE, CPU, K=17, M=256).sizes["BLOCK"] == 64
    assert pick(TABLE, CPU, K=16, M=257).sizes["BLOCK"] == 64
    with as_family("gfx942"):
        assert pick(TABLE, CPU, K=17, M=256).sizes["BLOCK"] == 16
    assert pick(TABLE, CPU, K=17, M=0).options == {"BLOCK": 64, "num_warps": 8, "num_stages": 2}


def test_family_is_that_of_the_context() -> None:
    with as_family("sm_90"):
        with as_family("gfx942"):
            assert family(CPU) == "gfx942"
        assert family(CPU) == "sm_90"


def test_a_table_without_a_fitting_row_is_an_error_naming_the_part() -> None:
    with as_family("sm_90"), pytest.raises(LookupError, match=r"no row of the table is for sm_90 and \{'K': 3\}"):
        pick(TABLE[:1], CPU, K=3)
