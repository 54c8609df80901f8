"""Sparse training of SmolLM2-135M-Instruct at one budget of tokens: the numbers of docs/results.md.

    python benchmarks/training.py run [--only REGEX] [--part 1/2]    resumable: finished cases are skipped
    python benchmarks/training.py table
    python benchmarks/training.py plot                               docs/training.svg, from the results
    python benchmarks/training.py speed                             a step of sparse training against an ordinary one

Every case starts from the same one-shot model at its pattern (the default method, 16 x 2048 of C4, seed 0), or from
the dense model ("cold"), and distils the dense model on train/ (OpenWebText, Common Crawl, Wikipedia, books), windows
of 512 tokens, 4 a step. Perplexity as in benchmarks/quality.py: 2048 tokens, 40 windows of WikiText-2 and 20 of C4.
"tune" cases are short and are judged by held-out windows of the training text alone; the others take the best rates.
Texts are found through SECATEUR_DATA. Every finished case is one line of benchmarks/results/training.jsonl.
"""

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = Path(os.environ.get("SECATEUR_DATA") or HERE.parent.parent / "shared" / "data")
RESULTS, OUT = HERE / "results" / "training.jsonl", HERE / "out" / "training"
TEXTS = ("openwebtext_sample", "commoncrawl_dclm_sample", "wikipedia_en_sample", "gutenberg_books")
CALIBRATION = DATA / "calib" / "c4_en_train_1200.jsonl"
EVALUATION = {
    "wikitext2": (DATA / "ppl" / "wikitext2_raw_test.txt", 40),
    "c4": (DATA / "ppl" / "c4_en_validation_200.jsonl", 20),
}
TOKENS, SHORT = 150_000, 40_960
SHARED: dict[str, Any] = {"seq_len": 512, "batch": 4, "micro_batch": 2, "holdout": 16, "checkpoint": 20}
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "70%": {"pattern": "unstructured", "sparsity": 0.7},
    "80%": {"pattern": "unstructured", "sparsity": 0.8},
}
MATCH = math.sqrt(1.9 / 0.1)
"""By how much ``ast`` as published steps further than AdamW at one rate (core/sparse_adamw.py); cast likewise."""
RATES = (1e-4, 3e-4, 1e-3)
"""AdamW's, tried at the short budget; ``ast`` is tried, and run, at these over MATCH."""
LR = 3e-4
"""The best of them."""


def lr_of(method: str, lr: float) -> float:
    return lr / MATCH if method in ("ast", "cast") else lr


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    name: str
    pattern: str
    seed: int = 0
    start: str = "one-shot"
    """"one-shot" or "cold"."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Of TrainConfig; empty where nothing is trained."""

    @property
    def key(self) -> str:
        return f"{self.name} | {self.pattern} | seed {self.seed}"


def cases() -> Iterator[Case]:
    """All, the most telling first."""
    yield Case("dense", "dense")
    for lr in RATES:
        for method in ("fixed", "ast"):
            yield Case(
                f"tune {method} {lr:g}", "2:4", options={"lr": lr_of(method, lr), "method": method, "tokens": SHORT}
            )
    yield Case("one-shot", "2:4")
    for method in ("fixed", "ast", "cast", "ast_g"):
        yield trained(method)
    yield trained("ast", "ast, 300k tokens", tokens=2 * TOKENS)
    yield trained("ast", "ast, slorb 16", slorb=16)
    yield trained("fixed", "fixed, lora 16", lora=16)
    for method in ("fixed", "ast"):
        yield trained(method, seed=1)
    for pattern in ("70%", "80%"):
        yield Case("one-shot", pattern)
        yield trained("ast", pattern=pattern)
        yield trained("ast", "ast, cold", pattern=pattern, start="cold")
        for start, name in (("one-shot", "admm"), ("cold", "admm, cold")):
            yield trained("admm", name, pattern=pattern, start=start, metric="fisher", c=30.0)


def trained(
    method: str, name: str = "", *, pattern: str = "2:4", seed: int = 0, start: str = "one-shot", **more: Any
) -> Case:
    return Case(name or method, pattern, seed, start, {"method": method, "lr": lr_of(method, LR), **more})


