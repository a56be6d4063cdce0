"""Several data sets under one head: whose classes are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.arguments import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("union", "per-domain")


@dataclass(frozen=True)
class Domains:
    """The domains that a model was trained on, and the classes of each.

    Attributes:
        names: of the domains.
        classes: of each domain, the indices of its classes among the model's.
        labels: "union": one softmax over all classes, and domains may share classes of one name. "per-domain": a head
            for each domain, over its own classes; no two domains share one.
    """

    names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    labels: str = "union"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "classes", tuple(tuple(of_domain) for of_domain in self.classes))
        if self.labels not in LABELS:
            raise ArgumentError("labels", f"must be one of {', '.join(map(repr, LABELS))}, got {self.labels!r}")
        if not all(isinstance(name, str) for name in self.names) or len({*self.names}) < len(self.names):
            raise ArgumentError("names", f"must be different texts, got {self.names!r}")
        if len(self.classes) != len(self.names) or not all(self.classes):
            raise ArgumentError("classes", f"must be the classes of {len(self.names)} domains, got {self.classes!r}")
        every = [label for of_domain in self.classes for label in of_domain]
        if any(isinstance(label, bool) or not isinstance(label, int) or label < 0 for label in every):
            raise ArgumentTypeError("classes", "must be indices of classes")
        if self.labels == "per-domain" and len({*every}) < len(every):
            raise ArgumentError("classes", "must belong to one domain each with labels='per-domain'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Domains:
        """Invert `dataclasses.asdict`; raise ValueError for anything else."""
        if not isinstance(values, Mapping) or set(values) != {"names", "classes", "labels"}:
            raise ArgumentError("domains", f"must have names, classes and labels, got {str(values)[:100]}")
        return cls(tuple(values["names"]), tuple(tuple(each) for each in values["classes"]), values["labels"])

    def check_fits(self, num_classes: int) -> None:
        """Raise ValueError unless every class belongs to a domain and there are no others."""
        if {label for of_domain in self.classes for label in of_domain} != set(range(num_classes)):
            raise ArgumentError("domains", f"must cover the classes 0 to {num_classes - 1} and no others")

    def index(self, name: str) -> int:
        """Return the number of a domain; raise ValueError if there is none of that name."""
        if name not in self.names:
            raise ArgumentError("domain", f"must be one of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)

    def only(self, logits: Tensor, name: str) -> Tensor:
        """Return logits (..., C) with those of other domains' classes at −∞."""
        mine = list(self.classes[self.index(name)])
        masked = logits.new_full(logits.shape, float("-inf"))
        masked[..., mine] = logits[..., mine]
        return masked

    def likeliest(self, probabilities: Sequence[float]) -> str:
        """Return the domain whose classes have the largest total probability, of one image's probabilities (C,).

        Raises:
            ValueError: heads per domain, whose probabilities are not comparable.
        """
        if self.labels == "per-domain":
            raise ArgumentError("domain", f"must be one of {', '.join(self.names)}: each domain has its own head")
        return max(self.names, key=lambda name: sum(probabilities[label] for label in self.classes[self.index(name)]))

    def of_labels(self, labels: Sequence[int]) -> list[int]:
        """Return the domain of each label, with heads per domain."""
        place = {label: number for number, of_domain in enumerate(self.classes) for label in of_domain}
        return [place[int(label)] for label in labels]

    def of_its_domain(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return logits (B, C) with those of other domains than the label's at −∞; unchanged for a union."""
        if self.labels == "union":
            return logits
        return logits.masked_fill(~self.compared().to(logits.device)[labels], float("-inf"))

    def compared(self) -> Tensor:
        """Return (C, C), True where class j is in a domain with class i: the classes that label i is compared with."""
        import torch

        num_classes = 1 + max(label for of_domain in self.classes for label in of_domain)
        together = torch.zeros(num_classes, num_classes, dtype=torch.bool)
        for of_domain in self.classes:
            mine = torch.tensor(of_domain)
            together[mine[:, None], mine] = True
        return together
