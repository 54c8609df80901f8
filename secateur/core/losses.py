"""Distillation losses through the output head, a few tokens at a time.

Logits of T tokens over a vocabulary of V are the largest tensors of a training step: at V = 128,256 and T = 8,192 the
student's, the teacher's and their gradients take 17 GB in float32. Here the heads are applied to ``chunk`` tokens at a
time, in forward and, computed once more, in backward, so that memory is chunk * V and does not grow with T; the extra
cost, where T is more than one chunk, is one product with each head.

    L = alpha T² KL(teacher | student) at temperature T + (1 - alpha) cross entropy     (AST, arXiv:2407.20584, Eq. 4)

T² keeps the gradient's size when T changes (Hinton et al., arXiv:1503.02531); the published formula has no temperature,
the published code has T = 2 and the factor 4.

T = tokens, D = hidden size, V = vocabulary, k = teacher logits that a cache kept. Sums are over tokens with a target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of a token that has none: padding, the last of a row."""

PIECE = 1 << 18
"""Logits that are worked on at one time: 1 MB in float32, so that a dozen such tensors stay in a core's cache."""

Divergence = Callable[[Float[Tensor, "T V"], Float[Tensor, "T V"]], Float[Tensor, " T"]]
"""(Log probabilities of the student, of the teacher) -> divergence of every token, in nats."""


def forward_kl(student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """KL(teacher | student): the student must put mass wherever the teacher does."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """KL(student | teacher): the student may drop what it cannot imitate (MiniLLM, arXiv:2306.08543)."""
    return forward_kl(teacher, student)


def jensen_shannon(student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """The mean of both against their mixture: symmetric, at most ln 2."""
    mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
    return (forward_kl(mixture, teacher) + forward_kl(mixture, student)) / 2


DIVERGENCES: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl, "jensen-shannon": jensen_shannon}


@dataclass(frozen=True)
class Distillation:
    """What is learnt from the teacher and what from the text."""

    alpha: float = 0.67
    """Share of the divergence, in [0, 1]; the rest is cross entropy with the text."""
    temperature: float = 2.0
    """Of both distributions; above 1 the teacher's less likely tokens count for more."""
    divergence: str = "forward"
    """A key of ``DIVERGENCES``."""
    chunk: int = 1024
    """Tokens whose logits exist at one time."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not 0 < self.temperature < math.inf or self.chunk < 1:
            raise ValueError(
                "wanted alpha in [0, 1], a finite temperature > 0, chunk >= 1; "
                f"got {self.alpha}, {self.temperature}, {self.chunk}"
            )
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence!r} is unknown; use one of {', '.join(DIVERGENCES)}")


class Losses(NamedTuple):
    """Means over the tokens that have a target; ``total`` carries the gradient."""

    total: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    """Without alpha and T²."""
    cross_entropy: Float[Tensor, ""]


Head = Callable[[Float[Tensor, "T D"]], Float[Tensor, "T V"]]
"""Logits of some tokens: the model's output projection, with its bias, scale or cap where it has one."""


class TopK(NamedTuple):
    """What a cache keeps of the teacher's distribution at one temperature: k of V log probabilities."""

    log_p: Float[Tensor, "T k"]
    tokens: Int[Tensor, "T k"]

    @classmethod
    def of(cls, logits: Float[Tensor, "T V"], k: int, temperature: float) -> "TopK":
        return cls(*_log_p(logits.float(), temperature).topk(k, dim=-1))

    def rows(self, piece: slice) -> "TopK":
        return TopK(self.log_p[piece], self.tokens[piece])


Taught = Callable[[int, int], Float[Tensor, "T V"] | TopK]
"""What the teacher says of the tokens from one number to another: its logits, or what was kept of them. Asked for in
forward and, where there is more than one chunk, again in backward."""


def distill(
    hidden: Float[Tensor, "T D"], head: Head, targets: Int[Tensor, " T"], taught: Taught, options: Distillation
) -> Losses:
    """The loss of T tokens, chunk by chunk; gradients reach ``hidden`` and the head's parameters.

    Where all tokens fit one chunk, the heads are applied once; else once more in backward.
    """
    starts = range(0, len(hidden), options.chunk)
    sums = partial(checkpoint, _sums, use_reentrant=False) if len(starts) > 1 else _sums
    totals: list[_Sums] = []
    for start in starts:
        stop = min(start + options.chunk, len(hidden))
        totals.append(sums(hidden[start:stop], head, targets[start:stop], partial(taught, start, stop), options))  # pyright: ignore
    mixed, apart, entropy = (torch.stack(parts).sum() for parts in zip(*totals, strict=True))
    n = max(int((targets != IGNORED).sum()), 1)
    return Losses(mixed / n, apart.detach() / n, entropy.detach() / n)


_Sums = tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]
"""Sums over tokens with a target: what is differentiated, divergence at the temperature, cross entropy at 1."""


