"""``secateur eval``: perplexity on one or more texts, beside a baseline's."""

from typing import TYPE_CHECKING

import click

from secateur.cli.options import DATA_HELP, debug_option, device_option, dtype_option, emit, json_option

if TYPE_CHECKING:
    from secateur.config import Device, Dtype


@click.command("eval")
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="Measure this model too and print the gap between the two.")
@click.option("--data", required=True, help=f"Texts, separated by commas: {DATA_HELP}")
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens in each window.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many windows of each text.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Windows measured together.")
@device_option
@dtype_option
@json_option
@debug_option
def command(
    model: str,
    baseline: str | None,
    data: str,
    seq_len: int,
    limit: int | None,
    batch: int,
    device: "Device | None",
    dtype: "Dtype | None",
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, as the pruning papers do.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`.
    """
    from secateur.api import evaluate
    from secateur.report.progress import on_stderr
    from secateur.report.tables import eval_tables

    with on_stderr() as progress:
        results = evaluate(
            model,
            [name.strip() for name in data.split(",") if name.strip()],
            baseline=baseline,
            seq_len=seq_len,
            limit=limit,
            batch=batch,
            device=device or "auto",
            dtype=dtype or "auto",
            progress=progress,
        )
    report = {"model": model, "baseline": baseline, "results": [comparison.to_dict() for comparison in results]}
    emit(as_json, report, *eval_tables(model, baseline, results))
