"""Single pieces of a run, each measured alone: the numbers of docs/performance.md that are not those of whole runs.

    python benchmarks/pieces.py solves          every layer solver on the matrices of the whole model, one thread
    python benchmarks/pieces.py load            reading the GGUF file
    python benchmarks/pieces.py evaluate        perplexity of one window of 2048 tokens, one thread
    python benchmarks/pieces.py block           one block by SparseGPT and by the default, 16 x 2048 tokens, by stage
    python benchmarks/pieces.py inspect DIR     memory that inspecting DIR takes above what the process began with
    python benchmarks/pieces.py keep            making one finished block and its hidden states durable
    python benchmarks/pieces.py chaos           what rounding noise in the embedding does to masks and perplexity
    python benchmarks/pieces.py vocabulary      peak memory of the distillation loss at 128,256 words
    python benchmarks/pieces.py ninety          methods of sparse training at 90 %, a model of 260K weights, 200 steps
    python benchmarks/pieces.py branches        what low-rank branches give back at 60 %, a model of 260K weights
    python benchmarks/pieces.py balance         perplexity of static int8 by how much of the activations' size moves
    python benchmarks/pieces.py taper           perplexity at 70 % by how much sparser late blocks are, text of train/
    python benchmarks/pieces.py profile DIR     seconds by stage of the run that wrote DIR, from its records

The model is SmolLM2-135M-Instruct (``demo``); texts are found through SECATEUR_DATA. To be run on an idle machine, one
at a time. Every measurement is a line of JSON; "s" are seconds of the clock, "cpu_s" of the processor.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur import PruneConfig, TrainConfig, prune, train
from secateur.core.losses import Distillation, distill
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.data.sources import read_texts
from secateur.data.tokens import eval_windows, sample_windows, tokenize
from secateur.evaluation.inspect import inspect
from secateur.evaluation.perplexity import evaluate_text, window_losses
from secateur.export.int8 import calibrate, to_int8
from secateur.models.adapter import DecoderAdapter
from secateur.models.durable import durable
from secateur.models.load import load

DATA = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data")
CALIBRATION, WIKITEXT = DATA / "calib" / "c4_en_train_1200.jsonl", DATA / "ppl" / "wikitext2_raw_test.txt"
BLOCKS, STACKED = 30, ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Of SmolLM2-135M: q, k, v; o; gate and up; down, as (R, C), linears of one input stacked."""
PATTERNS: dict[str, Pattern] = {"70%": Unstructured(0.7), "2:4": NM(2, 4)}
BY_NAME: dict[str, Solver] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT(), "admm": ADMM()}
NOISE = (0.0, 1e-6, 1e-5, 1e-3)
"""Relative changes of the embedding."""
WORDS, WIDTHS, LENGTHS = 128_256, (64, 576), (512, 1024, 2048)
"""Llama 3's vocabulary, hidden sizes, and tokens of a batch."""
STORIES = DATA / "models" / "stories260k", DATA / "train" / "tinystories_sample.jsonl"
FISHER: dict[str, Any] = {"method": "admm", "metric": "fisher"}
NINETY: dict[str, dict[str, Any]] = {
    "fixed": {"method": "fixed"},
    "ast_g": {"method": "ast_g"},
    "admm, fisher, c 3": FISHER,
    "admm, fisher, c 30": FISHER | {"c": 30.0},
    "admm, magnitude, c 30": {"method": "admm", "c": 30.0},
    "admm, fisher, c 100": FISHER | {"c": 100.0},
    "admm, fisher, c 100, frozen at half": FISHER | {"c": 100.0, "freeze": 0.5},
}
CHUNKS = {"at once": 0, "chunk 1024": 1024, "chunk 128": 128}
"""0: logits of all tokens and plain torch, as the formula reads."""
Lines = Iterator[dict[str, Any]]