def _sums(
    hidden: Float[Tensor, "T D"],
    head: Head,
    targets: Int[Tensor, " T"],
    taught: Callable[[], Float[Tensor, "T V"] | TopK],
    options: Distillation,
) -> _Sums:
    with torch.no_grad():
        teacher = taught()
    return _InPieces.apply(head(hidden), teacher, targets, options)  # pyright: ignore[reportReturnType]


class _InPieces(torch.autograd.Function):
    """The sums of a chunk and the gradient at its logits, both in one pass, PIECE logits at a time.

    A dozen elementwise operations on all logits of a chunk wait for memory; on a piece they stay in the cache. Only
    the gradient is kept for backward, in the logits' own type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "T V"],
        teacher: Float[Tensor, "T V"] | TopK,
        targets: Int[Tensor, " T"],
        options: Distillation,
    ) -> _Sums:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        totals = torch.zeros(3, device=logits.device)
        rows = max(1, PIECE // logits.shape[1])
        for start in range(0, len(logits), rows):
            piece = slice(start, start + rows)
            own = logits[piece].detach().float().requires_grad_(wanted)
            with torch.enable_grad(), saved_tensors_hooks(_same, _same):  # not checkpoint's, which would begin again
                some = teacher.rows(piece) if isinstance(teacher, TopK) else teacher[piece].float()
                sums = _piece_sums(own, some, targets[piece], options)
            if gradient is not None:
                gradient[piece] = torch.autograd.grad(sums[0], own)[0]
            totals += torch.stack(sums).detach()
        ctx.save_for_backward(gradient)
        mixed, apart, entropy = totals.unbind()
        ctx.mark_non_differentiable(apart, entropy)
        return mixed, apart, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, ""]) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _piece_sums(
    own: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"] | TopK, targets: Int[Tensor, " T"], options: Distillation
) -> _Sums:
    temperature = options.temperature
    entropy = F.cross_entropy(own, targets, ignore_index=IGNORED, reduction="sum")
    if isinstance(teacher, TopK):
        apart = tail_kl(own, teacher, temperature)
    else:
        apart = DIVERGENCES[options.divergence](_log_p(own, temperature), _log_p(teacher, temperature))
    apart = (apart * (targets != IGNORED)).sum()
    return options.alpha * temperature**2 * apart + (1 - options.alpha) * entropy, apart, entropy


def _log_p(logits: Float[Tensor, "T V"], temperature: float) -> Float[Tensor, "T V"]:
    return F.log_softmax(logits / temperature, dim=-1)


# ----------------------------------------------------------------------------------------------------- a cached teacher


def tail_kl(student: Float[Tensor, "T V"], teacher: TopK, temperature: float) -> Float[Tensor, " T"]:
    """Forward KL over the k kept tokens and one bucket that holds all others: a divergence of two distributions.

    Never above the full one, and 0 where the kept probabilities agree. Without the bucket the student could lower it
    by moving mass to tokens that were not kept.
    """
    q = _log_p(student.float(), temperature)
    kept = q.gather(-1, teacher.tokens)
    p, q = _with_bucket(teacher.log_p), _with_bucket(kept)
    return (p.exp() * (p - q)).sum(dim=-1)


def _with_bucket(log_p: Float[Tensor, "T k"]) -> Float[Tensor, "T k1"]:
    """The log probability of everything else as one more column, bounded away from log 0."""
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)


def shifted(ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """The next token of every token; IGNORED for the last of a row."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
