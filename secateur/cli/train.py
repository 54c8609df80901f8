"""``secateur train``: flags and a recipe file become one TrainConfig; the work is ``secateur.api.train``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import DATA_HELP, emit, first_process
from secateur.cli.recipe_options import merged, recipe_option, run_options, selection_options, sets_option
from secateur.errors import UsageError


@click.command("train")
@click.argument("student", required=False)
@click.option("--teacher", help="Model to learn from.  [default: what STUDENT was pruned from, or STUDENT itself]")
@click.option("--method", help="ast, ast_g, srste, cast, admm, fixed or none.  [default: ast]")
@click.option("--sparsity", type=float, help="Share of zeros, 0.7 for 70 %. Not needed with an N:M pattern.")
@click.option("--pattern", help="unstructured, row, global, N:M (N KEPT of every M) or block:RxC.  [default: 2:4]")
@click.option("--data", multiple=True, help=f"Training text, repeatable: {DATA_HELP}  [default: c4]")
@click.option("--tokens", type=int, help="Of training, counted again in every epoch.  [required, here or in a recipe]")
@click.option("--seq-len", type=int, help="Tokens in each window.  [default: 512]")
@click.option("--batch", type=int, help="Windows of one step.  [default: 8]")
@click.option("--micro-batch", type=int, help="Windows in memory at one time.  [default: 1]")
@click.option("--lr", type=float, help="Highest learning rate.  [default: 2e-4]")
@click.option(
    "--slorb", type=int, metavar="K", help="Branches of rank inputs / K beside sparse linears.  [default: 0, none]"
)
@click.option(
    "--lora", type=int, metavar="R", help="With --method fixed: train adapters of rank R alone.  [default: 0, none]"
)
@click.option("--seed", type=int, help="Orders the windows.  [default: 0]")
@selection_options
@recipe_option
@sets_option("loss.alpha=1")
@run_options
def command(
    student: str | None,
    out: Path,
    resume: bool,
    recipe: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Train STUDENT sparse by distilling its dense original, and save it to OUT, a normal Hugging Face directory.

    STUDENT is a hub id, a Hugging Face directory, a .gguf file, or `demo`; dense, or pruned by `secateur prune`.
    """
    from secateur.api import train
    from secateur.report.progress import on_stderr
    from secateur.report.training_page import train_summary
    from secateur.train_config import train_config_from_dict

    values = merged("student", student, recipe, flags, sets)
    if "tokens" not in values:
        raise UsageError("no --tokens; say how long to train: 300000 takes a CPU half an hour at 135M parameters")
    source, teacher = str(values.pop("student")), values.pop("teacher", None)
    config = train_config_from_dict(values)
    if first_process():
        click.echo(f"{config.pattern}: {config.words}; {config.steps} steps", err=True)
    with on_stderr() if first_process() else nullcontext() as progress:
        result = train(source, config, teacher=teacher, out=out, resume=resume, progress=progress)
    emit(as_json, result.report, *train_summary(result.report))
