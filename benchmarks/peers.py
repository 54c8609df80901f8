"""Secateur against llm-compressor: same model, calibration rows, machine and threads; every run in its own process.

    python benchmarks/peers.py [--rows 16 --seq-len 2048 --sparsity 0.7 --rounds 2] [--data FILE] [--eval-data FILE]

Runs are interleaved (every contestant once per round, the order turned round by round), so that a slow hour of the
machine hits all of them. llm-compressor lives in an environment of its own, benchmarks/.peers-venv, made on first use.
Each finished run is one line of benchmarks/out/peers.jsonl; a second call goes on where the first one stopped.

Fairness. Both sides read one float32 Hugging Face directory and prune every linear of the decoder blocks, with their
own default damping and column blocks. The peer is handed the very token ids that ``secateur.prune`` draws for its seed.
"secateur-bf16" is the same run with bfloat16 products (``precision``), which llm-compressor offers only by storing the
weights in 16 bits. Wanda prunes per output row on both sides, as published.

"prune" is the time between a loaded model and a pruned one, "total" the whole process from start to saved directory
(ours also opens it again and verifies it); peak memory is the kernel's VmHWM of that process, imports included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
OUT = HERE / "out" / "peers"
LOG = HERE / "out" / "peers.jsonl"
PEER_VENV = HERE / ".peers-venv"
PEER_PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0.1")
CONTESTANTS: dict[str, tuple[str, Literal["float32", "bfloat16"]]] = {  # name -> (runner, precision of products)
    "secateur": ("ours", "float32"),
    "secateur-bf16": ("ours", "bfloat16"),
    "llm-compressor": ("theirs", "float32"),
}
WINDOWS = 8


# ---- the driver: standard library only, so that it holds no memory and imports nothing that it measures


def main() -> None:
    args = parse()
    if args.step:
        return STEPS[args.step](args)
    OUT.mkdir(parents=True, exist_ok=True)
    peer = peer_python()
    run_step(sys.executable, "prepare", args)
    finished = {key(line) for line in read_log()}
    for number in range(args.rounds):
        for method in args.methods:
            for contestant in turned(args.contestants, number):
                args.contestant, args.method, args.round = contestant, method, number
                if key(vars(args)) not in finished:
                    run_once(peer, args)
    print_table(args)


def parse() -> argparse.Namespace:
    data = Path(os.environ.get("SECATEUR_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description="Time and memory of SparseGPT and Wanda against llm-compressor.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--data", default=str(data / "calib" / "c4_en_train_1200.jsonl"))
    parser.add_argument("--eval-data", default=str(data / "ppl" / "wikitext2_raw_test.txt"))
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def peer_python() -> str:
    """llm-compressor's interpreter; its environment is made when it is missing."""
    python = PEER_VENV / "bin" / "python"
    if not (PEER_VENV / ".installed").exists():
        print(f"installing {' '.join(PEER_PACKAGES)} into {PEER_VENV}")
        subprocess.run([sys.executable, "-m", "venv", str(PEER_VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)
        (PEER_VENV / ".installed").touch()
    return str(python)


def run_once(peer: str, args: argparse.Namespace) -> None:
    """One contestant, then the perplexity of what it saved; one line into the log."""
    print(f"round {args.round + 1}: {args.contestant}, {args.method} ...", flush=True)
    runner, _ = CONTESTANTS[args.contestant]
    clear(args)
    started = time.monotonic()
    measured = run_step(peer if runner == "theirs" else sys.executable, runner, args)
    measured["total_seconds"] = time.monotonic() - started
    measured |= run_step(sys.executable, "evaluate", args)
    clear(args)
    line = {name: vars(args)[name] for name in (*SETTINGS, "contestant", "method", "round")} | measured
    with LOG.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def clear(args: argparse.Namespace) -> None:
    """Remove the output, and what a killed run left half written."""
    for old in (result_dir(args), *OUT.glob(f".{args.contestant}-{args.method}.*")):
        shutil.rmtree(old, ignore_errors=True)


def run_step(python: str, step: str, args: argparse.Namespace) -> dict[str, Any]:
    """This file again in a fresh process; its last line of output is a JSON object, all else goes into a log file."""
    options = {name: vars(args)[name] for name in (*SETTINGS, "contestant", "method", "round", "data", "eval_data")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent) if step != "theirs" else ""}
    command = [python, __file__, f"--step={step}", *flags]
    with (OUT / "last-step.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=Path.cwd())
    if done.returncode:
        raise SystemExit(f"step {step} of {args.contestant} failed, see {OUT / 'last-step.log'}")
    return json.loads(done.stdout.splitlines()[-1])


SETTINGS = ("model", "rows", "seq_len", "sparsity", "seed", "threads")


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in (*SETTINGS, "contestant", "method", "round"))


def turned(names: list[str], number: int) -> list[str]:
    start = number % len(names)
    return names[start:] + names[:start]


def read_log() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()] if LOG.exists() else []


