"""Pruned, quantized, and both, on SmolLM2-135M-Instruct: what is lost and what is saved, for docs/results.md.

    python benchmarks/quantization.py run [--only REGEX]     resumable: finished cases are skipped
    python benchmarks/quantization.py table
    python benchmarks/quantization.py plot                   docs/frontier.svg, from the results

Everything is calibrated on 16 x 2048 tokens of calib/c4_en_train_1200.jsonl, seed 0, and saved in bfloat16. A pattern's
sequential cases start from one model, pruned by the default method or by SparseGPT; "joint" prunes and rounds the dense
model in one sweep, by SparseGPT's rule. int4 and int3 have groups of 64 (the width, 576, is no multiple of 128).
Perplexity as in benchmarks/training.py. Sizes are those of the safetensors files as they run, and of the same packed by
``secateur export``. Texts are found through SECATEUR_DATA. Every finished case is one line of
benchmarks/results/quantization.jsonl.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training import CALIBRATION, EVALUATION, measured

HERE = Path(__file__).parent
RESULTS, OUT = HERE / "results" / "quantization.jsonl", HERE / "out" / "quantization"
SHARED: dict[str, Any] = {"data": str(CALIBRATION), "samples": 16, "dtype": "bfloat16"}
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2:4": {"pattern": "2:4"},
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"bits": 8},
    "W8A8": {"bits": 8, "activations": "dynamic"},
    "int4": {"bits": 4, "group_size": 64},
    "int4, awq": {"bits": 4, "group_size": 64, "balance": "awq"},
    "int3": {"bits": 3, "group_size": 64},
    "int4, joint": {"bits": 4, "group_size": 64, "method": "joint"},
}
OF_DENSE = ("bf16", "int8", "W8A8", "int4", "int3")
OF_PRUNED = ("bf16", "W8A8", "int4", "int4, awq", "int4, joint")
OF_SPARSEGPT = ("bf16", "int4")


class Case(NamedTuple):
    pattern: str
    """One of ``PATTERNS``, by the default method, or "PATTERN, sparsegpt"."""
    scheme: str

    @property
    def key(self) -> str:
        return f"{self.pattern} | {self.scheme}"


def cases() -> Iterator[Case]:
    for pattern in PATTERNS:
        for scheme in OF_DENSE if pattern == "dense" else OF_PRUNED:
            yield Case(pattern, scheme)
    for pattern in PATTERNS:
        for scheme in () if pattern == "dense" else OF_SPARSEGPT:
            yield Case(f"{pattern}, sparsegpt", scheme)


def pruned(pattern: str) -> Path:
    """The model that a pattern's sequential cases start from; made where it is not there yet."""
    from secateur import PruneConfig, prune
    from secateur.config import method_from_dict

    place, (name, _, method) = OUT / pattern, pattern.partition(", ")
    if not (place / "config.json").exists():
        config = PruneConfig(method_from_dict(method or "sparsellm"), **PATTERNS[name], **SHARED)
        prune("demo", config, out=place, resume=True)
    return place


def dense() -> Path:
    """The dense model as a directory in bfloat16."""
    from secateur.models.load import load

    place = OUT / "dense"
    if not (place / "config.json").exists():
        loaded = load("demo")
        loaded.model.bfloat16().save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
    return place


def made(case: Case) -> tuple[Path, dict[str, Any]]:
    """Where the case's model is, and what its quantization reports."""
    from secateur import QuantizeConfig, quantize

    options, joint = SCHEMES[case.scheme], case.scheme.endswith("joint")
    source = dense() if joint or case.pattern == "dense" else pruned(case.pattern)
    if not options:
        return source, {}
    place = OUT / case.key.replace(" | ", ", ").replace(":", "of")
    config = QuantizeConfig(**options, **SHARED, **(PATTERNS[case.pattern] if joint else {}))
    report = quantize(str(source), config, out=place, resume=True).report
    return place, {name: report[name] for name in ("storage", "seconds", "versions")}


def packed(source: Path) -> int:
    """Bytes of the files when the zeros are taken out."""
    from secateur.exports import export_to

    place = OUT / "packed"
    shutil.rmtree(place, ignore_errors=True)
    told = export_to(str(source), "sparse-safetensors", place)
    shutil.rmtree(place)
    return told["packed_bytes"]


def run(only: str) -> None:
    done = finished()
    for case in cases():
        if case.key in done or not re.search(only, case.key):
            continue
        start = time.perf_counter()
        place, report = made(case)
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        row = {"key": case.key, "bytes": size, "packed": packed(place), "report": report, **measured(str(place))}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if report:
            shutil.rmtree(place)
        perplexities = ", ".join(f"{name} {row[name]['ppl']:.2f}" for name in EVALUATION)
        print(f"{case.key}: {perplexities}, {size / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s", flush=True)


def finished() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else ()
    return {row["key"]: row for row in map(json.loads, lines)}


def bits(row: dict[str, Any]) -> float:
    """Per number of the whole model, embeddings included, as the packed files hold it."""
    return 16 * row["packed"] / finished()["dense | bf16"]["bytes"]


def table() -> None:
    print("| pattern | scheme | WikiText-2 | C4 | bits, linears | MB | MB packed | bits packed, all |")
    print("| --- | --- |" + " ---: |" * 6)
    rows = finished()
    for pattern, scheme, row in ((*case, rows[case.key]) for case in cases() if case.key in rows):
        stored = row["report"]["storage"]["bits_per_weight"] if row["report"] else 16
        ppl = " | ".join(f"{row[name]['ppl']:.1f}" for name in EVALUATION)
        sizes = f"{row['bytes'] / 1e6:.0f} | {row['packed'] / 1e6:.0f} | {bits(row):.2f}"
        print(f"| {pattern} | {scheme} | {ppl} | {stored:.2f} | {sizes} |")


def plot() -> None:
    """Perplexity on WikiText-2 against the bits of the packed files; of pruned models those by the default method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"  # the same file every time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = finished()
    for pattern in PATTERNS:
        own = sorted(
            (bits(row), row["wikitext2"]["ppl"], key) for key, row in rows.items() if key.split(" | ")[0] == pattern
        )
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], "o-" if pattern == "dense" else "o", label=pattern)
        for x, y, key in own:
            axes.annotate(key.split(" | ")[1], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("bits per number of the model, packed, embeddings included")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "frontier.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "plot"))
    parser.add_argument("--only", default="", help="cases whose key matches this regular expression")
    args = parser.parse_args()
    if args.what == "run":
        run(args.only)
    else:
        {"table": table, "plot": plot}[args.what]()


if __name__ == "__main__":
    main()
