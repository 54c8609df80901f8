"""``secateur cache``: what a teacher says of a text, kept on disk for training runs that then need no teacher."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from secateur.cli.options import DATA_HELP, debug_option, device_option, emit, json_option

if TYPE_CHECKING:
    from secateur.config import Device


@click.command("cache")
@click.argument("teacher")
@click.option("--data", multiple=True, required=True, help=f"Training text, repeatable: {DATA_HELP}")
@click.option("--seq-len", type=int, default=512, show_default=True, help="Tokens in each window.")
@click.option("--top-k", type=int, default=64, show_default=True, help="Likeliest tokens that are kept.")
@click.option("--temperature", type=float, default=2.0, show_default=True, help="Of the probabilities, as in the loss.")
@device_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet.")
@click.option("--resume", is_flag=True, help="Go on with a build of the same OUT that was stopped.")
@json_option
@debug_option
def command(
    teacher: str, data: tuple[str, ...], seq_len: int, top_k: int, temperature: float, device: "Device | None",
    out: Path, resume: bool, as_json: bool,
) -> None:  # fmt: skip
    """Ask TEACHER about every token of a text and keep its answers; then `secateur train --teacher OUT`."""
    from secateur.errors import UsageError
    from secateur.report.facts import Stopwatch
    from secateur.report.progress import on_stderr
    from secateur.report.training_page import cache_summary
    from secateur.teachers import CacheConfig, cache_teacher

    try:
        config = CacheConfig(data, seq_len, top_k, temperature)
    except ValueError as error:
        raise UsageError(str(error)) from None
    with on_stderr() as progress:
        told = cache_teacher(teacher, config, out, resume=resume, watch=Stopwatch(progress), device=device or "auto")
    emit(as_json, told, *cache_summary(told))
