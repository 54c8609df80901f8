"""Perplexity as the pruning papers measure it (GPTQ, SparseGPT, Wanda, SparseLLM), every choice named in the result.

A text is joined, tokenised once and cut into windows of S tokens that do not overlap; the last partial one is dropped.
Each window starts with no memory of the one before and gives S - 1 predictions. Perplexity is exp of the mean float32
cross entropy over all of them. The papers multiply each window's mean by S and divide by n * S, which is the same.

Perplexities compare only at equal text, joiner, tokenizer, S and number of windows; ``log_gap`` refuses anything else.
Bits per byte divides by the text's UTF-8 bytes instead of the tokens, so it also compares across tokenizers.

Logits come from the whole model, head included: some architectures scale or cap them after the head (Gemma 2, Cohere,
Granite), so applying the head by hand would be wrong there. They stay in the model's dtype; only PIECE of them at a
time become float32 with their log-softmax. Memory: batch * S * vocab logits in the model's dtype.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from secateur.data.sources import Texts
from secateur.data.tokens import bos_rule, bytes_per_token, check_seq_len, eval_windows, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECE = 1 << 20
"""Logits whose float32 log-softmax exists at one time: 4 MB stay in a core's cache, 50 MB took 3.5 times as long."""


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured and how. The fields below ``bits_per_byte`` are the protocol."""

    ppl: float
    """exp(nll_per_token); inf or nan where a model is that broken."""
    nll_per_token: float
    """Mean cross entropy of the predicted tokens, in nats."""
    bits_per_byte: float
    """The same loss in bits, per UTF-8 byte of the text: compares across tokenizers."""
    text: str
    joiner: str
    """What stands between two documents of the text."""
    bos: str
    tokens: int
    """Tokens in the windows; ``windows`` of them, the first of each window, are read but not predicted."""
    windows: int
    seq_len: int
    overlap: int
    dtype: str
    """Of the weights, and of autocast where it was on."""
    loss_dtype: str
    window_nll: tuple[float, ...]
    """Mean loss of each window: the spread, and paired differences between two models."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Texts,
    *,
    seq_len: int,
    limit: int | None = None,
    batch: int = 1,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a text: tokenise, cut, measure. ``limit`` windows at most, and never more than the text's own."""
    check_seq_len(seq_len, getattr(model.config, "max_position_embeddings", None))
    tokens = tokenize(texts, tokenizer)
    windows = eval_windows(tokens, seq_len, min((n for n in (limit, texts.windows) if n is not None), default=None))
    return perplexity(
        model,
        windows,
        bytes_per_token=bytes_per_token(windows, tokenizer),
        text=texts.name,
        joiner=texts.joiner,
        bos=bos_rule(tokens, tokenizer),
        batch=batch,
        autocast=autocast,
        progress=progress,
    )


def perplexity(
    model: "PreTrainedModel",
    windows: Int64[Tensor, "n S"],
    *,
    bytes_per_token: float,
    text: str,
    joiner: str,
    bos: str,
    batch: int = 1,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Mean loss over windows of token ids. ``progress(done, total)`` is called after every batch of windows."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the loss; call model.eval() first")
    n, S = windows.shape
    losses: list[float] = []
    for ids in windows.split(batch):
        losses += window_losses(model, ids.to(model.device), autocast).tolist()
        if progress is not None:
            progress(len(losses), n)
    nll = math.fsum(losses) / n
    return PerplexityResult(
        ppl=float(torch.tensor(nll, dtype=torch.float64).exp()),  # math.exp raises on overflow, this gives inf
        nll_per_token=nll,
        bits_per_byte=nll / math.log(2) / bytes_per_token,
        text=text,
        joiner=joiner,
        bos=bos,
        tokens=n * S,
        windows=n,
        seq_len=S,
        overlap=0,
        dtype=_name(model.dtype) + (f", {_name(autocast)} autocast" if autocast else ""),
        loss_dtype="float32",
        window_nll=tuple(losses),
    )


@torch.inference_mode()
def window_losses(
    model: "PreTrainedModel", ids: Int64[Tensor, "B S"], autocast: torch.dtype | None = None
) -> Float[Tensor, "B"]:
    """Mean cross entropy of every window over its S - 1 predictions, in float64 (summed from float32 terms)."""
    with torch.autocast(ids.device.type, autocast) if autocast else nullcontext():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    positions = max(1, PIECE // (logits.shape[0] * logits.shape[-1]))
    terms = [
        F.cross_entropy(some.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        for some, targets in zip(logits.split(positions, dim=1), ids[:, 1:].split(positions, dim=1), strict=True)
    ]
    return torch.cat(terms, dim=1).double().mean(dim=1)


def log_gap(result: PerplexityResult, baseline: PerplexityResult) -> float:
    """ln(ppl) above the baseline's: 0 = as good, 0.1 = 10 % more perplexity. ValueError where the protocols differ."""
    protocol = ("text", "joiner", "bos", "tokens", "windows", "seq_len", "overlap")
    different = [name for name in protocol if getattr(result, name) != getattr(baseline, name)]
    if different:
        raise ValueError(f"not comparable, they differ in {', '.join(different)}; evaluate both on the same windows")
    return result.nll_per_token - baseline.nll_per_token


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
