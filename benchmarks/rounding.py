"""What AWQ's scaling adds to scales of least error, on the real inputs of real weights: the table of docs/quantize.md.

    python benchmarks/rounding.py --data c4 --blocks 0 14 29       SmolLM2-135M-Instruct (``demo``)

For each scheme, the output energy lost (``relative_error``, mean over the linears of these blocks) by rounding to
nearest on the scales of least weight error, the same after AWQ's search (arXiv:2306.00978), on scales where an input
counts by its second moment, those after AWQ, and by GPTQ without and with it. s is any number, or with ``--twos`` a
power of two; every linear has its own, which is more than norms can fold. ``--zeros`` prunes to 2:4 first.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.core.balance import power_of_two
from secateur.core.grid import Scheme, fit_grid, on_grid
from secateur.core.moments import Gram
from secateur.core.pattern import NM, Unstructured
from secateur.core.quantizers import GPTQ
from secateur.core.solver import relative_error
from secateur.core.solvers import SparseGPT
from secateur.data.sources import read_texts
from secateur.data.tokens import sample_windows, tokenize
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import load

STRENGTHS = torch.linspace(0, 1, 11).tolist()
SCHEMES = (Scheme(4, 64, scales=torch.bfloat16), Scheme(3, 64, scales=torch.bfloat16))
Rounded = Callable[[Tensor], Tensor]


def awq(W: Tensor, H: Tensor, rounded: Rounded, twos: bool) -> Tensor:
    """The s after which ``rounded(s)`` loses least, of powers of the inputs' size."""
    size = H.diagonal().sqrt().clamp(min=1e-6)
    tried = [s / (s.max() * s.min()).sqrt() for s in (size.pow(strength) for strength in STRENGTHS)]
    return min((power_of_two(s) if twos else s for s in tried), key=lambda s: relative_error(W, rounded(s), H))


def losses(W0: Tensor, H: Tensor, scheme: Scheme, zeros: bool, twos: bool) -> dict[str, float]:
    W = SparseGPT().solve(W0, H, NM(2, 4)).W if zeros else W0

    def nearest(s: Tensor) -> Tensor:
        return on_grid(W * s, fit_grid(W * s, scheme), scheme) / s

    def weighted(s: Tensor) -> Tensor:
        return on_grid(W * s, fit_grid(W * s, scheme, H.diagonal() / s.square()), scheme) / s

    def gptq(s: Tensor) -> Tensor:
        return GPTQ(scheme).solve(W * s, H / torch.outer(s, s), Unstructured(0.0)).W / s

    one = torch.ones(W.shape[1])
    made = {
        "nearest": nearest(one), "nearest, awq": nearest(awq(W, H, nearest, twos)),
        "weighted": weighted(one), "weighted, awq": weighted(awq(W, H, weighted, twos)),
        "gptq": gptq(one), "gptq, awq": gptq(awq(W, H, weighted, twos)),
    }  # fmt: skip
    return {name: relative_error(W, new, H) for name, new in made.items()}


def adding(gram: Gram) -> Callable[..., None]:
    return lambda _, args: gram.update(args[0])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 14, 29])
    parser.add_argument("--zeros", action="store_true")
    parser.add_argument("--twos", action="store_true")
    options = parser.parse_args()
    loaded = load(options.model)
    adapter = DecoderAdapter(loaded.model)
    tokens = tokenize(read_texts(options.data, "calibration"), loaded.tokenizer)
    windows = sample_windows(tokens, 8, 512, torch.Generator().manual_seed(0))
    grams: dict[str, Gram] = {}
    linears = {
        f"{adapter.block_names[i]}.{name}": linear
        for i in options.blocks
        for name, linear in adapter.linears(adapter.blocks[i]).items()
    }
    for name, linear in linears.items():
        grams[name] = Gram.zeros(adapter.shape(linear)[1])
        linear.register_forward_pre_hook(adding(grams[name]))
    for row in windows:
        loaded.model(row[None])
    for scheme in SCHEMES:
        rows = [
            losses(adapter.read(one), grams[name].mean(), scheme, options.zeros, options.twos)
            for name, one in linears.items()
        ]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        told = {
            "scheme": scheme.words(),
            "zeros": options.zeros,
            "twos": options.twos,
            **{key: round(x, 5) for key, x in mean.items()},
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
