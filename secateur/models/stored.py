"""Under which names, and in which parts, ``save_pretrained`` stores what a model holds.

transformers 5 merges tensors when it loads a checkpoint (all experts of a block into one parameter, gate over up) and
undoes that when it saves. Which rows of which parameter end up in which stored tensor is not ours to guess: markers,
tensors of one column that hold the number of their own row, are sent through the very conversion that saving applies,
and what they say when they come out is the answer. Costs a few bytes per row.

E = experts, R = rows of a matrix.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.errors import ModelError
from secateur.models.experts import ExpertLinear, find_experts


class Stored(NamedTuple):
    """Where one matrix lies in the files."""

    name: str
    part: tuple[int, ...] = ()
    """Empty for a tensor of its own; (start, stop) of the rows of a larger matrix; (expert, start, stop) of a stack."""


class Rows(NamedTuple):
    """Rows of a parameter, those of all experts and of all parameters before it counted through."""

    start: int
    stop: int


def stored(model: PreTrainedModel, linears: Iterable[str]) -> dict[str, Stored]:
    """Where the weight of each linear, experts' matrices among them, lies in a saved checkpoint."""
    views = _expert_views(model)
    if not views:
        return {name: Stored(f"{name}.weight") for name in linears}
    numbered, markers = _numbered(model, linears, views)
    places = dict(_places(revert_weight_conversion(model, markers)))
    return {name: _found(name, rows, places) for name, rows in numbered.items()}


def stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of a model under the names, and in the parts, in which they are stored."""
    return revert_weight_conversion(model, model.state_dict())


def _expert_views(model: nn.Module) -> dict[str, tuple[str, ExpertLinear]]:
    """Every fused expert's matrices by their full names, with the full name of the parameter they are a part of."""
    return {
        name: (f"{experts.name}.{linear.parameter}", linear)
        for experts in find_experts(model)
        for linears in experts.linears
        for name, linear in linears.items()
        if isinstance(linear, ExpertLinear)
    }


def _numbered(
    model: nn.Module, linears: Iterable[str], views: dict[str, tuple[str, ExpertLinear]]
) -> tuple[dict[str, Rows], dict[str, Tensor]]:
    """The rows of each linear, and the marker of each parameter."""
    numbered: dict[str, Rows] = {}
    markers: dict[str, Tensor] = {}
    count = 0
    for name in linears:
        parameter, view = views.get(name, (f"{name}.weight", None))
        shape = model.get_parameter(parameter).shape[:-1]
        if parameter not in markers:
            markers[parameter] = torch.arange(count, count + shape.numel()).view(*shape, 1)
            count += shape.numel()
        rows = markers[parameter] if view is None else markers[parameter][view.expert, view.start : view.stop]
        numbered[name] = Rows(int(rows[0]), int(rows[-1]) + 1)
    return numbered, markers


def _places(stored: dict[str, Tensor]) -> Iterator[tuple[Rows, Stored]]:
    """Which rows the stored tensors hold, or the matrices of a stored stack, where they follow one another."""
    for name, tensor in stored.items():
        stack = (
            [((), tensor)] if tensor.ndim == 2 else [((e, 0, len(matrix)), matrix) for e, matrix in enumerate(tensor)]
        )
        for part, matrix in stack:
            rows = matrix.flatten()
            if matrix.shape[-1] == 1 and bool((rows.diff() == 1).all()):
                yield Rows(int(rows[0]), int(rows[-1]) + 1), Stored(name, part)


def _found(name: str, wanted: Rows, places: dict[Rows, Stored]) -> Stored:
    """The stored matrix of exactly these rows, or the part of the one that holds them."""
    if wanted in places:
        return places[wanted]
    for rows, (tensor, part) in places.items():
        if rows.start <= wanted.start and wanted.stop <= rows.stop:
            return Stored(tensor, (*part[:-2], wanted.start - rows.start, wanted.stop - rows.start))
    raise ModelError(
        f"{name}: transformers stores this model in a form in which its rows are not found again, so what is saved "
        "cannot be checked; this architecture is not supported yet"
    )
