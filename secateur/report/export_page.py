"""What ``secateur export`` and ``secateur unpack`` print."""

from typing import Any

from rich.console import RenderableType
from rich.text import Text

from secateur.report.tables import command, facts, percent, seconds, size


def export_page(told: dict[str, Any]) -> list[RenderableType]:
    """All of what ``exports.export_to`` returns, and the command that undoes it."""
    sparse, whole, rates = told["sparse"], told["whole"], told["bytes_per_second"]
    rows = {
        "safetensors": f"{size(told['dense_bytes'])} to {size(told['packed_bytes'])}, {percent(told['share'])}",
        "sparse": f"{sparse['tensors']} of {whole['tensors']} tensors, {sparse['elements']:,} weights,"
        f" {size(sparse['dense_bytes'])} to {size(sparse['packed_bytes'])}",
        "bits per weight": _bits(told["bits_per_weight"], told["codes"]["tensors"]),
        "instead": ", ".join(f"{name} {size(count)}" for name, count in told["alternatives"].items())
        or f"see `secateur inspect {told['source']}`",
        "time": ", ".join(f"{name} {seconds(spent)} ({_rate(rates[name])})" for name, spent in told["seconds"].items()),
    }
    return [
        *facts(f"{told['source']} as {told['target']}", rows),
        *(Text(f"warning: {line}", style="yellow") for line in told["warnings"]),
        Text(f"saved to {told['out']}, read back: every tensor is the original's, bit for bit", style="green"),
        command("Next:", "secateur", "unpack", told["out"], "--out", f"{told['out']}-unpacked"),
    ]


def _bits(bits: dict[str, float | None], codes: int) -> str:
    if bits["whole"] is None:
        return f"not known: {codes} matrices hold integer codes"
    sparse = "" if bits["sparse"] is None else f"{bits['sparse']:.2f} in sparse matrices, "
    return f"{sparse}{bits['whole']:.2f} in all, headers included"


def unpack_page(told: dict[str, Any]) -> list[RenderableType]:
    rate = f"{size(told['bytes'])} of safetensors in {seconds(told['seconds']['unpack'])}"
    return [
        Text(f"saved to {told['out']}, byte for byte what was packed", style="green"),
        Text(f"{rate} ({_rate(told['bytes_per_second'])}); every checksum is right"),
    ]


def packed_lines(directory: str) -> list[RenderableType]:
    """What ``secateur inspect`` adds for a packed directory."""
    return [
        Text("packed as sparse safetensors: every tensor's checksum is right", style="green"),
        command("Unpack:", "secateur", "unpack", directory, "--out", f"{directory}-unpacked"),
    ]


def _rate(bytes_per_second: float | None) -> str:
    return "too short to measure" if bytes_per_second is None else f"{bytes_per_second / 1e6:.0f} MB/s"
