"""The options that verbs with a recipe share, in groups, and how a recipe, flags and --set become one."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from secateur.cli.options import DATA_HELP, debug_option, device_option, dtype_option, json_option, resume_option
from secateur.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Put all of them on a command, in this order; what the user leaves out arrives as None, () or False."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


recipe_option = click.option(
    "--recipe", type=click.Path(path_type=Path), help="YAML file with any of these; flags win over it."
)


def sets_option(example: str) -> Callable[[F], F]:
    return click.option("--set", "sets", multiple=True, metavar="A.B=C", help=f"Change any recipe key: --set {example}")


calibration_options = group(
    click.option("--data", help=f"Calibration text: {DATA_HELP}  [default: c4]"),
    click.option("--samples", type=int, help="Calibration windows.  [default: 128]"),
    click.option("--seq-len", type=int, help="Tokens in each window.  [default: 2048]"),
    click.option("--seed", type=int, help="Chooses the windows.  [default: 0]"),
)
selection_options = group(
    click.option("--blocks", help="all, first-half, or A:B (B not included).  [default: all]"),
    click.option("--include", multiple=True, metavar="REGEX", help="Only linears whose name it matches; repeatable."),
    click.option("--ignore", multiple=True, metavar="REGEX", help="Leave linears whose name it matches; repeatable."),
    device_option,
    dtype_option,
)
prune_options = group(
    click.option("--method", help="What decides which weights go, see `secateur methods`.  [default: sparsellm]"),
    click.option("--sparsity", type=float, help="Share of zeros, 0.7 for 70 %. Not needed with an N:M pattern."),
    click.option("--pattern", help="unstructured, row, N:M (N KEPT of every M) or block:RxC.  [default: unstructured]"),
    click.option("--taper", type=float, help="Sparser last, denser first block: 0.08 by 8 points.  [default: 0]"),
    click.option(
        "--low-rank",
        type=int,
        metavar="RANK",
        help="Fit a branch of this rank beside each pruned linear.  [default: 0]",
    ),
    calibration_options,
    selection_options,
    click.option(
        "--offload",
        type=click.Choice(["auto", "on", "off"]),
        help="Leave blocks on disk; auto does where they would fill the memory.  [default: auto]",
    ),
    recipe_option,
    sets_option("method.inner=admm"),
)
"""They become one PruneConfig."""
run_options = group(
    click.option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        help="Directory to write; an earlier result of Secateur there is replaced, nothing else.",
    ),
    resume_option,
    json_option,
    debug_option,
)
"""Of verbs that write a directory, all or nothing."""


def merged(
    name: str, source: str | None, recipe: Path | None, flags: dict[str, Any], sets: tuple[str, ...]
) -> dict[str, Any]:
    """The recipe file, overruled by the flags that were given, overruled by --set. Holds ``name``, the model's key."""
    from secateur.config import apply_sets, load_recipe

    values = load_recipe(recipe) if recipe else {}
    given = {key: value for key, value in {name: source, **flags}.items() if value not in (None, ())}
    values = apply_sets({**values, **given}, sets)
    if name not in values:
        raise UsageError(
            f"no {name.upper()}; give a hub id, a directory, a .gguf file or `demo`, or a recipe that holds one"
        )
    return values
