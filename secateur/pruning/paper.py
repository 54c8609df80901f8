"""SparseLLM's published procedure on a whole block: iteration 0 is the inner solver on every linear, then the FFN's
rounds.

Inputs and targets of the FFN come from the block with dense attention, as published, and nothing is re-run inside
the block. With ``iterations=1`` this is the inner solver, bit for bit.
"""

from torch import Tensor, nn

from secateur.core.sparsellm import Refined, SparseLLM, paper_feedforward
from secateur.pruning.ffn import HostTokens, dense_targets, ffn_patterns, ffn_view, write_ffn
from secateur.pruning.layerwise import layerwise
from secateur.pruning.work import Precise, Watcher, Work


def paper(work: Work, options: SparseLLM) -> Refined | None:
    """Prune one block; returns what the FFN went through."""
    form = work.form
    inputs = work.waiting()

    def collect(X: Tensor) -> None:
        inputs.append(X.to("cpu"))

    dense = ffn_view(work)
    seen: dict[nn.Module, Watcher] = {work.linear(form.up.linear): collect} if options.iterations > 1 else {}
    layerwise(work, options.inner, also=seen)
    if options.iterations == 1:
        return None
    with work.forwards("ffn"):
        tokens = HostTokens(inputs, dense_targets(work, dense, inputs), work.options.device)
        solver = Precise(options.inner, work)
        refined = paper_feedforward(dense, ffn_view(work), tokens, ffn_patterns(work), options, solver)
    write_ffn(work, dense, refined)
    return refined
