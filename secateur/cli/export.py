"""``secateur export``: a pruned directory in a form where its zeros pay."""

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import DATA_HELP, debug_option, emit, json_option
from secateur.export.targets import TARGETS


@click.command("export")
@click.argument("directory", metavar="DIR")
@click.option("--to", "target", metavar="TARGET", required=True, help=f"What to write: {', '.join(TARGETS)}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet.")
@click.option("--data", help=f"openvino: text that calibrates, {DATA_HELP}  [default: embedded]")
@click.option("--samples", type=click.IntRange(min=1), help="openvino: windows of it.  [default: 32]")
@click.option("--seq-len", type=click.IntRange(min=2), help="openvino: their tokens.  [default: 512]")
@json_option
@debug_option
def command(directory: str, target: str, out: Path, as_json: bool, **flags: Any) -> None:
    """Write the model in DIR as TARGET to OUT, and read it back.

    sparse-safetensors is a lossless download format, `secateur unpack` undoes it. openvino is a graph with int8 weights
    and activations; DIR may be any model then, so that the dense one can be exported to compare with. torch-2:4 is for
    GPUs with sparse tensor cores.
    """
    from secateur.exports import ExportOptions, export_to
    from secateur.report.export_page import export_page
    from secateur.report.progress import on_stderr

    given = {key: value for key, value in flags.items() if value is not None}
    with on_stderr() as progress:
        told = export_to(directory, target, out, ExportOptions(**given) if given else None, progress=progress)
    emit(as_json, told, *export_page(told))
