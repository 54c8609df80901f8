"""``secateur plan``: what ``prune`` with the same options would do, take and be good for; no weight is read."""

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import debug_option, emit, json_option
from secateur.cli.recipe_options import merged, prune_options


@click.command("plan")
@click.argument("model", required=False)
@prune_options
@json_option
@debug_option
def command(model: str | None, recipe: Path | None, sets: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Tell what pruning MODEL would do and cost, without touching a weight.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`. Reads config and headers, measures this
    machine for a few seconds, and estimates time, memory and disk.
    """
    from secateur.config import config_from_dict
    from secateur.planning.plan import plan
    from secateur.report.plan_page import plan_page
    from secateur.report.progress import on_stderr

    values = merged("model", model, recipe, flags, sets)
    source = str(values.pop("model"))
    config = config_from_dict(values)
    with on_stderr() as progress:
        told = plan(source, config, progress=progress).to_dict()
    emit(as_json, told, *plan_page(told))
