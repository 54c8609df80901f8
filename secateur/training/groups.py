"""Which parameters of a model are trained sparse, as a plan of its linears asks: the groups for ``SparseAdamW``."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.core.pattern import Pattern, by_rows, keep_mask
from secateur.core.plan import Plan
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter, Linear
from secateur.models.experts import ExpertLinear
from secateur.models.linears import stored_transposed


def parameter_groups(adapter: DecoderAdapter, plan: Plan) -> list[dict[str, Any]]:
    """One group for every pattern and layout of planned matrices, and one without a pattern for everything else.

    Fused experts are one parameter: each of its matrices must be planned alike, by rows where several share one.
    UsageError otherwise.
    """
    names = {parameter: name for name, parameter in adapter.model.named_parameters()}
    asked: dict[nn.Parameter, set[tuple[Pattern | None, bool]]] = defaultdict(set)
    for name, linear in _linears(adapter):
        pattern = plan[name].pattern if name in plan else None
        pattern = _whole(name, pattern) if _shares_rows(linear) else pattern
        asked[_holder(linear)].add((pattern, stored_transposed(linear)))
    groups: dict[tuple[Pattern | None, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter, name in names.items():
        wanted = asked.get(parameter, {(None, False)})
        if len(wanted) > 1:
            raise UsageError(
                f"{name} holds the experts of a block in one tensor, and only some of them are to be sparse; "
                "include or ignore all of them"
            )
        pattern, transposed = wanted.pop()
        groups[pattern, transposed and pattern is not None].append(parameter)
    return [
        {"params": params, "pattern": pattern, "transposed": transposed}
        for (pattern, transposed), params in groups.items()
    ]


@torch.no_grad()
def first_masks(adapter: DecoderAdapter, plan: Plan) -> dict[str, Tensor]:
    """The masks that ``SparseAdamW`` begins with, (out, in), by the linear's full name: the largest weights."""
    return {
        name: keep_mask(adapter.read(linear).float().abs(), plan[name].pattern)
        for name, linear in _linears(adapter)
        if name in plan
    }


def kept_plan(adapter: DecoderAdapter, plan: Plan, promised: Mapping[Tensor, Pattern]) -> Plan:
    """The plan with the patterns that ``SparseAdamW.promised`` has come to; as it was for matrices in larger ones."""
    linears = dict(_linears(adapter))
    return Plan(
        {
            name: target if _shares_rows(linears[name]) else replace(target, pattern=promised[_holder(linears[name])])
            for name, target in plan.items()
        }
    )


def sparse_linears(adapter: DecoderAdapter, plan: Plan) -> dict[Tensor, nn.Module]:
    """The planned linears by the parameter that holds the matrix; not for fused experts, which share one."""
    return {_holder(linear): linear for name, linear in _linears(adapter) if name in plan}


def _linears(adapter: DecoderAdapter) -> Iterator[tuple[str, Linear]]:
    for block_name, block in zip(adapter.block_names, adapter.blocks, strict=True):
        for name, linear in adapter.linears(block).items():
            yield f"{block_name}.{name}", linear


def _holder(linear: Linear) -> nn.Parameter:
    return linear.holder if isinstance(linear, ExpertLinear) else cast(nn.Parameter, linear.weight)


def _shares_rows(linear: Linear) -> bool:
    """Whether it is some rows of a larger matrix."""
    return isinstance(linear, ExpertLinear) and linear.stop - linear.start < linear.holder.shape[-2]


def _whole(name: str, pattern: Pattern | None) -> Pattern | None:
    """The pattern of the larger matrix: the same, where it counts in single rows."""
    if pattern is None or by_rows(pattern):
        return pattern
    raise UsageError(f"{name} shares a matrix with another linear, so {pattern} of each cannot be kept; use N:M or row")
