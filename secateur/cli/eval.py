"""``secateur eval``: perplexity on texts and accuracy on tasks, beside a baseline's."""

from typing import TYPE_CHECKING

import click

from secateur.cli.options import DATA_HELP, debug_option, device_option, dtype_option, emit, json_option
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.config import Device, Dtype


@click.command("eval")
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="Measure this model too and print the gap between the two.")
@click.option("--data", default="", help=f"Texts, separated by commas: {DATA_HELP}")
@click.option("--tasks", default="", help="Tasks of lm-eval or .yaml files with one, separated by commas.")
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens in each window.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Stop after so many windows of each text, and questions of each task."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Windows measured together.")
@device_option
@dtype_option
@json_option
@debug_option
def command(
    model: str,
    baseline: str | None,
    data: str,
    tasks: str,
    seq_len: int,
    limit: int | None,
    batch: int,
    device: "Device | None",
    dtype: "Dtype | None",
    as_json: bool,
) -> None:
    """Measure MODEL: its perplexity, as the pruning papers do, and its accuracy on tasks.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`. Tasks need the extra `eval`.
    """
    from secateur.api import measure
    from secateur.report.eval_page import eval_tables, task_table
    from secateur.report.progress import on_stderr

    texts, asked = _names(data), _names(tasks)
    if not texts and not asked:
        raise UsageError("neither --data nor --tasks; for example --data wikitext2,c4 or --tasks piqa,arc_easy")
    with on_stderr() as progress:
        results, scores = measure(
            model, texts, asked, baseline=baseline, seq_len=seq_len, limit=limit, batch=batch,
            device=device or "auto", dtype=dtype or "auto", progress=progress,
        )  # fmt: skip
    report = {
        "model": model,
        "baseline": baseline,
        "results": [comparison.to_dict() for comparison in results],
        "tasks": [pair.to_dict() for pair in scores],
    }
    parts = eval_tables(model, baseline, results) if results else []
    emit(as_json, report, *parts, *(task_table(model, baseline, scores) if scores else []))


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
