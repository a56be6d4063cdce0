from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprompt.domains import Domains

UNION = Domains(("a", "b"), ((0, 1, 2), (2, 3)))
HEADS = Domains(("a", "b"), ((0, 2, 4), (1, 3)), "per-domain")


def test_a_union_is_one_softmax() -> None:
    logits, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    assert UNION.of_its_domain(logits, labels) is logits


def test_which_classes_are_compared() -> None:
    expected = [
        [place in of_domain for place in range(5)]
        for label in range(5)
        for of_domain in HEADS.classes
        if label in of_domain
    ]
    assert HEADS.compared().tolist() == expected


def test_logits_of_one_domain() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert UNION.only(logits, "a").tolist() == [[1, 2, 3, float("-inf")]]
    assert UNION.only(logits, "b").argmax() == 3
    masked = HEADS.of_its_domain(torch.arange(10.0).view(2, 5), torch.tensor([3, 4]))
    assert masked.argmax(-1).tolist() == [3, 4]
    assert masked[0, 4] == float("-inf")


def test_the_likeliest_domain_has_the_largest_sum() -> None:
    assert UNION.likeliest([0.3, 0.3, 0.0, 0.4]) == "a"
    assert UNION.likeliest([0.1, 0.1, 0.3, 0.5]) == "b"
    with pytest.raises(ValueError, match="domain must be one of a, b: each domain has its own head"):
        HEADS.likeliest([0.2] * 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a", "a"), ((0,), (1,))), "names must be different texts"),
        ((("a",), ((0,), (1,))), "classes must be the classes of 1 domains"),
        ((("a", "b"), ((0,), ())), "classes must be the classes of 2"),
        ((("a", "b"), ((0,), (-1,))), "classes must be indices"),
        ((("a", "b"), ((0,), (0,)), "per-domain"), "classes must belong to one domain each"),
        ((("a", "b"), ((0,), (1,)), "both"), "labels must be one of"),
    ],
)
def test_wrong_domains(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Domains(*arguments)
    with pytest.raises(ValueError, match="domains must have names, classes and labels"):
        Domains.from_dict({"names": ["a"]})
    with pytest.raises(ValueError, match="must cover the classes 0 to 4"):
        UNION.check_fits(5)
    with pytest.raises(ValueError, match="domain must be one of a, b, got 'c'"):
        UNION.index("c")