def print_table(args: argparse.Namespace) -> None:
    lines = [line for line in read_log() if all(line[name] == vars(args)[name] for name in SETTINGS)]
    print(f"\n{'':<28}{'prune s':>10}{'total s':>10}{'peak MiB':>10}{'zeros':>8}{'ppl':>10}{'runs':>6}")
    for method in args.methods:
        for contestant in args.contestants:
            runs = [line for line in lines if line["contestant"] == contestant and line["method"] == method]
            if runs:
                print(f"{method + ', ' + contestant:<28}{row(runs)}{len(runs):>6}")


def row(runs: list[dict[str, Any]]) -> str:
    middle = {name: median(run[name] for run in runs) for name in ("prune_seconds", "total_seconds", "peak_mib")}
    return (
        f"{middle['prune_seconds']:>10.1f}{middle['total_seconds']:>10.1f}{middle['peak_mib']:>10.0f}"
        f"{runs[0]['zeros']:>8.2%}{runs[0]['perplexity']:>10.2f}"
    )


# ---- the steps: each in its own process


def model_dir(args: argparse.Namespace) -> Path:
    return OUT / "models" / Path(args.model).name


def rows_file(args: argparse.Namespace) -> Path:
    return OUT / f"rows-{Path(args.model).name}-{args.rows}x{args.seq_len}-seed{args.seed}.npy"


def result_dir(args: argparse.Namespace) -> Path:
    return OUT / f"{args.contestant}-{args.method}"


def peak_mib() -> float:
    """High-water mark of this process's resident memory, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def prepare(args: argparse.Namespace) -> None:
    """The model as a float32 directory, and the rows that ``secateur.prune`` will draw, for the other side."""
    import numpy
    import torch

    from secateur.data.sources import read_texts
    from secateur.data.tokens import sample_windows, tokenize
    from secateur.models.load import load
    from secateur.models.save import save

    folder = model_dir(args)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        loaded = load(args.model, dtype="float32")
        save(loaded.model, loaded.tokenizer, folder)
    if not rows_file(args).exists():
        tokens = tokenize(read_texts(args.data, "calibration"), load(str(folder)).tokenizer)
        generator = torch.Generator().manual_seed(args.seed)
        numpy.save(rows_file(args), sample_windows(tokens, args.rows, args.seq_len, generator=generator).numpy())
    print("{}")


def ours(args: argparse.Namespace) -> None:
    from secateur import PruneConfig, __version__, prune
    from secateur.config import METHODS

    config = PruneConfig(
        method=METHODS[args.method](),
        sparsity=args.sparsity,
        pattern="row" if args.method == "wanda" else "unstructured",
        samples=args.rows,
        seq_len=args.seq_len,
        seed=args.seed,
        device="cpu",
        precision=CONTESTANTS[args.contestant][1],
    )
    result = prune(str(model_dir(args)), config, data=args.data, out=result_dir(args))
    seconds = result.report["seconds"]["prune"]
    print(json.dumps({"prune_seconds": seconds, "peak_mib": peak_mib(), "version": __version__}))


def theirs(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    import numpy
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]  (in an environment of its own)
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
        WandaPruningModifier,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = numpy.load(rows_file(args)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * args.seq_len] * args.rows})
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    recipe = modifier(sparsity=args.sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    model = AutoModelForCausalLM.from_pretrained(model_dir(args), dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir(args))
    started = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=args.rows,
        max_seq_length=args.seq_len,
    )
    seconds = time.monotonic() - started
    model.save_pretrained(result_dir(args))
    tokenizer.save_pretrained(result_dir(args))
    print("\n" + json.dumps({"prune_seconds": seconds, "peak_mib": peak_mib(), "version": version("llmcompressor")}))


def evaluate(args: argparse.Namespace) -> None:
    """One ruler for both: zeros in the blocks' matrices, perplexity on the first windows of the evaluation text."""
    from secateur.data.sources import read_texts
    from secateur.evaluation.perplexity import evaluate_text
    from secateur.models.adapter import DecoderAdapter
    from secateur.models.load import load

    loaded = load(str(result_dir(args)), dtype="float32")
    adapter = DecoderAdapter(loaded.model)
    weights = [adapter.read(linear) for block in adapter.blocks for linear in adapter.linears(block).values()]
    zeros = sum((W == 0).sum().item() for W in weights) / sum(W.numel() for W in weights)
    texts = read_texts(args.eval_data, "evaluation")
    result = evaluate_text(loaded.model, loaded.tokenizer, texts, seq_len=args.seq_len, limit=WINDOWS)
    print(json.dumps({"zeros": zeros, "perplexity": result.ppl}))


STEPS = {"prepare": prepare, "ours": ours, "theirs": theirs, "evaluate": evaluate}

if __name__ == "__main__":
    main()
