"""What ``secateur bench`` prints and draws."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.errors import UsageError
from secateur.report.export_page import kernels
from secateur.report.tables import facts, size

WORDS = {"prefill": "tokens of a prompt, to the first new one", "decode": "each further token"}


def bench_page(told: dict[str, Any]) -> list[RenderableType]:
    """Time by phase, batch and prompt, then memory and files, then how it was measured."""
    dense, pruned, options, machine = (told[name] for name in ("dense", "pruned", "options", "machine"))
    table = Table(
        "", "batch", "prompt", "dense", "tokens/s", "pruned", "tokens/s", "faster", box=None, header_style="bold"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for cell in told["cells"]:
        table.add_row(*_cells(cell))
    rows = {
        "dense": _model(dense),
        "pruned": _model(pruned),
        "memory": f"{size(dense['own_memory'])} and {size(pruned['own_memory'])} private for the model when opened,"
        f" {size(dense['own_peak_memory'])} and {size(pruned['own_peak_memory'])} at most after a measurement"
        f" (and {size(dense['memory'] - dense['own_memory'])} and {size(pruned['memory'] - pruned['own_memory'])} for"
        " interpreter and libraries)",
        "files": f"{size(dense['file_bytes'])} and {size(pruned['file_bytes'])}",
        "measured": f"{options['tokens']} tokens, {options['rounds']} rounds in turns,"
        f" {options['threads']} threads; median, quartiles in brackets",
        "machine": f"{machine['processor']}, {machine['cores']} cores, load {machine['load_before']:.2f} before",
    }
    return [*facts("dense against pruned", rows), table, *(Text(f"warning: {w}", style="yellow") for w in notes(told))]


def notes(told: dict[str, Any]) -> list[str]:
    """What one must know to read the numbers."""
    models = [told["dense"], told["pruned"]]
    said = ["the machine was busy before: these numbers were taken under load"] if told["machine"]["busy"] else []
    said += [
        f"{model['source']} is quantized, {model['codes']}: what its format computes, not its speed where codes are "
        "multiplied"
        for model in models
        if "codes" in model
    ]
    return [*said, *dict.fromkeys(filter(None, (model.get("lacks") for model in models)))]


def _model(model: dict[str, Any]) -> str:
    words = f"{model['source']}: {model['runtime']}, {model['dtype']}, {model['device']}"
    if "kernels" in model:
        return f"{words}; {kernels(model['kernels'])}"
    if "codes" in model:
        return f"{words}; {model['codes']}"
    if "chosen" in model:
        sparse = [one for one in model["chosen"] if one["chosen"] != "dense"]
        return f"{words}; {len(sparse)} of {len(model['chosen'])} matrices are multiplied sparse"
    return words


def _cells(cell: dict[str, Any]) -> list[str]:
    pairs = zip(cell["seconds"], cell["tokens_per_second"], strict=True)
    numbers = [text for spread, rate in pairs for text in (_milliseconds(spread), f"{rate:.1f}")]
    faster = cell["speedup"]
    return [
        WORDS[cell["phase"]],
        str(cell["batch"]),
        str(cell["prompt"]),
        *numbers,
        f"{faster['median']:.2f}x ({faster['low']:.2f} to {faster['high']:.2f})",
    ]


def _milliseconds(spread: dict[str, float]) -> str:
    median, low, high = (f"{1000 * spread[name]:.1f}" for name in ("median", "low", "high"))
    return f"{median} ms ({low} to {high})"


# ---- the plot


def refuse_no_plot(path: Path) -> None:
    """UsageError before anything is measured that could not be drawn."""
    if path.suffix != ".svg":
        raise UsageError(f"--plot {path}, but what is drawn is an .svg file; give it that ending")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"--plot {path}, but nothing can be written to {path.parent}; make that folder, or name another"
        )
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with `pip install -e '.[report]'` in the clone")


def draw(told: dict[str, Any], path: Path) -> None:
    """Tokens a second, dense beside pruned, quartiles as whiskers: one picture for each phase."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateur"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(WORDS), figsize=(8, 3.2), constrained_layout=True)
    for place, (phase, words) in zip(places, WORDS.items(), strict=True):
        cells = [cell for cell in told["cells"] if cell["phase"] == phase]
        for which, name in enumerate(("dense", "pruned")):
            rates = [cell["tokens_per_second"][which] for cell in cells]
            spreads = [cell["seconds"][which] for cell in cells]
            low = [rate * (1 - s["median"] / s["high"]) for rate, s in zip(rates, spreads, strict=True)]
            high = [rate * (s["median"] / s["low"] - 1) for rate, s in zip(rates, spreads, strict=True)]
            at = [index + 0.4 * which - 0.2 for index in range(len(cells))]
            place.bar(at, rates, 0.38, yerr=[low, high], capsize=3, label=name)
        place.set_xticks(range(len(cells)), [f"{cell['batch']} x {cell['prompt']}" for cell in cells])
        place.set_xlabel("batch x prompt")
        place.set_title(words)
        place.set_ylabel("tokens/s")
    places[0].legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
