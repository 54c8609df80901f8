"""An FFN of a block, or an expert, as SparseLLM sees it: matrices out of linears, tokens out of memory, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.core.activations import activation
from secateur.core.feedforward import Affine, FeedForward
from secateur.core.pattern import Stacked
from secateur.core.plan import Plan
from secateur.core.solver import Pruned
from secateur.core.sparsellm import Patterns, Refined, SparseLLM, closed_feedforward
from secateur.models.adapter import DecoderAdapter
from secateur.models.layout import FeedForwardForm, Half
from secateur.models.outline import Outline, outline
from secateur.pruning.hidden import Hidden
from secateur.pruning.work import Precise, Work, check_whole

HELD_OUT = 8
"""One calibration token in so many, the first ones, is held out of the FFN's fits and judges its iterates; with fewer
tokens than that all are fitted and judge."""


def check_whole_ffns(adapter: DecoderAdapter, plan: Plan) -> None:
    """UsageError where a block has a part of its FFN planned that SparseLLM prunes as a whole, before any is pruned.

    By the roles that shapes tell (``models.outline``); experts in a list of modules are left to the run.
    """
    known: dict[tuple[str, ...], Outline] = {}
    for index, (name, block) in enumerate(zip(adapter.block_names, adapter.blocks, strict=True)):
        linears = tuple(adapter.linears(block))
        planned = {linear for linear in linears if f"{name}.{linear}" in plan}
        if len(planned) in (0, len(linears)) or not all(one.fused for one in adapter.experts(block)):
            continue
        roles = known[linears] = known.get(linears) or outline(adapter, index)
        check_whole(name, {*roles.first, roles.down} - {None}, planned)
        for first, down in (member for mixture in roles.experts for member in mixture.members):
            check_whole(name, {*first, down}, planned)


def ffn_view(work: Work, form: FeedForwardForm) -> FeedForward:
    """An FFN of the block as matrices."""

    def affine(half: Half) -> Affine:
        linear = work.linear(half.linear)
        bias = work.adapter.bias(linear)
        return Affine(
            work.adapter.read(linear)[half.start : half.stop], None if bias is None else bias[half.start : half.stop]
        )

    down = work.linear(form.down)
    return FeedForward(
        affine(form.up),
        Affine(work.adapter.read(down), work.adapter.bias(down)),
        affine(form.gate) if form.gate else None,
        activation(form.activation, form.learned),
    )


class HostTokens(Sequence):
    """Chunks (X, Y) that wait in host memory and come to the device as float32 when they are asked for."""

    def __init__(self, X: Hidden, Y: Hidden, device: str) -> None:
        self._X, self._Y, self._device = X, Y, device

    def __len__(self) -> int:
        return len(self._X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i >= len(self._X):
            raise IndexError(i)
        return self._flat(self._X[i]), self._flat(self._Y[i])

    def _flat(self, rows: Tensor) -> Tensor:
        return rows.to(self._device).flatten(0, -2).float()


def dense_targets(work: Work, dense: FeedForward, inputs: Hidden) -> Hidden:
    """The dense FFN's own outputs on these inputs, where they wait."""

    def output(X: Tensor) -> Tensor:
        return dense(X.to(work.options.device).flatten(0, -2).float()).view_as(X).to(X.device, X.dtype)

    return work.waiting(output(X) for X in inputs)


def prune_ffn(work: Work, form: FeedForwardForm, X: Hidden, Y: Hidden, options: SparseLLM) -> Refined:
    """Closed mode on one FFN: hand it and its tokens to the block solver and write what comes back."""
    dense = ffn_view(work, form)
    rows, rank = work.options.ranks.each(X.rows), work.options.ranks.rank
    held = sum(rows) // HELD_OUT
    own = max(0, held - sum(rows[:rank]))
    (X_held, X), (Y_held, Y) = X.parted(own), Y.parted(own)
    train = HostTokens(X, Y, work.options.device)
    test = HostTokens(X_held, Y_held, work.options.device) if held else train
    solver = Precise(options.inner, work)
    with work.forwards("ffn"), work.naming(*first_linears(form), form.down):
        refined = closed_feedforward(dense, train, test, ffn_patterns(work, form), options, solver, work.combine)
    write_ffn(work, form, dense, refined)
    return refined


def first_linears(form: FeedForwardForm) -> tuple[str, ...]:
    """The linears of gate and up, in stacked order; one where they are fused."""
    return tuple(dict.fromkeys(half.linear for half in (form.gate, form.up) if half))


def ffn_patterns(work: Work, form: FeedForwardForm) -> Patterns:
    first = tuple((work.targets[name].shape[0], work.targets[name].pattern) for name in first_linears(form))
    return Patterns(Stacked(first), work.targets[form.down].pattern)


def write_ffn(work: Work, form: FeedForwardForm, dense: FeedForward, refined: Refined) -> None:
    """The FFN's matrices back into their linears, halves of a fused one put together again; one record each.

    Several processes take those of the first: their own may differ in the last bit, since each made the refits itself.
    """
    ffn, same = refined.ffn, work.options.ranks.same
    halves = [(form.up, dense.up.W, ffn.up.W)]
    if form.gate and dense.gate and ffn.gate:
        halves.append((form.gate, dense.gate.W, ffn.gate.W))
    for name in first_linears(form):
        parts = sorted((row for row in halves if row[0].linear == name), key=lambda row: row[0].start)
        before, after = torch.cat([W0 for _, W0, _ in parts]), same(torch.cat([W for _, _, W in parts]))
        work.solved((name,), before, Pruned(after, after != 0, refined.note), refined.first_inputs)
    written = work.write(form.down, same(ffn.down.W))
    work.record(form.down, written, refined.note, refined.down.error, refined.down.inputs)
