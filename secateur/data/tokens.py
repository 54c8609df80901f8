"""From text to windows of token ids. N = tokens, S = seq_len.

A text is joined and tokenised once, with the tokenizer's own special tokens: one BOS at the very start for tokenizers
that add one, none later, as in the papers. Calibration draws windows at random; evaluation walks through the text.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.data.sources import Texts
from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_seq_len(seq_len: int, context: int | None) -> None:
    """UsageError when windows are longer than the model's context (``max_position_embeddings``; None = unbounded)."""
    if seq_len < 2:
        raise UsageError(f"seq-len {seq_len}; wanted at least 2 tokens, one to read and one to predict")
    if context is not None and seq_len > context:
        raise UsageError(f"seq-len {seq_len} is above the model's context of {context}; give {context} or less")


def tokenize(texts: Texts, tokenizer: "PreTrainedTokenizerBase") -> Int64[Tensor, "N"]:
    """Token ids of the whole joined text, in one pass."""
    return torch.tensor(tokenizer(texts.text, verbose=False)["input_ids"], dtype=torch.int64)


def sample_windows(
    tokens: Int64[Tensor, "N"], samples: int, seq_len: int, generator: torch.Generator
) -> Int64[Tensor, "samples S"]:
    """Random windows that do not overlap, in random order; every such placement is equally likely.

    Stars and bars: drop all but one position of each window, choose ``samples`` of the positions that are left, and
    put the windows' lengths back.
    """
    N = len(tokens)
    if samples * seq_len > N:
        fewer = f", --samples {N // seq_len}" if seq_len <= N else ""
        raise DataError(
            f"the text holds {N} tokens, {samples} samples x seq-len {seq_len} need {samples * seq_len}; "
            f"give more text{fewer} or a shorter --seq-len"
        )
    left = N - samples * (seq_len - 1)
    chosen = torch.randperm(left, generator=generator)[:samples].sort().values
    starts = chosen + torch.arange(samples) * (seq_len - 1)
    starts = starts[torch.randperm(samples, generator=generator)]
    return tokens[starts[:, None] + torch.arange(seq_len)]


def eval_windows(
    tokens: Int64[Tensor, "N"], seq_len: int, limit: int | None = None, *, name: str = "the text"
) -> Int64[Tensor, "n S"]:
    """Consecutive windows without overlap, the last partial one dropped; at most ``limit`` of them."""
    n = len(tokens) // seq_len
    if n == 0:
        raise DataError(f"{name} holds {len(tokens)} tokens, fewer than one window of {seq_len}; give more text")
    n = n if limit is None else min(n, limit)
    return tokens[: n * seq_len].view(n, seq_len)


def bytes_per_token(windows: Int64[Tensor, "n S"], tokenizer: "PreTrainedTokenizerBase") -> float:
    """Mean UTF-8 bytes of text behind one token of these windows (special tokens stand for none)."""
    text = tokenizer.decode(windows.flatten(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode()) / windows.numel()  # str(): decode is typed for batches too


def bos_rule(tokens: Int64[Tensor, "N"], tokenizer: "PreTrainedTokenizerBase") -> str:
    """How the stream begins, in words for the record: the papers' protocol has at most one BOS, at the very start."""
    begins = len(tokens) > 0 and int(tokens[0]) == tokenizer.bos_token_id
    return "once, at the start of the text" if begins else "none"
