"""What the sparse linears are multiplied with while they train: sums of squared inputs, for the metric ``wanda``.

    sums = InputSums({linear.weight: linear for linear in sparse_linears})
    with sums.watching():
        loss = model(batch)
    loss.backward()
    optimizer.observe(sums.taken())
    optimizer.step()

The inputs are those of the sparse model, after all that came before them has moved. Hooks stand only while a forward is
watched: a forward that gradient checkpointing runs again inside backward is not seen, so that every token counts once.
Work: three operations an input and linear, beside 2 R of the linear itself.

R = out_features, C = in_features.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from secateur.core.moments import ColumnNorms
from secateur.models.hooks import hooked
from secateur.models.linears import stored_transposed
from secateur.training.shards import local


def _alone(sums: Tensor) -> Tensor:
    return sums


class InputSums:
    """Sums since they were last taken, by the parameter that holds the matrix."""

    def __init__(self, linears: Mapping[Tensor, nn.Module]) -> None:
        """``linears``: by the parameter, (R, C), or (C, R) of a Conv1D, the module that multiplies with it."""
        self._linears = dict(linears)
        self._sums = self._zeros()

    def _zeros(self) -> dict[Tensor, ColumnNorms]:
        widths = {p: p.shape[0 if stored_transposed(linear) else 1] for p, linear in self._linears.items()}
        return {parameter: ColumnNorms.zeros(C, local(parameter).device) for parameter, C in widths.items()}

    def watching(self) -> AbstractContextManager[None]:
        """Forwards in here are counted."""
        return hooked(
            linear.register_forward_pre_hook(partial(self._see, parameter))
            for parameter, linear in self._linears.items()
        )

    @torch.no_grad()
    def _see(self, parameter: Tensor, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._sums[parameter].update(args[0])

    def taken(self, total: Callable[[Tensor], Tensor] = _alone) -> dict[Tensor, ColumnNorms]:
        """The sums, which begin anew. ``total`` adds a tensor up over the processes, and is called once."""
        seen, self._sums = self._sums, self._zeros()
        if not seen:
            return {}
        tokens = torch.tensor([float(norms.tokens) for norms in seen.values()])
        sums = [norms.sum for norms in seen.values()]
        flat = total(torch.cat([*sums, tokens.to(sums[0].device)]))
        *added, counts = flat.split([*map(len, sums), len(sums)])
        pairs = zip(added, counts.tolist(), strict=True)
        return {parameter: ColumnNorms(one, int(count)) for parameter, (one, count) in zip(seen, pairs, strict=True)}