def one_shot(pattern: str) -> Path:
    """The pruned model that a pattern's cases start from; made where it is not there yet."""
    from secateur import PruneConfig, prune

    place = OUT / f"one-shot {pattern}"
    if not (place / "config.json").exists():
        prune("demo", PruneConfig(**PATTERNS[pattern], data=str(CALIBRATION), samples=16), out=place, resume=True)
    return place


def made(case: Case) -> tuple[str, dict[str, Any]]:
    """Where the case's model is, and what its training reports."""
    from secateur import TrainConfig, train

    if case.pattern == "dense":
        return "demo", {}
    if not case.options:
        return str(one_shot(case.pattern)), {}
    student = "demo" if case.start == "cold" else str(one_shot(case.pattern))
    data = tuple(str(DATA / "train" / f"{text}.jsonl") for text in TEXTS)
    options = {"tokens": TOKENS, **SHARED, **PATTERNS[case.pattern], **case.options}
    place = OUT / case.key.replace(" | ", ", ")
    result = train(student, TrainConfig(data=data, seed=case.seed, **options), teacher="demo", out=place, resume=True)
    report = result.report
    kept = (
        "held_out",
        "flip_rate",
        "tokens",
        "epochs",
        "tokens_per_second",
        "seconds",
        "peak_memory_bytes",
        "warnings",
        "low_rank",
    )
    recipe = {key: value for key, value in report["recipe"].items() if key != "data"}
    curve = [[round(record.divergence, 5), round(record.flip_rate, 7)] for record in result.records]
    told = {key: report[key] for key in kept}
    return str(place), {"recipe": recipe, **told, "curve": curve, "versions": report["versions"]}


def measured(source: str) -> dict[str, Any]:
    """Perplexity on both texts."""
    import torch

    from secateur.data.sources import read_texts
    from secateur.evaluation.perplexity import evaluate_text
    from secateur.models.load import load

    loaded, row = load(source, codes=True), {}
    for name, (path, windows) in EVALUATION.items():
        found = evaluate_text(
            loaded.model, loaded.tokenizer, read_texts(str(path), "evaluation"), seq_len=2048, limit=windows,
            autocast=torch.bfloat16,
        )  # fmt: skip
        row[name] = {"ppl": found.ppl, "window_nll": [round(nll, 5) for nll in found.window_nll]}
    return row


def finished() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else ()
    return {row["key"]: row for row in map(json.loads, lines)}


def run(only: str, part: str) -> None:
    index, parts = map(int, part.split("/"))
    todo = [case for case in cases() if re.search(only, case.key) and case.key not in finished()][index - 1 :: parts]
    for number, case in enumerate(todo, 1):
        start = time.perf_counter()
        source, report = made(case)
        tuning = case.name.startswith("tune")
        row = {"key": case.key, "report": report, **({} if tuning else measured(source))}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if case.options:
            shutil.rmtree(source)
        told = report["held_out"]["after"] if tuning else {name: round(row[name]["ppl"], 2) for name in EVALUATION}
        print(f"[{number}/{len(todo)}] {case.key}: {told}, {time.perf_counter() - start:.0f} s", flush=True)


def table() -> None:
    """Perplexities, the share of the one-shot gap that is closed, and what the held-out windows say."""
    done = finished()
    dense = done.get("dense | dense | seed 0")
    print("| case | WikiText-2 | C4 | gap closed | held out, divergence | flips | tokens/s |\n| --- |" + " ---: |" * 6)
    for key, row in done.items():
        report = row["report"]
        cells = [f"{row[name]['ppl']:.1f}" if name in row else "" for name in EVALUATION]
        cells.append(closed(row, done.get(f"one-shot | {key.split(' | ')[1]} | seed 0"), dense))
        if report:
            there = report["held_out"]
            cells.append(f"{there['before']['divergence']:.3f} -> {there['after']['divergence']:.3f}")
            cells += [f"{report['flip_rate']:.1e}", f"{report['tokens_per_second']:.0f}"]
        print(f"| {key} | " + " | ".join(cells) + " |")