def solves() -> Lines:
    """Random weights and inputs: what a solve takes does not depend on them."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    problems = []
    for R, C in STACKED:
        X = torch.randn(4 * C, C, generator=generator)
        needs = {"nothing": torch.ones(C), "diag": X.square().mean(0), "gram": X.T @ X / len(X)}
        problems.append((torch.randn(R, C, generator=generator), needs))
    for method, solver in BY_NAME.items():
        for name, pattern in PATTERNS.items():
            start = time.perf_counter()
            for W, moments in problems:
                solver.solve(W, moments[solver.needs], pattern)
            yield {"solver": method, "pattern": name, "s": BLOCKS * (time.perf_counter() - start)}


def loading() -> Lines:
    cpu, clock = time.process_time(), time.perf_counter()
    load("demo")
    yield {"s": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu}


def evaluating() -> Lines:
    torch.set_num_threads(1)
    dense, text, windows = load("demo"), read_texts(str(WIKITEXT), "evaluation"), 4
    before = resource.getrusage(resource.RUSAGE_SELF)
    for count in (1, windows):  # the first one warms up
        before = resource.getrusage(resource.RUSAGE_SELF)
        evaluate_text(dense.model, dense.tokenizer, text, seq_len=2048, limit=count, autocast=torch.bfloat16)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    yield {"cpu_s": cpu / windows, "faults": (after.ru_minflt - before.ru_minflt) / windows}


def blocks() -> Lines:
    dense = load("demo")
    for method in (SparseGPT(), SparseLLM()):
        config = PruneConfig(method, 0.7, samples=16, blocks="0:2")
        result = prune(copy.deepcopy(dense.model), config, data=str(CALIBRATION), tokenizer=dense.tokenizer)
        record = result.records[1]  # block 0 warmed up
        yield {"method": type(method).__name__, "s": record.seconds, **record.stages}


def inspecting(directory: str) -> Lines:
    before = peak()
    inspect(directory)
    yield {"MB_above_start": (peak() - before) / 1e6}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keeping() -> Lines:
    """75 MB of hidden states and 14 MB of weights, written as ``pruning.workdir`` writes them."""
    from safetensors.torch import save_file

    tensors = {"hidden": torch.randn(16, 2048, 576), "weights": torch.randn(sum(R * C for R, C in STACKED))}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, tensor in tensors.items():
            start = time.perf_counter()
            durable(Path(folder) / name, lambda path, tensor=tensor: save_file({"x": tensor}, path))
            yield {"what": name, "MB": tensor.nbytes / 1e6, "s": time.perf_counter() - start}


def chaos() -> Lines:
    """At 70 %, 2 x 512 tokens: masks of the last block against those without noise, perplexity on 8 windows of 512."""
    dense, text = load("demo"), read_texts(str(WIKITEXT), "evaluation")
    for method in ("wanda", "sparsegpt"):
        masks: list[Tensor] = []
        for noise in NOISE:
            model = copy.deepcopy(dense.model)
            with torch.no_grad():
                embedding: Any = model.get_input_embeddings().weight
                embedding *= 1 + noise * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
            config = PruneConfig(BY_NAME[method], 0.7, samples=2, seq_len=512)
            prune(model, config, data=str(CALIBRATION), tokenizer=dense.tokenizer)
            adapter = DecoderAdapter(model)
            last = adapter.linears(adapter.blocks[-1]).values()
            masks.append(torch.cat([(linear.weight != 0).flatten() for linear in last]))
            changed = float((masks[-1] != masks[0]).float().mean())
            ppl = evaluate_text(model, dense.tokenizer, text, seq_len=512, limit=8).ppl
            yield {"method": method, "noise": noise, "changed": changed, "ppl": ppl}


def vocabulary() -> Lines:
    """Every case in a process of its own, since a peak never falls."""
    for D in WIDTHS:
        for T in LENGTHS:
            for way, chunk in CHUNKS.items():
                call = f"import pieces; print(*pieces.loss_memory({D}, {T}, {chunk}))"
                command = [sys.executable, "-c", call]
                ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
                above, seconds, loss = map(float, ran.stdout.split())
                yield {"hidden": D, "tokens": T, "way": way, "MB_above_start": above / 1e6, "s": seconds, "loss": loss}


def loss_memory(D: int, T: int, chunk: int) -> tuple[int, float, float]:
    """Peak memory of loss and gradients above that of hidden states and heads, seconds, and the loss. One thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(WORDS, D, generator=generator) / D**0.5 for _ in range(2))
    hidden = torch.randn(T, D, generator=generator).requires_grad_()
    targets = torch.randint(WORDS, (T,), generator=generator)
    student.requires_grad_()
    _loss(hidden[:8], student, teacher, targets[:8], chunk).backward()  # whatever is loaded at the first call
    before, start = peak(), time.perf_counter()
    loss = _loss(hidden, student, teacher, targets, chunk)
    loss.backward()
    return peak() - before, time.perf_counter() - start, loss.item()


def _loss(hidden: Tensor, student: Tensor, teacher: Tensor, targets: Tensor, chunk: int) -> Tensor:
    options = Distillation(chunk=max(chunk, 1))
    if chunk:
        head, taught = (lambda x: x @ student.T), (lambda i, j: hidden[i:j].detach() @ teacher.T)
        return distill(hidden, head, targets, taught, options).total
    logits, wanted, T = hidden @ student.T, hidden.detach() @ teacher.T, options.temperature
    apart = functional.kl_div(
        (logits / T).log_softmax(-1), (wanted / T).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return options.alpha * T**2 * apart + (1 - options.alpha) * functional.cross_entropy(logits, targets)


def ninety() -> Lines:
    """Divergence from the dense model on held-out windows; one thread."""
    torch.set_num_threads(1)
    model, text = STORIES
    shared: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.9, "lr": 3e-3, "tokens": 204_800, "seq_len": 256}
    shared |= {"batch": 4, "micro_batch": 4, "holdout": 16, "data": (str(text),)}
    for name, options in NINETY.items():
        with tempfile.TemporaryDirectory() as folder:
            report = train(model, TrainConfig(**{**shared, **options}), out=Path(folder) / "out").report
        told = {key: report["held_out"]["after"][key] for key in ("divergence", "cross_entropy")}
        yield {"method": name, **told, "flip_rate": report["flip_rate"]}


