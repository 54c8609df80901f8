"""``secateur prune``: flags and a recipe file become one PruneConfig; the work is ``secateur.api.prune``."""

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import DATA_HELP, debug_option, device_option, dtype_option, emit, json_option
from secateur.errors import UsageError


@click.command("prune")
@click.argument("model", required=False)
@click.option("--method", help="What decides which weights go, see `secateur methods`.  [default: sparsellm]")
@click.option("--sparsity", type=float, help="Share of zeros, 0.7 for 70 %. Not needed with an N:M pattern.")
@click.option("--pattern", help="unstructured, row, N:M (N KEPT of every M) or block:RxC.  [default: unstructured]")
@click.option("--data", help=f"Calibration text: {DATA_HELP}  [default: c4]")
@click.option("--samples", type=int, help="Calibration windows.  [default: 128]")
@click.option("--seq-len", type=int, help="Tokens in each window.  [default: 2048]")
@click.option("--seed", type=int, help="Chooses the windows.  [default: 0]")
@click.option("--blocks", help="all, first-half, or A:B (B not included).  [default: all]")
@device_option
@dtype_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; not one of yours.")
@click.option("--offload", type=click.Choice(["auto", "on", "off"]), help="Leave blocks on disk.  [default: auto]")
@click.option("--resume", is_flag=True, help="Go on with a run to the same OUT that was stopped.")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with any of these; flags win over it.")
@click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Change any recipe key: --set method.inner=admm")
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

    values = merged(model, recipe, flags, sets)
    source = str(values.pop("model"))
    config = config_from_dict(values)
    click.echo(f"{config.pattern}: {config.target.words()}", err=True)
    with on_stderr() as progress:
        result = prune(source, config, out=out, resume=resume, progress=progress)
    emit(as_json, result.report, *prune_summary(result.report))


def merged(model: str | None, recipe: Path | None, flags: dict[str, Any], sets: tuple[str, ...]) -> dict[str, Any]:
    """The recipe file, overruled by the flags that were given, overruled by --set. Holds a ``model``."""
    from secateur.config import apply_sets, load_recipe

    values = load_recipe(recipe) if recipe else {}
    given = {key: value for key, value in {"model": model, **flags}.items() if value is not None}
    values = apply_sets({**values, **given}, sets)
    if "model" not in values:
        raise UsageError("no MODEL; give a hub id, a directory, a .gguf file or `demo`, or a recipe that holds one")
    return values
