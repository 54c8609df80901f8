"""SparseLLM's published procedure on a whole block: iteration 0 is the inner solver on every linear, then the rounds of
its FFN, and of every expert.

Inputs and targets of the FFNs come from the block with dense attention, as published, and nothing is re-run inside
the block. With ``iterations=1`` this is the inner solver, bit for bit.
"""

from torch import nn

from secateur.core.feedforward import FeedForward
from secateur.core.sparsellm import Refined, SparseLLM
from secateur.core.sparsellm_paper import paper_feedforward
from secateur.models.layout import FeedForwardForm
from secateur.pruning.experts import Tokens, collector, even, expert_forms, linears_of, rounds_of, too_few
from secateur.pruning.ffn import HostTokens, dense_targets, ffn_patterns, ffn_view, first_linears, write_ffn
from secateur.pruning.hidden import Hidden
from secateur.pruning.layerwise import layerwise
from secateur.pruning.work import Precise, Watcher, Work


def paper(work: Work, options: SparseLLM) -> Refined | None:
    """Prune one block; returns what the FFN went through that sees every token, if there is one."""
    form = work.form if work.has_ffn else None
    experts = expert_forms(work)
    inputs: Tokens = {}
    dense: dict[str, FeedForward] = {}
    seen: dict[nn.Module, Watcher] = {}
    for name, one in {**experts, **({} if form is None else {"": form})}.items():
        inputs[name] = work.waiting()
        if options.iterations > 1:
            seen[work.linear(one.up.linear)] = collector(inputs[name])
            dense[name] = ffn_view(work, one)
    layerwise(work, options.inner, also=seen)
    if options.iterations == 1:
        return None
    for name, one in experts.items():
        chunks = even(work, inputs[name])
        if note := too_few(work, one, chunks):
            work.add_note(linears_of(one), note)
            continue
        work.expert_rounds += rounds_of(name, rounds(work, one, dense[name], chunks, options))
    return None if form is None else rounds(work, form, dense[""], inputs[""], options)


def rounds(work: Work, form: FeedForwardForm, dense: FeedForward, inputs: Hidden, options: SparseLLM) -> Refined:
    """The published rounds of one FFN, written."""
    with work.forwards("ffn"), work.naming(*first_linears(form), form.down):
        tokens = HostTokens(inputs, dense_targets(work, dense, inputs), work.options.device)
        solver = Precise(options.inner, work)
        pruned = ffn_view(work, form)
        refined = paper_feedforward(dense, pruned, tokens, ffn_patterns(work, form), options, solver, work.combine)
    write_ffn(work, form, dense, refined)
    return refined