def closed(row: dict[str, Any], start: dict[str, Any] | None, dense: dict[str, Any] | None) -> str:
    """Share of ln(one-shot / dense) that training won back, on each text."""
    if not start or not dense or row is start or "c4" not in row:
        return ""
    shares = []
    for name in EVALUATION:
        whole = math.log(start[name]["ppl"] / dense[name]["ppl"])
        shares.append(f"{math.log(start[name]['ppl'] / row[name]['ppl']) / whole:.0%}")
    return ", ".join(shares)


def plot() -> None:
    """What the steps of the 2:4 runs said: the loss to the teacher, and how many of the masks moved."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"  # the same file every time
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5))
    for key, row in finished().items():
        name, pattern, seed = key.split(" | ")
        if pattern != "2:4" or seed != "seed 0" or "curve" not in row["report"] or name.startswith("tune"):
            continue
        tokens = [
            step * SHARED["batch"] * SHARED["seq_len"] / 1e3 for step in range(1, len(row["report"]["curve"]) + 1)
        ]
        divergence, flips = zip(*row["report"]["curve"], strict=True)
        above.plot(tokens, smooth(divergence), label=name)
        if any(flips):
            below.plot(tokens, flips, label=name)
    above.set_ylabel("divergence to the teacher, nats")
    below.set_ylabel("share of masks moved\nat the last refresh")
    below.set_xlabel("thousand tokens")
    below.set_yscale("log")
    above.legend()
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "training.svg", metadata={"Date": None})


def smooth(values: tuple[float, ...], width: int = 9) -> list[float]:
    """Means of ``width`` steps around each one: batches are small."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def speed() -> None:
    """Seconds of ten steps of each kind, on the demo's model."""
    from secateur.models.load import load

    dense = load("demo").model
    print(json.dumps(steps(dense, "cpu", SHARED["batch"], SHARED["micro_batch"], SHARED["seq_len"])))


def steps(dense: Any, device: str, rows: int, micro: int, seq_len: int, words: int = 49_000) -> dict[str, float]:
    """Medians of ten steps, taken in turns: sparse training (ast, 2:4), and torch's AdamW on the dense model."""
    import copy
    import statistics

    import torch

    from secateur.core.losses import Distillation
    from secateur.core.pattern import NM
    from secateur.core.sparse_adamw import Schedule
    from secateur.training import SparseAdamW
    from secateur.training.learner import Learner, ModelTeacher

    teacher = ModelTeacher(copy.deepcopy(dense).to(device, torch.bfloat16))
    ids = torch.randint(words, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {"sparse": [], "ordinary": []}
    takers = {}
    for kind in seconds:
        model = copy.deepcopy(dense).to(device).requires_grad_(True).train()
        learner = Learner(model, teacher, Distillation(), torch.bfloat16)
        matrices = [p for name, p in model.named_parameters() if "proj" in name]
        others = [p for name, p in model.named_parameters() if "proj" not in name]
        groups = [{"params": matrices, "pattern": NM(2, 4)}, {"params": others}]
        sparse = SparseAdamW(groups, schedule=Schedule(steps=1000)) if kind == "sparse" else None
        takers[kind] = (learner, sparse or torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0))
    for _ in range(11):
        for kind, (learner, optimizer) in takers.items():
            start = clock(device)
            for part in ids.split(micro):
                (learner(part).total * len(part) / rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[kind].append(clock(device) - start)
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    return {**medians, "ratio": medians["sparse"] / medians["ordinary"]}


def clock(device: str) -> float:
    """Seconds, when what was asked of the device is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "plot", "speed"))
    parser.add_argument("--only", default="", help="cases whose key matches this regular expression")
    parser.add_argument("--part", default="1/1", help="of the cases to do, every second one: 1/2, and 2/2 beside it")
    args = parser.parse_args()
    match args.what:
        case "run":
            run(args.only, args.part)
        case "table":
            table()
        case "plot":
            plot()
        case _:
            speed()


if __name__ == "__main__":
    main()
