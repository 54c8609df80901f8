"""``secateur quantize``: flags and a recipe file become one QuantizeConfig; the work is ``secateur.api.quantize``."""

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import emit
from secateur.cli.recipe_options import (
    calibration_options,
    merged,
    recipe_option,
    run_options,
    selection_options,
    sets_option,
)


@click.command("quantize")
@click.argument("model", required=False)
@click.option("--bits", type=int, help="Of a weight: 8, 4 or 3.  [default: 4]")
@click.option("--group-size", help="Inputs that share a scale: 32, 64, 128, channel or auto.  [default: auto]")
@click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points; zeros are kept either way.")
@click.option("--activations", help="none, dynamic or static 8 bit inputs, at 8 bits.  [default: none]")
@click.option("--method", help="rtn, gptq, or joint, which prunes in the same pass.  [default: gptq]")
@click.option("--balance", help="smooth (beside 8 bit activations), awq (beside none) or none.  [default: none]")
@click.option("--sparsity", type=float, help="Share of zeros that joint makes, 0.5 for 50 %.")
@click.option(
    "--pattern",
    help="What joint makes: unstructured, row, N:M (N KEPT of every M) or block:RxC.  [default: unstructured]",
)
@calibration_options
@selection_options
@recipe_option
@sets_option("damp=0.05")
@run_options
def command(
    model: str | None, out: Path, resume: bool, recipe: Path | None, sets: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Quantize MODEL and save it to OUT, as transformers and vLLM load it. No zero of MODEL is lost.

    MODEL is a hub id, a Hugging Face directory, a .gguf file, or `demo`; dense, or pruned by `secateur prune`.
    """
    from secateur.api import quantize
    from secateur.quantize_config import quantize_config_from_dict
    from secateur.report.progress import on_stderr
    from secateur.report.quantize_page import quantize_summary

    values = merged("model", model, recipe, flags, sets)
    source = str(values.pop("model"))
    if str(values.get("group_size", "")).isdigit():
        values["group_size"] = int(values["group_size"])
    config = quantize_config_from_dict(values)
    with on_stderr() as progress:
        result = quantize(source, config, out=out, resume=resume, progress=progress)
    emit(as_json, result.report, *quantize_summary(result.report))
