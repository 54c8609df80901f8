"""What `secateur plan` says against what the same run then takes: the table of docs/performance.md.

    python benchmarks/plan.py run [--only REGEX]     estimate, then run, case by case; finished ones are skipped
    python benchmarks/plan.py table

Both as a user types them, in processes of their own: seconds are those of the whole command, memory is the largest
resident set of its process. To be run on an idle machine, since the estimate stands for the moment it was made.
Calibration 16 x 2048 tokens of calib/c4_en_train_1200.jsonl, found through SECATEUR_DATA; ``gemma3`` is the file that
benchmarks/quality.py says how to make. Results go to benchmarks/results/plan.jsonl.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
DATA = Path(os.environ.get("SECATEUR_DATA") or HERE.parent.parent / "shared" / "data")
CALIBRATION, RESULTS = DATA / "calib" / "c4_en_train_1200.jsonl", HERE / "results" / "plan.jsonl"
MODELS = {"smollm2": "demo", "gemma3": str(HERE / "out" / "gemma3.gguf")}
METHODS = {"sparsegpt": ("--method", "sparsegpt"), "default": ()}
CASES = tuple(f"{model} | {method}" for method in METHODS for model in MODELS)


def secateur(*words: str) -> tuple[dict, float, int]:
    """The command's JSON, its seconds and the largest resident set, in bytes, of any child so far."""
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-m", "secateur", *words, "--json"], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    return json.loads(ran.stdout), seconds, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def run_case(case: str) -> dict:
    """Estimate, run, compare; the plan is small, so the largest child is the run."""
    model, method = case.split(" | ")
    options = ("--sparsity", "0.7", "--data", str(CALIBRATION), "--samples", "16", *METHODS[method])
    plan, _, _ = secateur("plan", MODELS[model], *options)
    with tempfile.TemporaryDirectory(dir=HERE / "out") as room:
        report, seconds, peak = secateur("prune", MODELS[model], *options, "--out", f"{room}/pruned")
    return {
        "case": case,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "estimate": {"seconds": plan["seconds"], "peak": plan["memory"]["host"]["peak"], "stages": plan["stages"]},
        "measured": {"seconds": seconds, "pruning": report["seconds"], "peak": peak},
        "rates": plan["rates"],
    }


def finished() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else ()
    return {row["case"]: row for row in map(json.loads, lines)}


def run(only: str) -> None:
    for case in CASES:
        if re.search(only, case) and case not in finished():
            ran = subprocess.run([sys.executable, __file__, "one", "--only", case], stdout=subprocess.PIPE, check=True)
            with RESULTS.open("ab") as file:  # a process for each case: the largest child of one is not that of another
                file.write(ran.stdout)
            print(ran.stdout.decode()[:300], flush=True)


def table() -> None:
    print("| | estimate | measured | ratio | estimate | measured | ratio |\n| --- |" + " ---: |" * 6)
    for case, row in finished().items():
        said, took = row["estimate"], row["measured"]
        total = said["seconds"]["total"]
        seconds = f"{total:.0f} s | {took['seconds']:.0f} s | {total / took['seconds']:.2f}"
        peak = f"{said['peak'] / 1e9:.2f} GB | {took['peak'] / 1e9:.2f} GB | {said['peak'] / took['peak']:.2f}"
        print(f"| {case} | {seconds} | {peak} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "table"))
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(run_case(args.only)))
    else:
        run(args.only) if args.what == "run" else table()


if __name__ == "__main__":
    main()
