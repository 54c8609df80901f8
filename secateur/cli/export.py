"""``secateur export``: a pruned directory in a form where its zeros pay."""

from pathlib import Path

import click

from secateur.cli.options import DATA_HELP, debug_option, emit, json_option
from secateur.export.targets import TARGETS


@click.command("export")
@click.argument("directory", metavar="DIR")
@click.option("--to", "target", metavar="TARGET", required=True, help=f"What to write: {', '.join(TARGETS)}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet.")
@click.option("--data", default="embedded", show_default=True, help=f"openvino: text that calibrates, {DATA_HELP}")
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="openvino: windows of it.")
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="openvino: their tokens.")
@json_option
@debug_option
def command(directory: str, target: str, out: Path, data: str, samples: int, seq_len: int, as_json: bool) -> None:
    """Write the model in DIR as TARGET to OUT, and read it back.

    sparse-safetensors is a lossless download format, `secateur unpack` undoes it. openvino is a graph with int8 weights
    and activations; DIR may be any model then, so that the dense one can be exported to compare with. torch-2:4 is for
    GPUs with sparse tensor cores.
    """
    from secateur.exports import ExportOptions, export_to
    from secateur.report.export_page import export_page
    from secateur.report.progress import on_stderr

    with on_stderr() as progress:
        told = export_to(directory, target, out, ExportOptions(data, samples, seq_len=seq_len), progress=progress)
    emit(as_json, told, *export_page(told))