def branches() -> Lines:
    """Mean output error of a block and divergence from the dense model, 24 x 128 held-out tokens, means of 3 seeds."""
    torch.set_num_threads(1)
    dense, lines = load(str(STORIES[0])), STORIES[1].read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    with tempfile.TemporaryDirectory() as folder:
        shown, held = Path(folder) / "shown.jsonl", Path(folder) / "held.jsonl"
        shown.write_text("".join(lines[:cut]), encoding="utf-8")
        held.write_text("".join(lines[cut:]), encoding="utf-8")
        windows = eval_windows(tokenize(read_texts(str(held), "evaluation"), dense.tokenizer), 128, 24)
        wanted = dense.model(windows).logits.log_softmax(-1)
        for method in (SparseGPT(), SparseLLM()):
            for rank in (0, 8):
                found = []
                for seed in range(3):
                    config = PruneConfig(method, 0.6, samples=16, seq_len=128, seed=seed, low_rank=rank)
                    made = prune(copy.deepcopy(dense.model), config, data=str(shown), tokenizer=dense.tokenizer)
                    logits = made.model(windows).logits.log_softmax(-1)
                    apart = functional.kl_div(logits, wanted, log_target=True, reduction="sum") / windows.numel()
                    found.append((made.report["output_error"]["mean"], float(apart)))
                error, divergence = (sum(values) / len(found) for values in zip(*found, strict=True))
                yield {"method": type(method).__name__, "rank": rank, "output_error": error, "divergence": divergence}


def balance() -> Lines:
    """16 x 256 tokens of the embedded text to calibrate on, 6 x 256 to measure on."""
    dense = load("demo")
    tokens, held = (tokenize(read_texts("embedded", part), dense.tokenizer) for part in ("calibration", "evaluation"))
    windows = eval_windows(held, 256, 6)
    generator = torch.Generator().manual_seed(0)
    seen = calibrate(dense.model, sample_windows(tokens, 16, 256, generator).split(1))
    for share in (None, 0.0, 0.5, 0.7, 0.8, 0.85):
        model = copy.deepcopy(dense.model)
        if share is not None:
            to_int8(model, seen, share)
        losses = torch.cat([window_losses(model, ids) for ids in windows.split(1)])
        yield {"share": share, "ppl": float(losses.mean().exp())}


def taper() -> Lines:
    """6 x 1024 tokens of C4 to calibrate on, 8 x 1024 of Common Crawl to measure on; one thread."""
    torch.set_num_threads(1)
    dense, held = load("demo"), read_texts(str(DATA / "train" / "commoncrawl_dclm_sample.jsonl"), "calibration")
    for method, tapers in ((SparseGPT(), (0.0, 0.08, 0.12, 0.16)), (SparseLLM(), (0.0, 0.08))):
        for value in tapers:
            config = PruneConfig(method, 0.7, taper=value, data=str(CALIBRATION), samples=6, seq_len=1024)
            made = prune(copy.deepcopy(dense.model), config, tokenizer=dense.tokenizer).model
            found = evaluate_text(made, dense.tokenizer, held, seq_len=1024, limit=8, autocast=torch.bfloat16)
            yield {"method": type(method).__name__, "taper": value, "ppl": found.ppl}


def profile(directory: str) -> Lines:
    lines = (Path(directory) / "secateur" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    stages: dict[str, float] = defaultdict(float)
    for record in map(json.loads, lines):
        for name, seconds in {**record["stages"], "block": record["seconds"]}.items():
            stages[name] += seconds
    yield dict(stages)


PIECES: dict[str, Callable[..., Lines]] = {
    "solves": solves,
    "load": loading,
    "evaluate": evaluating,
    "block": blocks,
    "inspect": inspecting,
    "keep": keeping,
    "chaos": chaos,
    "vocabulary": vocabulary,
    "ninety": ninety,
    "branches": branches,
    "balance": balance,
    "taper": taper,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=list(PIECES))
    parser.add_argument("directory", nargs="?")
    args = parser.parse_args()
    for line in PIECES[args.piece](*([args.directory] if args.directory else [])):
        print(json.dumps({"piece": args.piece, **line}), flush=True)


if __name__ == "__main__":
    main()
