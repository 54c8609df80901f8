"""Perplexity of every method at every sparsity on a real model: the numbers of docs/results.md.

    python benchmarks/quality.py run [--only REGEX] [--limit N] [--part 1/2]   resumable: finished cases are skipped
    python benchmarks/quality.py table                                         the tables of docs/results.md

Protocol: SmolLM2-135M-Instruct (``demo``), calibration 16 x 2048 tokens of calib/c4_en_train_1200.jsonl drawn by the
seed, perplexity at 2048 on the first 40 windows of ppl/wikitext2_raw_test.txt and the first 20 of
ppl/c4_en_validation_200.jsonl, no overlap, float32 loss over bfloat16-autocast forwards (float32 forwards differ by
0.06 %, see docs/results.md). Cases of "all" windows measure the whole WikiText-2 test text in the same pass. The texts
are found through SECATEUR_DATA. Every finished case is one line of benchmarks/results/quality.jsonl, with its recipe.

Two processes of one thread each, ``--part 1/2`` and ``--part 2/2`` under OMP_NUM_THREADS=1, do the work of two cores
about 1.7 times as fast as one process of two threads; "seconds" in the results are then those of one busy core.
"""

import argparse
import copy
import functools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.models.load import Loaded

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
DATA = Path(os.environ.get("SECATEUR_DATA") or HERE.parent.parent / "shared" / "data")
WIKITEXT, C4 = DATA / "ppl" / "wikitext2_raw_test.txt", DATA / "ppl" / "c4_en_validation_200.jsonl"
CALIBRATION = DATA / "calib" / "c4_en_train_1200.jsonl"
WINDOWS = 40
"""Of WikiText-2 in the tables."""
KEPT = ("recipe", "sparsity", "seconds", "peak_memory_bytes", "output_error", "dropped_rows", "warnings", "versions")
"""What of a run's report goes into the results."""
PATTERNS = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "80%": 0.8, "2:4": None}
METHODS = {
    "magnitude": "magnitude",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "admm": "admm",
    "paper (sparsegpt)": {"name": "sparsellm", "mode": "paper", "inner": "sparsegpt", "iterations": 4},
    "closed (sparsegpt)": {"name": "sparsellm", "inner": "sparsegpt"},
    "closed (admm)": {"name": "sparsellm"},
    "closed (admm), no rounds": {"name": "sparsellm", "iterations": 1},
    "closed (admm), one round": {"name": "sparsellm", "iterations": 2},
    "sparsegpt, float32 forwards": "sparsegpt",
}
ABLATIONS = {
    "closed (admm), no rounds": ("70%", "2:4", "50%"),
    "closed (admm), one round": ("70%",),
    "sparsegpt, float32 forwards": ("70%",),
}
"""Methods that are run at some patterns only."""
SEEDED = ("sparsegpt", "admm", "closed (sparsegpt)", "closed (admm)")
BEST = "closed (admm)"
"""Measured on the whole WikiText-2 test text too."""


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    method: str
    pattern: str
    seed: int = 0
    windows: str = "40+20"
    """Evaluation windows on WikiText-2 and C4: "40+20", or "all+20"."""

    @property
    def key(self) -> str:
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.windows}"


def cases() -> Iterator[Case]:
    """All cases, the most telling first."""
    yield Case("dense", "0%", windows="all+20")
    for pattern in ("70%", "2:4", "50%", "60%", "80%"):
        for method in METHODS:
            if pattern in ABLATIONS.get(method, PATTERNS):
                yield Case(method, pattern, windows="all+20" if method == BEST else "40+20")
        for seed in (1, 2) if pattern in ("70%", "2:4") else ():
            for method in SEEDED:
                yield Case(method, pattern, seed)


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


@functools.cache
def dense() -> "Loaded":
    """The model as it is, loaded once for all cases of a process."""
    from secateur.models.load import load

    return load("demo")


def pruned(case: Case) -> "tuple[PreTrainedModel, dict]":
    """The case's model and its report; the dense model and nothing where nothing is to be pruned."""
    from secateur import PruneConfig, prune
    from secateur.config import method_from_dict

    if case.method == "dense":
        return dense().model, {}
    config = PruneConfig(
        method=method_from_dict(METHODS[case.method]),
        sparsity=PATTERNS[case.pattern],
        pattern=case.pattern if ":" in case.pattern else "unstructured",
        data=str(CALIBRATION),
        samples=16,
        seed=case.seed,
        precision="float32" if "float32" in case.method else "auto",
    )
    result = prune(copy.deepcopy(dense().model), config, tokenizer=dense().tokenizer)
    result.report["recipe"]["data"] = CALIBRATION.name
    return result.model, {name: result.report[name] for name in KEPT if name in result.report}


