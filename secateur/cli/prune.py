"""``secateur prune``: flags and a recipe file become one PruneConfig; the work is ``secateur.api.prune``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import debug_option, emit, first_process, json_option
from secateur.cli.recipe_options import merged, recipe_options


@click.command("prune")
@click.argument("model", required=False)
@recipe_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; not one of yours.")
@click.option("--resume", is_flag=True, help="Go on with a run to the same OUT that was stopped.")
@json_option
@debug_option
def command(
    model: str | None, out: Path, resume: bool, recipe: Path | None, sets: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Prune MODEL and save it to OUT, a normal Hugging Face directory.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`.
    """
    from secateur.api import prune
    from secateur.config import config_from_dict
    from secateur.report.progress import on_stderr
    from secateur.report.tables import prune_summary

    values = merged("model", model, recipe, flags, sets)
    source = str(values.pop("model"))
    config = config_from_dict(values)
    if first_process():
        click.echo(f"{config.pattern}: {config.target.words()}", err=True)
    with on_stderr() if first_process() else nullcontext() as progress:
        result = prune(source, config, out=out, resume=resume, progress=progress)
    emit(as_json, result.report, *prune_summary(result.report))
