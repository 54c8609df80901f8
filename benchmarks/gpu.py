"""What only a GPU can tell: lines of JSON for docs/results.md and docs/performance.md.

    python benchmarks/gpu.py sparse      2:4 against dense: the linears of Llamas of 1 and 7 billion, by tokens at once
    python benchmarks/gpu.py train       steps of sparse training beside ordinary ones, a Llama of 1.1e9 random weights
    python benchmarks/gpu.py prune       seconds and memory of one block of a Llama of 7 billion, by method
    --device cpu --tiny                  the same with next to nothing, to see that it runs

Weights and tokens are random, as what is measured is speed. "share" is that of the card's own rate in a product of two
large 16-bit matrices, measured in the same run; a token costs 6 operations a weight in the student, 2 in the teacher.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from training import clock, steps

from secateur.config import method_from_dict
from secateur.core.pattern import NM, keep_mask
from secateur.models.adapter import DecoderAdapter
from secateur.models.sparse24_loader import INT8, Codes, forms_here, measured, time_on_gpu
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import select

LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
TOKENS = (1, 16, 256, 2048, 8192)
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "sparsellm")
SAMPLES, SEQ_LEN = 128, 2048


def llama(name: str, layers: int, words: int) -> Any:
    """Random, in bfloat16, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=words, max_position_embeddings=4096, tie_word_embeddings=True,
        **LLAMAS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


# ---- sparse


def timer(device: str) -> Callable[..., float]:
    """Milliseconds of a call on its inputs; on a CPU, where there is nothing to learn, of the first."""

    def once(f: Callable[..., Any], *args: Any) -> float:
        start = clock(device)
        f(*args)
        return 1000 * (clock(device) - start)

    return time_on_gpu if device == "cuda" else once


def sparse(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds of every form, for 16-bit and for int8 weights."""
    for model in ("tiny",) if tiny else ("1B", "7B"):
        H, K = LLAMAS[model]["hidden_size"], LLAMAS[model]["intermediate_size"]
        for R, C in ((H, H), (K, H), (H, K)):
            linear = nn.Linear(C, R, bias=False, dtype=torch.bfloat16).requires_grad_(False)
            linear.weight *= keep_mask(linear.weight.abs(), NM(2, 4))
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            rounded = (linear.weight.float() / scale.float()).round().clamp(-127, 127)
            codes = Codes(rounded.to(torch.int8).to(device), scale.to(device))
            for tokens in TOKENS[:2] if tiny else TOKENS:
                for held, name in ((None, "16 bit"), (codes, "int8")):
                    here = forms_here(held is not None)
                    forms = {key: form for key, form in here.items() if device == "cuda" or form is INT8["int8"]}
                    ms, failed = measured(linear.to(device), held, tokens, forms, timer(device))
                    yield {"model": model, "R": R, "C": C, "tokens": tokens, "weights": name, "ms": ms, "no": failed}


# ---- train


def train(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Seconds of a step, and the share of the card's rate."""
    model = llama("tiny", 2, 128) if tiny else llama("1B", 22, 32_000)
    weights, (rows, micro, length) = sum(p.numel() for p in model.parameters()), (2, 1, 32) if tiny else (16, 4, 2048)
    found = steps(model, device, rows, micro, length, words=model.config.vocab_size)
    rate, tokens = rate_of(device, 64 if tiny else 8192), rows * length
    shares = {kind: 8 * weights * tokens / found[kind] / rate for kind in ("sparse", "ordinary")}
    yield {"weights": weights, "tokens": tokens, "seconds": found, "rate": rate, "share": shares, **memory(device)}


def rate_of(device: str, n: int) -> float:
    """Operations a second in a product of two n x n matrices in bfloat16."""
    A = torch.randn(n, n).to(device, torch.bfloat16)
    return 2 * n**3 / (timer(device)(torch.matmul, A, A) / 1000)


def memory(device: str) -> dict[str, float]:
    return {"GB": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {}


# ---- prune


def prune(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Seconds of one block and, on a GPU, the most memory that its tensors took."""
    rows = torch.randint(100, (2, 64) if tiny else (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        model = llama("tiny" if tiny else "7B", 1, 128)
        adapter = DecoderAdapter(model)
        options = RunOptions(device=device, batch=1 if tiny else 8, precision="bfloat16")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        (done,) = prune_blocks(
            adapter, rows, select(adapter, NM(2, 4), range(1)).plan, method_from_dict(method), options
        )
        told = {"seconds": done.record.seconds, "stages": done.record.stages}
        yield {"method": method, "tokens": rows.numel(), **told, **memory(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sparse", "train", "prune"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    for line in {"sparse": sparse, "train": train, "prune": prune}[args.what](args.device, args.tiny):
        print(json.dumps({"card": card, "torch": torch.__version__, **line}), flush=True)


if __name__ == "__main__":
    main()
