"""``secateur export``: a pruned directory in a form where its zeros pay."""

from pathlib import Path

import click

from secateur.cli.options import debug_option, emit, json_option


@click.command("export")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--to", "target", metavar="TARGET", required=True, help="What to write: sparse-safetensors.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet.")
@json_option
@debug_option
def command(directory: Path, target: str, out: Path, as_json: bool) -> None:
    """Write the model in DIR as TARGET to OUT, and read it back.

    sparse-safetensors is a lossless download format: a mask, what is not zero, zstd. `secateur unpack` undoes it.
    """
    from secateur.exports import export_to
    from secateur.report.export_page import export_page
    from secateur.report.progress import on_stderr

    with on_stderr() as progress:
        told = export_to(directory, target, out, progress=progress)
    emit(as_json, told, *export_page(told))
