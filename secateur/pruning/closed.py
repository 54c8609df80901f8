"""SparseLLM's closed mode on a whole block: everything is fitted to what the pruned network really produces.

1. Attention inputs (q, k, v) are pruned. 2. The attention is run again; its output projection is fitted to the dense
block's attention output on the inputs it really gets now, then pruned. 3. Experts, where the block has any, are pruned
one by one (``experts``). 4. The FFN's inputs are taken after that; its target is the dense block's output minus the
pruned residual stream, so that it absorbs the attention's error too, and that of experts beside it. 5. The FFN is
pruned by ``core.sparsellm``. The cost is two and a half forwards of the block where layer-by-layer pruning needs one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from secateur.core.linalg import fit
from secateur.core.moments import CrossMoments, Gram
from secateur.core.sparsellm import Refined, SparseLLM
from secateur.models.hooks import replaced_forward
from secateur.pruning.experts import closed_experts, expert_forms
from secateur.pruning.ffn import dense_targets, ffn_view, prune_ffn
from secateur.pruning.hidden import Hidden
from secateur.pruning.layerwise import planned_groups
from secateur.pruning.work import Precise, Watcher, Work, in_rows, watching


def closed(work: Work, options: SparseLLM) -> Refined | None:
    """Prune one block; returns what the FFN went through that sees every token, if there is one."""
    form = work.form if work.has_ffn else None  # refused here, before any work
    experts = expert_forms(work)
    outputs = attention(work, options)
    closed_experts(work, experts, options)
    if form is None:
        return None
    X, Y = ffn_tokens(work, outputs, options)
    del outputs  # as large as what the FFN is fitted on
    return prune_ffn(work, form, X, Y, options)


def attention(work: Work, options: SparseLLM) -> Hidden:
    """Prune the attention; the dense block's outputs."""
    outputs, attended = attention_inputs(work, options)
    attention_output(work, attended, options)
    return outputs


def attention_inputs(work: Work, options: SparseLLM) -> tuple[Hidden, Hidden]:
    """Prune what feeds the attention; returns the dense block's outputs and its inputs of the output projection."""
    out = work.layout.attention_out
    groups = [g for g in attention_groups(work) if out not in g]
    device = torch.device(work.options.device)
    grams = {g: Gram.zeros(work.targets[g[0]].shape[1], device) for g in groups}
    watchers: dict[nn.Module, Watcher] = {work.linear(g[0]): gram.update for g, gram in grams.items()}
    attended = work.waiting()
    if out in work.targets:
        watchers[work.linear(out)] = lambda a: attended.append(a.cpu())
    with work.forwards("dense forward"):
        outputs = work.watched_pass(watchers)
        for gram in grams.values():
            work.combine(gram)
    solver = Precise(options.inner, work)
    for g, gram in grams.items():
        (W, pattern), observed = work.stacked(g), gram.observed()
        with work.naming(*g):
            work.solved(g, W, solver.solve(W, observed.H, pattern), observed)
    return outputs, attended


def attention_groups(work: Work) -> list[tuple[str, ...]]:
    named = {name for group in work.layout.groups if group.part == "attention" for name in group.linears}
    return [g for g in planned_groups(work) if g[0] in named]


class _ReachedError(Exception):
    """Ends a forward that has shown what was wanted of it."""


def attention_output(work: Work, attended: Hidden, options: SparseLLM) -> None:
    """Fit the output projection to the dense attention's output on its real inputs, then prune it."""
    out = work.layout.attention_out
    if out not in work.targets:
        return
    W0, pattern = work.stacked((out,))
    R, C = W0.shape
    gram, residual = Gram.zeros(C, W0.device), CrossMoments.zeros(R, C, W0.device)
    waiting = iter(attended)

    def see(a: Tensor) -> None:
        a = a.float()
        gram.update(a)
        lost = next(waiting).to(a.device).float().view_as(a) - a
        residual.update(lost @ W0.T, a)  # what W0 leaves unexplained on these inputs
        raise _ReachedError

    with work.forwards("attention forward"), watching({work.linear(out): see}):
        for rows in work.hidden:
            with suppress(_ReachedError):
                work.run(rows)
        work.combine(gram)
        work.combine(residual)
    observed = gram.observed()
    with work.naming(out):
        target = fit(W0, observed.H, residual.mean(), options.fit_damp)
        work.solved((out,), W0, Precise(options.inner, work).solve(target, observed.H, pattern), observed)


def ffn_tokens(work: Work, outputs: Hidden, options: SparseLLM) -> tuple[Hidden, Hidden]:
    """Inputs X of the FFN behind the pruned attention, and the targets Y that it is fitted to, a row for each token."""
    inputs, targets = work.waiting(), work.waiting()
    absorbs = options.target == "block" and work.layout.additive
    with work.forwards("attention forward"), silenced(work) as entering:
        for rows, output in zip(work.hidden, outputs, strict=True):
            residual = work.run(rows)
            inputs.append_each(in_rows(entering.pop(), rows))
            if absorbs:
                targets.append_each(output - residual)
    if absorbs:
        return inputs, targets
    with work.forwards("dense forward"):
        return inputs, dense_targets(work, ffn_view(work, work.form), inputs)


@contextmanager
def silenced(work: Work) -> Iterator[list[Tensor]]:
    """The block without its FFN: its linears answer zeros at once. What would have entered the FFN lies in the list, on
    the host, after each forward."""
    form = work.form
    names = {form.up.linear, form.down} | ({form.gate.linear} if form.gate else set())

    def zeros(rows: int) -> Callable[[Tensor], Tensor]:
        return lambda X: X.new_zeros(*X.shape[:-1], rows)

    entering: list[Tensor] = []
    collect: dict[nn.Module, Watcher] = {work.linear(form.up.linear): lambda X: entering.append(X.cpu())}
    silent: dict[nn.Module, Callable] = {work.linear(name): zeros(work.targets[name].shape[0]) for name in names}
    with watching(collect), replaced_forward(silent):
        yield entering
