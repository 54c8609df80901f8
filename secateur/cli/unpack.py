"""``secateur unpack``: the dense directory that was packed, byte for byte."""

from pathlib import Path

import click

from secateur.cli.options import debug_option, emit, json_option


@click.command("unpack")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write; must not exist yet.")
@json_option
@debug_option
def command(directory: Path, out: Path, as_json: bool) -> None:
    """Unpack DIR, which `secateur export --to sparse-safetensors` wrote, to OUT."""
    from secateur.exports import unpack
    from secateur.report.export_page import unpack_page
    from secateur.report.progress import on_stderr

    with on_stderr() as progress:
        told = unpack(directory, out, progress=progress)
    emit(as_json, told, *unpack_page(told))
