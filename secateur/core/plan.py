"""A plan says, linear by linear, what is to be pruned how. It is data: it prints, saves, and is checked before any
work.

Linears absent from the plan are not touched. Names are those of the modules in the model
("model.layers.0.self_attn.q_proj").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from secateur.core.pattern import Pattern, bits_per_weight, check_shape, zeros_in


@dataclass(frozen=True)
class Target:
    """What one linear is to become."""

    shape: tuple[int, int]
    """(out_features, in_features)."""
    pattern: Pattern

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Plan(Mapping[str, Target]):
    """Ordered mapping from a linear's full name to its target. ValueError where a shape cannot carry its pattern."""

    targets: dict[str, Target]

    def __post_init__(self) -> None:
        for name, target in self.targets.items():
            try:
                check_shape(target.shape, target.pattern)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def __getitem__(self, name: str) -> Target:
        return self.targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def size(self) -> int:
        """Weights in all planned linears."""
        return sum(target.size for target in self.values())

    @property
    def inputs(self) -> set[int]:
        """How many the planned linears have."""
        return {target.shape[1] for target in self.values()}

    @property
    def zeros(self) -> int:
        """Zeros in all planned linears, once carried out."""
        return sum(zeros_in(target.shape, target.pattern) for target in self.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros over all planned linears, once carried out."""
        return sum(target.size * target.pattern.sparsity for target in self.values()) / max(self.size, 1)

    @property
    def bits_per_weight(self) -> float:
        """Of 16-bit values and where they are, over all planned linears."""
        return sum(target.size * bits_per_weight(target.pattern) for target in self.values()) / max(self.size, 1)
