"""``secateur/promise.json``: what the weights of a directory are held to.

    {"linears": {WEIGHT NAME: {"pattern": {"kind": ...}, "transposed": bool}, ...},     transposed: stored (in, out)
     "tied": [[NAME, NAME, ...], ...],                                                   names that share one tensor
     "low_rank": {LINEAR NAME: RANK, ...},                                               where there are branches
     "changed": [NAME, ...],                                       tensors that the run changed on purpose, where it did
     "zeros": NUMBER}                                              in all linears, where that was what was asked for

A promised matrix that is no tensor of its own, one expert's in a stack of all, names the tensor and its place there:
``"part": {"of": TENSOR NAME, "at": [EXPERT, FIRST ROW, END]}``, or ``[FIRST ROW, END]`` inside a larger matrix. It has
a row of its own like any other.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.core.pattern import Pattern, pattern_from_dict, pattern_to_dict
from secateur.errors import ArtefactError
from secateur.models.container import is_count

PROMISE = Path("secateur") / "promise.json"


@dataclass(frozen=True)
class Promise:
    """One planned weight: its pattern, whether it is stored transposed (Conv1D), and where it lies."""

    name: str
    pattern: Pattern
    transposed: bool
    tensor: str
    """The stored tensor that holds it."""
    at: tuple[int, ...]
    """Empty where that is all of the tensor; else (expert, first row, end), or (first row, end)."""

    def fits(self, tensor: Tensor) -> bool:
        """Whether the tensor has such a part at all."""
        if not self.at:
            return tensor.ndim == 2
        *stack, _, stop = self.at
        return tensor.ndim == 2 + len(stack) and stop <= tensor.shape[-2] and all(e < len(tensor) for e in stack)

    def cut(self, tensor: Tensor) -> Tensor:
        """This weight out of its tensor, without a copy."""
        if not self.at:
            return tensor
        *stack, start, stop = self.at
        return tensor[(*stack, slice(start, stop))]

    def to_dict(self) -> dict[str, Any]:
        """Its entry in ``promise.json``, under its name."""
        entry = {"pattern": pattern_to_dict(self.pattern), "transposed": self.transposed}
        return {**entry, "part": {"of": self.tensor, "at": self.at}} if self.at else entry


@dataclass(frozen=True)
class Promises:
    """What the prune run wrote into ``promise.json``."""

    linears: list[Promise]
    tied: list[list[str]]
    low_rank: dict[str, int]
    """Rank of the branch beside a linear, by the linear's name."""
    zeros: int = 0
    """In all linears together; 0 where nothing is said of them together."""
    changed: tuple[str, ...] = ()
    """Stored tensors that the run changed on purpose, planned or not."""


@dataclass(frozen=True)
class Inherited:
    """What a directory promises of matrices that a run leaves as they are: the result promises it again."""

    promises: tuple[Promise, ...] = ()
    zeros: int = 0
    """In all of these matrices together."""


def read_promises(directory: Path) -> Promises | None:
    """What a directory's weights are held to; None where nothing is."""
    path = directory / PROMISE
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        linears = [_promise(name, entry) for name, entry in data["linears"].items()]
        tied, changed = data["tied"], data.get("changed", [])
        ranks, zeros = data.get("low_rank", {}), data.get("zeros", 0)
        if not isinstance(tied, list) or not all(map(_are_names, [*tied, changed])):
            raise ValueError("tied or changed are no lists of names")
        if not all(map(is_count, [*ranks.values(), zeros])):
            raise ValueError("low_rank or zeros are no numbers from 0 on")
        return Promises(linears, tied, ranks, zeros, tuple(changed))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtefactError(f"{path}: not a promise file ({type(error).__name__}: {error}); prune again") from error


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _promise(name: str, entry: dict[str, Any]) -> Promise:
    part = entry.get("part") or {"of": name, "at": ()}
    of, at = part["of"], tuple(part["at"])
    rows = at[-2:] or (0, 1)
    if not isinstance(of, str) or len(at) not in (0, 2, 3) or not all(map(is_count, at)) or rows[0] >= rows[1]:
        raise ValueError(f"{name} is a part at {list(at)} of {of!r}")
    return Promise(name, pattern_from_dict(entry["pattern"]), entry["transposed"], of, at)


def by_tensor(promises: Iterable[Promise]) -> dict[str, list[Promise]]:
    """By the names of the stored tensors."""
    held: dict[str, list[Promise]] = defaultdict(list)
    for promise in promises:
        held[promise.tensor].append(promise)
    return held


def read_json(path: Path) -> dict[str, Any]:
    """An object; ArtefactError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: not readable JSON ({error}); save or copy it again") from error
    if not isinstance(data, dict):
        raise ArtefactError(f"{path}: holds a {type(data).__name__}, an object was wanted; save or copy it again")
    return data
