"""Perplexity of every method at every sparsity on a real model: the numbers of docs/results.md.

    python benchmarks/quality.py run [--only TEXT] [--limit N]     resumable: finished cases are skipped
    python benchmarks/quality.py table                             the tables of docs/results.md, from what is finished

Protocol: SmolLM2-135M-Instruct (``demo``), calibration 16 x 2048 tokens of calib/c4_en_train_1200.jsonl drawn by the
seed, perplexity at 2048 on the first 40 windows of ppl/wikitext2_raw_test.txt and the first 20 of
ppl/c4_en_validation_200.jsonl, no overlap, float32 loss over bfloat16-autocast forwards (float32 forwards differ by
0.06 %, see docs/results.md). The texts are found through SECATEUR_DATA. Every finished case is one line of
benchmarks/results/quality.jsonl, with its recipe.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
DATA = Path(os.environ.get("SECATEUR_DATA") or HERE.parent.parent / "shared" / "data")
WIKITEXT, C4 = DATA / "ppl" / "wikitext2_raw_test.txt", DATA / "ppl" / "c4_en_validation_200.jsonl"
CALIBRATION = DATA / "calib" / "c4_en_train_1200.jsonl"
PATTERNS = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "80%": 0.8, "2:4": None}
METHODS = {
    "magnitude": "magnitude",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "admm": "admm",
    "paper (sparsegpt)": {"name": "sparsellm", "mode": "paper", "inner": "sparsegpt"},
    "closed (sparsegpt)": {"name": "sparsellm", "inner": "sparsegpt"},
    "closed (admm)": {"name": "sparsellm"},
    "closed (admm), no rounds": {"name": "sparsellm", "iterations": 1},
    "sparsegpt, float32 forwards": "sparsegpt",
}
ABLATIONS = {
    "closed (admm), no rounds": ("70%", "2:4", "50%"),
    "sparsegpt, float32 forwards": ("70%",),
}
"""Methods that are run at some patterns only."""
SEEDED = ("sparsegpt", "admm", "closed (sparsegpt)", "closed (admm)")


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    method: str
    pattern: str
    seed: int = 0
    windows: str = "40+20"
    """Evaluation windows: "40+20" on WikiText-2 and C4, or "all" of WikiText-2."""

    @property
    def key(self) -> str:
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.windows}"


def cases() -> Iterator[Case]:
    """All cases, the most telling first."""
    yield Case("dense", "0%")
    for pattern in ("70%", "2:4", "50%", "60%", "80%"):
        for method in METHODS:
            if pattern in ABLATIONS.get(method, PATTERNS):
                yield Case(method, pattern)
    for seed in (1, 2):
        for pattern in ("70%", "2:4"):
            for method in SEEDED:
                yield Case(method, pattern, seed)
    yield Case("dense", "0%", windows="all")


def finished() -> dict[str, dict]:
    """Results so far by key; a broken last line (a run that was killed while writing) is ignored."""
    results = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[row["key"]] = row
    return results


def run_case(case: Case) -> dict:
    """Prune, evaluate, describe."""
    import torch

    from secateur import PruneConfig, prune
    from secateur.config import method_from_dict
    from secateur.data.sources import read_texts
    from secateur.evaluation.perplexity import evaluate_text
    from secateur.models.load import load

    if case.method == "dense":
        loaded, report = load("demo"), {}
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        pattern = case.pattern if ":" in case.pattern else "unstructured"
        config = PruneConfig(
            method=method_from_dict(METHODS[case.method]),
            sparsity=PATTERNS[case.pattern],
            pattern=pattern,
            data=str(CALIBRATION),
            samples=16,
            seed=case.seed,
            precision="float32" if "float32" in case.method else "auto",
        )
        result = prune("demo", config)
        model, tokenizer, report = result.model, result.tokenizer, result.report
        report["recipe"]["data"] = CALIBRATION.name
    texts = (
        {"wikitext2": (WIKITEXT, 40), "c4": (C4, 20)} if case.windows == "40+20" else {"wikitext2": (WIKITEXT, None)}
    )
    row = {"key": case.key, **vars(case)}
    for name, (path, limit) in texts.items():
        start = time.perf_counter()
        measured = evaluate_text(
            model, tokenizer, read_texts(str(path), "evaluation"), seq_len=2048, limit=limit, autocast=torch.bfloat16
        )
        row[name] = {"ppl": measured.ppl, "windows": measured.windows, "seconds": time.perf_counter() - start}
    kept = (
        "recipe",
        "sparsity",
        "seconds",
        "peak_memory_bytes",
        "output_error",
        "dropped_rows",
        "warnings",
        "versions",
    )
    return row | {"report": {name: report[name] for name in kept if name in report}}


def run(only: str, limit: int | None) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    done = finished()
    todo = [case for case in cases() if only in case.key and case.key not in done][:limit]
    for number, case in enumerate(todo, 1):
        start = time.perf_counter()
        row = run_case(case)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        ppl = ", ".join(f"{name} {row[name]['ppl']:.2f}" for name in ("wikitext2", "c4") if name in row)
        print(f"[{number}/{len(todo)}] {case.key}: {ppl}, {time.perf_counter() - start:.0f} s", flush=True)


def table() -> None:
    done = finished()
    dense = done.get(Case("dense", "0%").key)
    for name, title in (("wikitext2", "WikiText-2, first 40 windows"), ("c4", "C4 validation, first 20 windows")):
        print(f"\n{title}" + (f"; dense {dense[name]['ppl']:.2f}" if dense else "") + "\n")
        print("| method | " + " | ".join(PATTERNS) + " |\n| --- |" + " ---: |" * len(PATTERNS))
        for method in METHODS:
            print(
                f"| {method} | " + " | ".join(cell(done, dense, method, pattern, name) for pattern in PATTERNS) + " |"
            )


def cell(done: dict, dense: dict | None, method: str, pattern: str, text: str) -> str:
    """Perplexity (mean ± spread over seeds), and the share of SparseGPT's log-perplexity gap of the same seed 0."""
    rows = [done.get(Case(method, pattern, seed).key) for seed in (0, 1, 2)]
    values = [row[text]["ppl"] for row in rows if row]
    if not values:
        return ""
    shown = f"{values[0]:.1f}" if values[0] < 1e4 else f"{values[0]:.1e}"
    if len(values) > 1:
        shown += f" (mean {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}, {len(values)} seeds)"
    base = done.get(Case("sparsegpt", pattern).key)
    if dense and base and method != "sparsegpt" and math.isfinite(values[0]):
        gap = math.log(values[0] / dense[text]["ppl"]) / math.log(base[text]["ppl"] / dense[text]["ppl"])
        shown += f" · {gap:.2f}"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", default="", help="cases whose key contains this")
    parser.add_argument("--limit", type=int, help="at most so many cases")
    args = parser.parse_args()
    run(args.only, args.limit) if args.what == "run" else table()


if __name__ == "__main__":
    main()
