"""``secateur prune``: flags and a recipe file become one PruneConfig; the work is ``secateur.api.prune``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import emit, first_process
from secateur.cli.recipe_options import merged, prune_options, run_options


@click.command("prune")
@click.argument("model", required=False)
@prune_options
@run_options
def command(
    model: str | None, out: Path, resume: bool, recipe: Path | None, sets: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Prune MODEL and save it to OUT, a normal Hugging Face directory.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`.
    """
    from secateur.api import prune
    from secateur.config import config_from_dict
    from secateur.report.progress import on_stderr
    from secateur.report.prune_page import prune_summary

    values = merged("model", model, recipe, flags, sets)
    source = str(values.pop("model"))
    config = config_from_dict(values)
    if first_process():
        click.echo(f"{config.pattern}: {config.words}", err=True)
    with on_stderr() if first_process() else nullcontext() as progress:
        result = prune(source, config, out=out, resume=resume, progress=progress)
    emit(as_json, result.report, *prune_summary(result.report))
