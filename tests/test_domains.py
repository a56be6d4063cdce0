from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastprompt.domains import Domains

UNION = Domains(("a", "b"), ((0, 1, 2), (2, 3)))
HEADS = Domains(("a", "b"), ((0, 2, 4), (1, 3)), "per-domain")


def test_a_head_for_each_domain_compares_its_own_classes() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    loss = HEADS.cross_entropy(logits, labels, label_smoothing=0.1)
    own = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        classes = next(list(each) for each in HEADS.classes if label in each)
        own.append(F.cross_entropy(row[classes], torch.tensor(classes.index(label)), label_smoothing=0.1))
    torch.testing.assert_close(loss, torch.stack(own).mean())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == logits.grad[0, 3] == 0, "other domains' classes get no gradient"


def test_a_union_is_one_softmax() -> None:
    logits, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(UNION.cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    assert UNION.of_its_domain(logits, labels) is logits


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
