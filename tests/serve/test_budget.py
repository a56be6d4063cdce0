"""The memory that requests share: who gets how much of it, and that all of it comes back."""

from __future__ import annotations

import pytest

from fastprompt.serve.budget import Budget, Share
from fastprompt.serve.protocol import Refused


def test_a_request_holds_no_more_than_what_is_then_free() -> None:
    budget = Budget(1000)
    with Share(budget) as one, Share(budget) as two:
        one.resize(500)
        two.check(250)
        two.resize(250)
        one.resize(100)  # less is always taken
        two.resize(450)
        assert budget.used == 550
        with pytest.raises(Refused) as caught:
            two.resize(451)
        assert (caught.value.status, caught.value.code) == (503, "busy")
        assert (two.held, budget.used) == (0, 100), "what is refused makes room at once"
        two.check(450)
        with pytest.raises(Refused):
            two.check(451)
    assert budget.used == 0


def test_no_number_of_large_requests_shuts_small_ones_out() -> None:
    budget, held = Budget(1 << 20), []
    for _ in range(100):
        share = Share(budget)
        share.resize((budget.size - budget.used) // 2)
        held.append(share)
    assert budget.used < budget.size
    growing = Share(budget)
    with pytest.raises(Refused):
        growing.resize(budget.size // 2)
    held[0].resize(0)
    growing.resize(budget.size // 4)


def test_a_share_comes_back_whatever_ends_the_request() -> None:
    budget = Budget(100)

    def failing() -> None:
        with Share(budget) as share:
            share.resize(40)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert budget.used == 0
