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

Several processes: DDP, and FSDP2, which may come between the constructor and ``begin`` and replace the parameters by
shards; state is sharded as its parameter is, and what must travel is in ``shards.py``. FSDP1 flattens parameters to
vectors, which carry no pattern.

Memory for a parameter in 16 bit: 2 bytes of it, 2 of its gradient, 12 of master and moments, 1 of mask.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.moments import ColumnNorms
from secateur.core.pattern import (
    NM,
    Block,
    Pattern,
    Unstructured,
    kept_count,
    pattern_from_dict,
    pattern_to_dict,
    ramped,
)
from secateur.core.sparse_adamw import (
    DENSE_UNTIL_FROZEN,
    INPUT_MEMORY,
    METRICS,
    NEED_INPUTS,
    ONCE_FROZEN,
    PULLED_ALIKE,
    UPDATES,
    V_SEES_MORE,
    Decay,
    MethodName,
    MetricName,
    Relative,
    Schedule,
    Step,
    Weights,
    adamw_,
    dense,
    flipped,
    masked,
)
from secateur.training import held, masks, shards
from secateur.training.shards import local

Scope = Literal["matrix", "global"]
DEFAULT_DECAY = Relative()


class SparseAdamW(Optimizer):
    """AdamW whose parameter groups may carry a ``pattern``: those are trained sparse by ``method``.

    A group takes ``params`` and, as it likes, ``pattern`` (``NM``, ``Unstructured``, ``Block``), ``transposed`` (True
    for matrices stored as (in, out), as Conv1D does) and its own ``lr``, ``betas``, ``eps``, ``weight_decay``.
    Parameters of a group with a pattern are matrices (R, C), or stacks of them, where each has the pattern for itself.
    With ``begin=False`` there is no state, and the model stays dense, until ``begin()``: for parameters that are yet to
    be sharded, moved or replaced. In the scope "global" the sparsity of an ``Unstructured`` pattern is that of all
    matrices together: one threshold decides (``core.allotment``). ``scales`` is how many learned scales every row
    of a sparse matrix has (``core.row_scales``), which ``project`` multiplies into the weights. Raises ValueError for
    an unknown method or metric and for shapes that cannot carry the pattern.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        schedule: Schedule,
        method: MethodName = "ast",
        decay: Decay = DEFAULT_DECAY,
        metric: MetricName = "magnitude",
        scope: Scope = "matrix",
        scales: int = 0,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        begin: bool = True,
    ) -> None:
        for name, value, table in (("method", method, UPDATES), ("metric", metric, METRICS)):
            if value not in table:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(table)}")
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"wanted lr >= 0, betas in [0, 1), eps > 0, weight_decay >= 0; got {lr}, {betas}, {eps}, {weight_decay}"
            )
        self.schedule, self.method, self.decay, self.metric, self.scope = schedule, method, decay, metric, scope
        self.scales = scales
        self.begun = False  # until all groups are there
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._check_scope()
        if begin:
            self.begin()

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters of a group with a pattern become sparse at once, if others are."""
        pattern = param_group.get("pattern")
        plain = pattern_to_dict(pattern) if isinstance(pattern, NM | Unstructured | Block) else pattern
        super().add_param_group({"transposed": False, **param_group, "pattern": plain, "step": 0})
        for parameter in self.param_groups[-1]["params"]:
            self._check_carries(parameter, self.param_groups[-1])
        if self.begun:
            self._check_scope()
            self.begin()

    def _check_scope(self) -> None:
        if self.scope == "global":
            sparse = [(p, self._pattern(group)) for p, group in self._all() if group["pattern"] is not None]
            masks.check_shares(sparse, begun=self.begun)

    def _check_carries(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if group["pattern"] is not None:
            masks.check_carries(parameter, self._pattern(group), transposed=group["transposed"])
            if self.metric in NEED_INPUTS:
                masks.check_inputs(parameter, transposed=group["transposed"])
            masks.check_scales(parameter, self.scales, transposed=group["transposed"])

    @torch.no_grad()
    def begin(self) -> None:
        """Make the state of every parameter that has none and write its sparse weights. All processes, together.

        Raises RuntimeError where parameters were replaced after they had begun, ValueError where the new ones cannot
        carry their pattern.
        """
        self.begun = True
        present = {parameter for parameter, _ in self._all()}
        if lost := sum(parameter not in present for parameter in self.state):
            raise RuntimeError(
                f"{lost} parameters were replaced after they had begun (accelerate's prepare does so with FSDP2); "
                "build SparseAdamW(..., begin=False), prepare, then call begin()"
            )
        new = [(parameter, group) for parameter, group in self._all() if parameter not in self.state]
        for parameter, group in new:
            self._check_carries(parameter, group)
            self.state[parameter] = held.begin(
                parameter,
                group,
                inputs=self.metric in NEED_INPUTS,
                scales=self.scales,
                split=self.method == "admm",
                fisher=self.metric == "fisher" and self.method in V_SEES_MORE,
            )
        sparse = [(p, group) for p, group in new if group["pattern"] is not None and self.method != "none"]
        patterns = self._wanted(sparse)
        for parameter, group in sparse:
            state = self.state[parameter]
            state["mask"] = shards.like(self._chosen(parameter, group, patterns[parameter]), parameter)
            held.measure(parameter, state, self.decay, self.method)
            state["flips"] = torch.zeros(())
            self._write(parameter, group)

    def _all(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(parameter, group) for group in self.param_groups for parameter in group["params"]]

    # ------------------------------------------------------------------------------------------------------- one step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient; refresh masks when the schedule says so, which goes on without."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        moved = [(parameter, group) for parameter, group in self._all() if parameter.grad is not None]
        if moved:
            self._check_seen()
        for group in self.param_groups:
            group["step"] += 1
        for parameter, group in moved:
            self._move(parameter, group, self._step_of(group))
        sparse = [(p, group) for p, group in self._all() if "mask" in self.state.get(p, ())]
        due = [(p, group) for p, group in sparse if self.schedule.refreshes(group["step"])]
        self._refresh(due)
        for parameter, group in dict([*moved, *due]).items():
            self._write(parameter, group)
        return loss

    def _check_seen(self) -> None:
        tokens = [state["tokens"] for state in self.state.values() if "tokens" in state]
        if tokens and not any(tokens):
            raise RuntimeError(f"metric {self.metric} has seen no inputs: call observe() before every step")

    @torch.no_grad()
    def observe(self, seen: Mapping[Tensor, ColumnNorms]) -> None:
        """Take in the squared inputs of one step (``training.inputs``), alike in all processes, before ``step``.

        Sums and tokens fade alike, so that their quotient is a mean over the last steps from the first one on. Raises
        ValueError where the metric has no use for them.
        """
        if self.metric not in NEED_INPUTS:
            raise ValueError(f"metric {self.metric} does not look at inputs; use {' or '.join(NEED_INPUTS)}")
        for parameter, norms in seen.items():
            state = self.state[parameter]
            state["inputs"].mul_(INPUT_MEMORY).add_(norms.sum.view_as(state["inputs"]))
            state["tokens"] = state["tokens"] * INPUT_MEMORY + norms.tokens

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
        assert parameter.grad is not None
        if parameter not in self.state:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} has no state: call begin() before the first step, and "
                "after anything that replaces parameters (prepare or fully_shard)"
            )
        own, state, grad = self._held(parameter), self.state[parameter], local(parameter.grad).float()
        if own.scale is not None:
            used = own.W if own.keep is None or self._dense(step.number) else torch.where(own.keep, own.W, 0.0)
            grad = held.move_scales(state, grad, used, replace(step, weight_decay=0.0))
        if own.fisher is not None:
            own.fisher.lerp_(grad.square(), 1 - step.beta2)
        if "mask" in state:
            later = ONCE_FROZEN if self.schedule.frozen(step.number) else {}
            update = later.get(self.method, UPDATES[self.method])
            decay = float(state["decay"]) * self._annealed(step.number)
            update(own, grad, replace(step, decay=decay))
        else:
            adamw_(own, grad, step)

    def _dense(self, number: int) -> bool:
        """Whether the model computes with all weights in step ``number``."""
        return self.method in DENSE_UNTIL_FROZEN and not self.schedule.frozen(number)

    def _annealed(self, number: int) -> float:
        """Share of the full decay in step ``number``."""
        return 1.0 if self.method in PULLED_ALIKE else self.schedule.annealed(number)

    def _held(self, parameter: Tensor) -> Weights:
        return held.held(parameter, self.state[parameter])

    def _refresh(self, due: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Measure the decay, and choose masks anew."""
        for parameter, group in due:
            held.measure(parameter, self.state[parameter], self.decay, self.method)
            if "split" in self.state[parameter]:
                held.dual(parameter, self.state[parameter], self._annealed(group["step"]))
        patterns = self._wanted(due) if self.method != "fixed" else {}
        for parameter, group in due:
            if parameter in patterns:
                own, state = self._held(parameter), self.state[parameter]
                mask = self._chosen(parameter, group, patterns[parameter])
                flips = shards.total(flipped(own.keep, mask), parameter)  # pyright: ignore[reportArgumentType]
                state["flips"] = torch.tensor(int(flips) / parameter.numel())
                local(state["mask"]).copy_(mask)

    def _wanted(self, due: list[tuple[Tensor, dict[str, Any]]]) -> dict[Tensor, Pattern]:
        """What every matrix is to become now, at the sparsity that the schedule has come to."""
        reached = {p: self.schedule.sparsity_reached(group["step"]) for p, group in due}
        ramps: dict[Tensor, Any] = {p: ramped(self._pattern(group), reached[p]) for p, group in due}
        if self.scope == "matrix" or not due:
            return ramps
        groups = dict(due)
        return masks.shares(lambda p: self._scores(p, groups[p]), [*ramps], next(iter(ramps.values())).sparsity)

    def _scores(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        metric = self.metric if group["step"] else "magnitude"  # no moments yet
        return METRICS[metric](held.judged(parameter, self.state[parameter]), self._step_of(group))

    def _chosen(self, parameter: Tensor, group: dict[str, Any], pattern: Pattern) -> Tensor:
        return masks.chosen(self._scores(parameter, group), parameter, pattern, transposed=group["transposed"])

    def _pattern(self, group: dict[str, Any]) -> Pattern:
        return pattern_from_dict(group["pattern"])

    def _write(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The parameter becomes what the model is to compute with."""
        own = self._held(parameter)
        if own.keep is not None and not self._dense(group["step"] + 1):
            local(parameter).copy_(masked(own))
        elif "master" in self.state[parameter]:
            local(parameter).copy_(dense(own))

    @torch.no_grad()
    def rewrite(self) -> None:
        """Write the weights that the model is to compute with once more, after a change of masters or masks."""
        self.begin()
        for parameter, group in self._all():
            self._write(parameter, group)

    # --------------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def project(self) -> None:
        """Set every pruned weight to zero, in the master too, and hold the model to its patterns. All, together.

        Row scales are multiplied into the weights, which are the model's to the bit, and are 1 from here on.

        Raises RuntimeError where a mask breaks its pattern: the sparsity had not risen to its end, for one.
        """
        self.begin()
        patterns = self.promised()
        for parameter, group in self._all():
            own, state = self._held(parameter), self.state[parameter]
            if parameter in patterns or own.scale is not None:
                own.W.copy_(masked(own) if parameter in patterns else dense(own))
                local(parameter).copy_(own.W)
            if own.scale is not None:
                local(state["scale"]).fill_(1.0)
            if parameter in patterns:
                masks.check(parameter, patterns[parameter], transposed=group["transposed"])

    @torch.no_grad()
    def promised(self) -> dict[Tensor, Pattern]:
        """What every sparse parameter is held to; in the scope "global" the share of zeros that has fallen on it.

        Together. Raises RuntimeError where these shares do not add up.
        """
        sparse = [(p, self._pattern(group)) for p, group in self._all() if "mask" in self.state[p]]
        if self.scope == "matrix" or not sparse:
            return dict(sparse)
        found = {parameter: masks.zeros(self.state[parameter]["mask"]) for parameter, _ in sparse}
        size = sum(parameter.numel() for parameter in found)
        wanted = size - kept_count(size, sparse[0][1].sparsity)
        if sum(found.values()) != wanted:
            raise RuntimeError(f"all masks together have {sum(found.values())} zeros, {wanted} were promised")
        return {parameter: Unstructured(number / parameter.numel()) for parameter, number in found.items()}

    def flip_rate(self) -> float:
        """Share of all masks that the last refresh changed: near 0 they have settled. Any process may ask alone."""
        states = [state for state in self.state.values() if "mask" in state]
        total = sum(state["mask"].numel() for state in states)
        return sum(float(state["flips"]) * state["mask"].numel() for state in states) / total if total else 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own types: torch would round masters and masks to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (parameter, _) in zip(numbers, self._all(), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value.to(parameter.device if value.ndim else "cpu", copy=True)