def run_case(case: Case) -> dict:
    """Prune, evaluate, describe."""
    import torch

    from secateur.data.sources import read_texts
    from secateur.evaluation.perplexity import evaluate_text

    model, report = pruned(case)
    row = {"key": case.key, **vars(case)}
    for name, path, limit in (("wikitext2", WIKITEXT, WINDOWS if case.windows == "40+20" else None), ("c4", C4, 20)):
        start = time.perf_counter()
        texts = read_texts(str(path), "evaluation")
        measured = evaluate_text(model, dense().tokenizer, texts, seq_len=2048, limit=limit, autocast=torch.bfloat16)
        losses, seconds = measured.window_nll, time.perf_counter() - start
        row[name] = {
            "ppl": measured_ppl(losses[:WINDOWS]),
            "windows": len(losses[:WINDOWS]),
            "seconds": seconds * min(1, WINDOWS / len(losses)),
            "window_nll": [round(nll, 5) for nll in losses],
        }
        if len(losses) > WINDOWS:
            row[f"{name} whole"] = {"ppl": measured_ppl(losses), "windows": len(losses), "seconds": seconds}
    return row | {"report": report}


def measured_ppl(window_nll: Sequence[float]) -> float:
    """exp of the mean loss; inf where the model is that broken."""
    try:
        return math.exp(statistics.fmean(window_nll))
    except OverflowError:
        return math.inf


def run(only: str, limit: int | None, part: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    done = finished()
    index, parts = map(int, part.split("/"))
    todo = [case for case in cases() if re.search(only, case.key) and case.key not in done][index - 1 :: parts][:limit]
    for number, case in enumerate(todo, 1):
        start = time.perf_counter()
        row = run_case(case)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        ppl = ", ".join(f"{name} {row[name]['ppl']:.2f}" for name in ("wikitext2", "c4") if name in row)
        print(f"[{number}/{len(todo)}] {case.key}: {ppl}, {time.perf_counter() - start:.0f} s", flush=True)


def table() -> None:
    done = finished()
    base = row_of(done, "dense", "0%")
    for name, title in (("wikitext2", "WikiText-2, first 40 windows"), ("c4", "C4 validation, first 20 windows")):
        print(f"\n{title}" + (f"; dense {base[name]['ppl']:.2f}" if base else "") + "\n")
        print("| method | " + " | ".join(PATTERNS) + " |\n| --- |" + " ---: |" * len(PATTERNS))
        for method in METHODS:
            cells = " | ".join(cell(done, base, method, pattern, name) for pattern in PATTERNS)
            print(f"| {method} | {cells} |")
    print("\nWikiText-2, whole test text\n")
    for row in done.values():
        if whole := row.get("wikitext2 whole"):
            print(f"| {row['method']} | {row['pattern']} | {whole['ppl']:.2f} | {whole['windows']} windows |")


def row_of(done: dict, method: str, pattern: str, seed: int = 0) -> dict | None:
    """A case's result, whichever windows it was measured on."""
    keys = [Case(method, pattern, seed, windows).key for windows in ("all+20", "40+20")]
    return next((done[key] for key in keys if key in done), None)


def cell(done: dict, base: dict | None, method: str, pattern: str, text: str) -> str:
    """Perplexity (mean ± standard deviation over seeds), and the mean share of SparseGPT's log-perplexity gap."""
    rows = {seed: row for seed in (0, 1, 2) if (row := row_of(done, method, pattern, seed))}
    values = [row[text]["ppl"] for row in rows.values()]
    if not values:
        return ""
    shown = f"{values[0]:.1f}" if values[0] < 1e4 else f"{values[0]:.1e}"
    if len(values) > 1:
        shown = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"
    peers = {seed: row_of(done, "sparsegpt", pattern, seed) for seed in rows}
    shares = [gap(row, base, text) / gap(peers[seed], base, text) for seed, row in rows.items() if base and peers[seed]]
    if method != "sparsegpt" and shares:
        shown += f" · {statistics.mean(shares):.2f}"
    return shown


def gap(row: dict, base: dict, text: str) -> float:
    """ln of the perplexity above the dense model's."""
    return math.log(row[text]["ppl"] / base[text]["ppl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", default="", help="cases whose key matches this regular expression")
    parser.add_argument(
        "--part", default="1/1", help="of the cases to do, every second one: 1/2 in one process, 2/2 beside it"
    )
    parser.add_argument("--limit", type=int, help="at most so many cases")
    args = parser.parse_args()
    run(args.only, args.limit, args.part) if args.what == "run" else table()


if __name__ == "__main__":
    main()
