"""``secateur inspect``: is every promise that a directory records kept by the weights in it?"""

from pathlib import Path

import click

from secateur.cli.options import debug_option, emit, json_option

BROKEN = 1


@click.command("inspect")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--baseline", metavar="MODEL", help="Also check that all that was not pruned is still this model's.")
@json_option
@debug_option
def command(directory: Path, baseline: str | None, as_json: bool) -> int:
    """Check the saved weights in DIR: sparsity, patterns, finiteness, tied weights.

    The exit code is 1 when a promise recorded in DIR is broken. A packed DIR is decoded, and every checksum
    verified; of a quantized one the values of its codes are checked. Bits are counted, and what
    would be smaller is told, with or without promises.
    """
    from secateur.evaluation.inspect import Checkpoint, inspect
    from secateur.export.directory import file_bytes, form_of, is_packed, load_packed, stored_sizes
    from secateur.models.branches import FOLDER
    from secateur.models.load import load
    from secateur.models.sparse24 import dense_state
    from secateur.models.stored import stored_state
    from secateur.quantization.accounting import storage_of
    from secateur.quantization.compressed import Dequantized, is_quantized
    from secateur.report.export_page import packed_lines
    from secateur.report.inspect_page import inspect_tables
    from secateur.report.quantize_page import alternatives, quantized_lines
    from secateur.report.stored_page import room_lines, room_of, room_others

    openers = {"dense": Checkpoint, "sparse-safetensors": load_packed, "torch-2:4": dense_state}
    form, reference = form_of(directory), None
    if baseline is not None:
        reference = stored_state(load(baseline, dtype="auto").model)
    tensors, branches = openers[form](directory), directory / FOLDER
    factors = load_packed(branches) if is_packed(branches) else None
    codes = Dequantized(directory, tensors) if is_quantized(directory) else None
    found = inspect(directory, reference, tensors if codes is None else codes, factors=factors)
    packed, taken = form != "dense", file_bytes(directory)
    storage, room, others = None, None, {}
    lines = packed_lines(found.path) if form == "sparse-safetensors" else []
    if codes is not None:
        zeros = {row.name: (row.zeros, row.promised) for row in found.rows}
        storage = storage_of(codes, zeros, stored_sizes(directory), taken).to_dict()
        others, lines = alternatives(storage), [*lines, *quantized_lines(storage, packed=packed)]
    elif not found.integers:  # how many weights codes of somebody else hold is not known
        room = room_of(found, form, taken)
        others, lines = room_others(room), [*lines, *room_lines(room)]
    told = {**found.to_dict(), "packed": packed, "quantized": storage, "room": room, "alternatives": others}
    emit(as_json, told, *inspect_tables(found), *lines)
    return BROKEN if found.broken else 0
