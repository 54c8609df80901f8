"""OpenVINO: dense int8 against pruned int8 in turns, and against 16 bit in transformers, for docs/results.md.

    python benchmarks/runtimes.py run [--only REGEX]         resumable: finished pairs are skipped
    python benchmarks/runtimes.py table

Two models: SmolLM2-135M-Instruct (``demo``), and a Llama of 1.1e9 random weights (TinyLlama's shape with SmolLM2's
vocabulary). Pruned by magnitude, as what is measured is speed; activations calibrated on the embedded text. A pair is
one run of ``secateur bench``: prompts of 128 and 16 tokens behind them, 1 and 8 rows, medians of five rounds. "0%" is
the dense int8 model against itself, which is the noise. Threads as OMP_NUM_THREADS says. Every pair is one line of
benchmarks/results/runtimes.jsonl, with the processor, the load before it, and the kernels that were picked.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS, OUT = HERE / "results" / "runtimes.jsonl", HERE / "out" / "runtimes"
SPARSITIES = {"0%": 0.0, "50%": 0.5, "60%": 0.6, "70%": 0.7, "80%": 0.8}
LLAMA: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "smollm2": {"samples": 16, "held_out": 8, "seq_len": 256},
    "llama-1b": {"samples": 4, "held_out": 1, "seq_len": 128},
}
"""What each model is calibrated and checked on."""


class Pair(NamedTuple):
    model: str
    one: str
    """"16 bit", in transformers, or "0%"."""
    other: str

    @property
    def key(self) -> str:
        return " | ".join(self)


def pairs() -> Iterator[Pair]:
    for model in TEXT:
        yield Pair(model, "16 bit", "0%")
        for sparsity in SPARSITIES:
            yield Pair(model, "0%", sparsity)


def dense(model: str) -> Path:
    """A bfloat16 directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from secateur.models.load import load

    place = OUT / f"{model}-16bit"
    if (place / "config.json").exists():
        return place
    loaded = load("demo")
    if model == "smollm2":
        made = loaded.model.bfloat16()
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        made = LlamaForCausalLM(LlamaConfig(vocab_size=loaded.model.config.vocab_size, **LLAMA))
        torch.set_default_dtype(torch.float32)
    made.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)
    return place


def exported(model: str, which: str) -> tuple[Path, dict[str, Any]]:
    """An int8 directory and what its export told; made where it is not there yet."""
    from secateur import ExportOptions, PruneConfig, export_to, prune
    from secateur.config import method_from_dict

    place, pruned = OUT / f"{model}-{which.rstrip('%')}", OUT / "pruned"
    if not place.exists():
        source = dense(model)
        if SPARSITIES[which]:
            shutil.rmtree(pruned, ignore_errors=True)
            config = PruneConfig(method_from_dict("magnitude"), sparsity=SPARSITIES[which], data="embedded")
            prune(str(source), config, out=pruned)
            source = pruned
        export_to(source, "openvino", place, ExportOptions(**TEXT[model]))
        shutil.rmtree(pruned, ignore_errors=True)
    return place, json.loads((place / "secateur" / "export.json").read_text())


def run(only: str) -> None:
    from secateur.evaluation.bench import BenchOptions, bench

    done = finished()
    for pair in pairs():
        if pair.key in done or not re.search(only, pair.key):
            continue
        one = dense(pair.model) if pair.one == "16 bit" else exported(pair.model, pair.one)[0]
        other, told = exported(pair.model, pair.other)
        measured = bench(str(one), str(other), BenchOptions(tokens=16), lambda *_: None)
        for side in ("dense", "pruned"):
            measured[side]["source"] = Path(measured[side]["source"]).name  # a result is of no machine's folders
        with RESULTS.open("a") as file:
            file.write(json.dumps({"key": pair.key, "export": kept(told), "bench": measured}) + "\n")
        print(row(finished()[pair.key]), flush=True)


def kept(told: dict[str, Any]) -> dict[str, Any]:
    """Of what an export tells."""
    zeros = [linear["sparsity"] for linear in told["linears"]]
    names = ("parameters", "properties", "packed", "kernels", "amx", "nll", "greedy", "model_bytes")
    return {"sparsity": sum(zeros) / len(zeros), **{name: told[name] for name in names}}


def finished() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else ()
    return {row["key"]: row for row in map(json.loads, lines)}


def row(result: dict[str, Any]) -> str:
    """Milliseconds of the second model, how many times as fast it is, and both models' private memory: when opened,
    and at most after a measurement."""
    told = result["bench"]
    cells = [
        f"{1000 * cell['seconds'][1]['median']:.1f} ms, {cell['speedup']['median']:.2f}x" for cell in told["cells"]
    ]
    memory = [
        " / ".join(f"{told[name][when] / 1e6:.0f}" for name in ("dense", "pruned")) + " MB"
        for when in ("own_memory", "own_peak_memory")
    ]
    model, one, other = result["key"].split(" | ")
    return f"| {model} | {one} | {other} | {' | '.join(cells)} | {' | '.join(memory)} |"


def table() -> None:
    print("| model | one | other | prompt, 1 row | prompt, 8 rows | token, 1 row | token, 8 rows | opened | at most |")
    print("| --- | --- | --- |" + " ---: |" * 6)
    for result in finished().values():
        print(row(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", default="", help="pairs whose key matches this regular expression")
    args = parser.parse_args()
    run(args.only) if args.what == "run" else table()


if __name__ == "__main__":
    main()
