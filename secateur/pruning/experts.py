"""SparseLLM on the experts of a block: every expert is an FFN of its own, coupled on the tokens routed to it.

What is an expert to be fitted to? Not to the block's output: several experts share it, in proportions that the router
sets. And not to what the dense block's expert said: with pruned attention the router sends other tokens. So the rule is
the target "ffn" of closed mode: routing is that of the pruned stream (the router itself is never pruned), and an expert
is fitted to its own dense output on the tokens that it really gets now. Attention's error is not absorbed here; a
shared expert beside them, whose target can be the whole block's output, absorbs it, and theirs too.

An expert with fewer than ``FIT_TOKENS_PER_INPUT`` tokens per input of its widest matrix gets iteration 0 only: the
inner solver on each matrix, on moments that ``shortage`` tops up where needed, and no least-squares fit, which so few
tokens would not determine. A note in its records says so.

Cost: one forward of the block, and the inputs of all experts in host memory (k times the hidden states, for k experts a
token). Experts are worked on one at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from secateur.core.sparsellm import Refined, SparseLLM
from secateur.models.layout import FeedForwardForm
from secateur.pruning.ffn import dense_targets, ffn_view, first_linears, prune_ffn
from secateur.pruning.hidden import Hidden
from secateur.pruning.layerwise import solve_groups
from secateur.pruning.records import RoundRecord
from secateur.pruning.shortage import Pool, Sums, accumulator, top_up
from secateur.pruning.work import Watcher, Work, watching

FIT_TOKENS_PER_INPUT = 2
"""Tokens for each input of an expert's widest matrix from which SparseLLM fits it."""
CHUNK = 2048
"""Tokens of an expert that are worked on at one time."""
Tokens = dict[str, Hidden]
"""Inputs of the experts by name, chunk by chunk as they came."""


def expert_forms(work: Work) -> dict[str, FeedForwardForm]:
    """The FFN of every expert by its name; an error where one has no known form or the plan lacks a part of it."""
    return {m.name: work.whole_form(m.ffn, m.refusal) for layout in work.experts for m in layout.members}


def linears_of(form: FeedForwardForm) -> tuple[str, ...]:
    return (*first_linears(form), form.down)


def too_few(work: Work, form: FeedForwardForm, chunks: Hidden) -> str:
    """The note on an expert whose tokens are too few to fit it; empty where they are enough."""
    tokens = work.options.ranks.total(chunks.rows)
    wanted = FIT_TOKENS_PER_INPUT * max(work.targets[name].shape[1] for name in linears_of(form))
    return f"{tokens} of {wanted} tokens that SparseLLM's fits want, so they were left out" if tokens < wanted else ""


def rounds_of(name: str, refined: Refined) -> Iterator[RoundRecord]:
    return (RoundRecord(*row, ffn=name) for row in refined.rounds)


def closed_experts(work: Work, forms: dict[str, FeedForwardForm], options: SparseLLM) -> None:
    """Prune every expert on the tokens that the pruned attention sends it."""
    tokens, pools = routed_tokens(work, forms)
    for pool in pools:
        for expert, member in enumerate(pool.layout.members):
            form, chunks = forms[member.name], even(work, tokens.pop(member.name))
            if note := too_few(work, form, chunks):
                first_iteration(work, pool, expert, chunks, options)
                work.add_note(linears_of(form), note)
                continue
            Y = targets(work, form, chunks)
            work.expert_rounds += rounds_of(member.name, prune_ffn(work, form, chunks, Y, options))


def routed_tokens(work: Work, forms: dict[str, FeedForwardForm]) -> tuple[Tokens, list[Pool]]:
    """The inputs of every expert as things stand, and the pools that they are topped up from; in host memory."""
    tokens: Tokens = {name: work.waiting() for name in forms}
    pools = [Pool.of(work, layout) for layout in work.experts]
    watchers: dict[nn.Module, Watcher] = {
        work.linear(f.up.linear): collector(tokens[name]) for name, f in forms.items()
    }
    watchers |= {pool.entrance: pool.see for pool in pools}
    if watchers:
        with work.forwards("attention forward"):
            for rows in work.hidden:
                for module, inputs in work.watched(rows, watchers)[1].items():
                    watchers[module](inputs)
    return tokens, pools


def collector(chunks: Hidden) -> Watcher:
    """Keeps what it sees."""

    def collect(X: Tensor) -> None:
        chunks.append_each(X.to("cpu"))

    return collect


def even(work: Work, chunks: Hidden) -> Hidden:
    """The same tokens in chunks of one size."""
    return work.waiting(torch.cat(list(chunks)).split(CHUNK)) if chunks else chunks


def targets(work: Work, form: FeedForwardForm, chunks: Hidden) -> Hidden:
    """The dense expert's own outputs."""
    with work.forwards("dense forward"):
        return dense_targets(work, ffn_view(work, form), chunks)


def first_iteration(work: Work, pool: Pool, expert: int, chunks: Hidden, options: SparseLLM) -> None:
    """The inner solver on every matrix of one expert."""
    groups = pool.layout.members[expert].groups
    sums: Sums = {linears: accumulator(work, linears, options.needs) for linears in groups}
    with work.forwards("ffn"):
        with watching({work.linear(linears[0]): total.update for linears, total in sums.items()}):
            for X in chunks:
                pool.layout.run(expert, X.to(work.options.device))
        for total in sums.values():
            work.combine(total)
        sums, notes = top_up(work, sums, [pool])
        solve_groups(work, groups, sums, notes, options.inner)
