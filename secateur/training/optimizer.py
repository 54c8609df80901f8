"""``SparseAdamW``: a torch optimizer that trains chosen matrices sparse, in anyone's loop, with any model.

    optimizer = SparseAdamW(
        [{"params": linears, "pattern": NM(2, 4)}, {"params": others}], lr=2e-4, schedule=Schedule(steps=1000)
    )
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.project()                       # the pattern holds exactly; save the model

Nothing in the model is replaced. The dense float32 master weights, the moments and the mask of a matrix are optimizer
state; its parameter holds mask * master from the constructor on and after every step, so the model can be saved and
used at any time, and its gradient is the straight-through one. Masks change between steps only, never inside one, so
gradient accumulation and activation checkpointing see one mask. (CAST computes with the dense weights until the mask
is frozen.)

Memory for a parameter in 16 bit: 2 bytes of it, 2 of its gradient, 12 of master and moments, 1 of mask.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.pattern import (
    NM,
    Block,
    Pattern,
    Unstructured,
    check_mask,
    keep_mask,
    pattern_from_dict,
    pattern_to_dict,
    ramped,
)
from secateur.core.sparse_adamw import (
    METRICS,
    UPDATES,
    Decay,
    Relative,
    Schedule,
    Step,
    Update,
    Weights,
    adamw_,
    flipped,
    masked,
)

Method = Literal["ast", "ast_g", "srste", "cast", "fixed", "none"]
DENSE_UNTIL_FROZEN = ("cast",)
"""Methods whose model computes with all weights while the mask still moves."""
DEFAULT_DECAY = Relative()


class SparseAdamW(Optimizer):
    """AdamW whose parameter groups may carry a ``pattern``: those are trained sparse by ``method``.

    A group takes ``params`` and, as it likes, ``pattern`` (``NM``, ``Unstructured``, ``Block``), ``transposed`` (True
    for matrices stored as (in, out), as Conv1D does) and its own ``lr``, ``betas``, ``eps``, ``weight_decay``.
    Parameters of a group with a pattern are matrices (R, C), or stacks of them, where each has the pattern for itself.
    Raises ValueError for an unknown method or metric and for shapes that cannot carry the pattern.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        schedule: Schedule,
        method: Method = "ast",
        decay: Decay = DEFAULT_DECAY,
        metric: Literal["magnitude", "fisher"] = "magnitude",
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, table in (("method", method, UPDATES), ("metric", metric, METRICS)):
            if value not in table:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(table)}")
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"wanted lr >= 0, betas in [0, 1), eps > 0, weight_decay >= 0; got {lr}, {betas}, {eps}, {weight_decay}"
            )
        self.schedule, self.method, self.decay, self.metric = schedule, method, decay, metric
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters of a group with a pattern become sparse at once."""
        pattern = param_group.get("pattern")
        plain = pattern_to_dict(pattern) if isinstance(pattern, NM | Unstructured | Block) else pattern
        super().add_param_group({"transposed": False, **param_group, "pattern": plain, "step": 0})
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self._begin(parameter, group)

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        sparse = group["pattern"] is not None
        if sparse and parameter.ndim < 2:
            raise ValueError(f"a pattern is for matrices, got a parameter of shape {tuple(parameter.shape)}")
        state = self.state[parameter]
        state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        if sparse or parameter.dtype != torch.float32:
            state["master"] = parameter.detach().float().clone()
        if sparse and self.method != "none":
            state["mask"] = self._chosen(self._held(parameter), group, self._step_of(group))
            state["decay"] = torch.zeros(())
            state["flips"] = torch.zeros(())
            self._write(parameter, group)

    # ------------------------------------------------------------------------------------------------------- one step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient; refresh masks when the schedule says so."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] += 1
            step = self._step_of(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, step)
        return loss

    def _step_of(self, group: dict[str, Any]) -> Step:
        beta1, beta2 = group["betas"]
        return Step(
            number=group["step"],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            progress=self.schedule.progress(group["step"]),
        )

    def _move(self, parameter: Tensor, group: dict[str, Any], step: Step) -> None:
        held, state = self._held(parameter), self.state[parameter]
        assert parameter.grad is not None
        if "mask" in state:
            update: Update = UPDATES[self.method]
            decay = float(state["decay"]) * self.schedule.annealed(step.number)
            update(held, parameter.grad.float(), Step(**{**vars(step), "decay": decay}))
            if self.schedule.refreshes(step.number):
                self._refresh(parameter, group, step)
        else:
            adamw_(held, parameter.grad.float(), step)
        self._write(parameter, group)

    def _held(self, parameter: Tensor) -> Weights:
        state = self.state[parameter]
        master = state.get("master", parameter.detach())
        return Weights(master, state["exp_avg"], state["exp_avg_sq"], state.get("mask"))

    def _refresh(self, parameter: Tensor, group: dict[str, Any], step: Step) -> None:
        held, state = self._held(parameter), self.state[parameter]
        state["decay"] = torch.tensor(self.decay.of(held))
        if self.method != "fixed":
            state["mask"] = self._chosen(held, group, step)
            state["flips"] = torch.tensor(flipped(held.keep, state["mask"]))  # pyright: ignore[reportArgumentType]

    def _chosen(self, held: Weights, group: dict[str, Any], step: Step) -> Tensor:
        """The mask that weights and moments ask for now, at the sparsity that the schedule has come to."""
        scores = METRICS[self.metric](held, step) if step.number else held.W.abs()  # no moments yet
        scores = scores.mT if group["transposed"] else scores
        pattern = ramped(self._pattern(group), self.schedule.sparsity_reached(step.number))
        matrices = scores.reshape(-1, *scores.shape[-2:])
        mask = torch.stack([keep_mask(matrix, pattern) for matrix in matrices]).view(scores.shape)
        return mask.mT.contiguous() if group["transposed"] else mask

    def _pattern(self, group: dict[str, Any]) -> Pattern:
        return pattern_from_dict(group["pattern"])

    @torch.no_grad()
    def write(self) -> None:
        """Make every parameter what its state says, after the state was put back from somewhere."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._write(parameter, group)

    def _write(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The parameter becomes what the model is to compute with."""
        held = self._held(parameter)
        dense = self.method in DENSE_UNTIL_FROZEN and not self.schedule.frozen(group["step"] + 1)
        if held.keep is not None and not dense:
            parameter.copy_(masked(held))
        elif held.W.data_ptr() != parameter.data_ptr():
            parameter.copy_(held.W)

    # --------------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def project(self) -> None:
        """Set every pruned weight to zero, in the master too, and hold the model to its patterns.

        Raises RuntimeError where a mask breaks its pattern: the sparsity had not risen to its end, for one.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if "mask" not in self.state[parameter]:
                    continue
                held = self._held(parameter)
                held.W.copy_(masked(held))
                parameter.copy_(held.W)
                self._check(parameter, group)

    def _check(self, parameter: Tensor, group: dict[str, Any]) -> None:
        kept = parameter != 0
        kept = kept.mT if group["transposed"] else kept
        for number, matrix in enumerate(kept.reshape(-1, *kept.shape[-2:])):
            if broken := check_mask(matrix, self._pattern(group)):
                raise RuntimeError(f"matrix {number} of a parameter of shape {tuple(parameter.shape)}: {broken}")

    def flip_rate(self) -> float:
        """Share of all masks that the last refresh changed: near 0 they have settled."""
        states = [state for state in self.state.values() if "mask" in state]
        total = sum(state["mask"].numel() for state in states)
        return sum(float(state["flips"]) * state["mask"].numel() for state in states) / total if total else 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own types: torch would round masters and masks to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value.to(parameter.device if value.ndim else "cpu", copy=True)


@torch.no_grad()
def left_over(optimizer: SparseAdamW) -> float:
    """Mean distance from zero of the pruned masters."""
    total, count = 0.0, 0
    for state in optimizer.state.values():
        if "mask" in state:
            pruned = state["master"][~state["mask"]]
            total, count = total + float(pruned.abs().sum(dtype=torch.float64)), count + pruned.numel()
    return total / max(count, 1)
