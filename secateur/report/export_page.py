"""What ``secateur export`` and ``secateur unpack`` print."""

from collections.abc import Callable
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from secateur.report.runtimes import sizes_said
from secateur.report.tables import command, facts, percent, seconds, size


def export_page(told: dict[str, Any]) -> list[RenderableType]:
    """All of what ``exports.export_to`` returns, and the command that goes on from there."""
    rows, *after = PAGES[told["target"]](told)
    return [
        *facts(f"{told['source']} as {told['target']}", rows),
        *(Text(f"warning: {line}", style="yellow") for line in told["warnings"]),
        *after,
    ]


def _sparse_safetensors(told: dict[str, Any]) -> tuple[Any, ...]:
    sparse, codes, whole = told["sparse"], told["codes"], told["whole"]
    found = f"{sparse['tensors']} of {whole['tensors']} tensors, {sparse['elements']:,} weights, {_shrunk(sparse)}"
    rows = {
        "safetensors": f"{_shrunk(told)}, {percent(told['share'])}",
        **({"sparse": found} if sparse["tensors"] or not codes["tensors"] else {}),
        **({"codes": f"{codes['tensors']} tensors, {_shrunk(codes)}"} if codes["tensors"] else {}),
        "bits per weight": _bits(told["bits_per_weight"]),
        "instead": sizes_said(told["alternatives"]) or UNREAD,
        "time": _rates(told),
    }
    return (
        rows,
        Text(f"saved to {told['out']}, read back: every tensor is the original's, bit for bit", style="green"),
        command("Next:", "secateur", "unpack", told["out"], "--out", f"{told['out']}-unpacked"),
    )


def _openvino(told: dict[str, Any]) -> tuple[Any, ...]:
    text, perplexity, greedy = told["text"], told["perplexity"], told["greedy"]
    mean = sum(row["sparsity"] for row in told["linears"]) / len(told["linears"])
    rows = {
        "files": f"{size(told['model_bytes'])}, {size(told['dense_bytes'])} in 16 bit: zeros are stored, and packed"
        " when the model is compiled",
        "bits per weight": f"{8 * told['model_bytes'] / told['parameters']:.2f} in all",
        "instead": sizes_said(told["alternatives"]),
        "linears": f"{len(told['linears'])}, {percent(mean)} zero; {told['packed']} to be packed {told['properties']}",
        "kernels": f"{kernels(told['kernels'])} on this machine",
        "perplexity": f"{perplexity['torch']:.4g} in float32, {perplexity['openvino']:.4g} here"
        f" ({told['gap']:+.3f} in log), {told['nll']['windows'][0]} x {text['seq_len']} tokens of {text['name']}",
        "greedy tokens": f"{greedy['same']} of torch's {greedy['tokens']} are the likeliest here behind the same text;"
        f" alone, the first {greedy['before_first_other']} are the same",
        "graph": f"float32 logits within {told['logits_apart']:.0e} of torch's, of the largest, at once and in steps",
        "tokenizer": told["tokenizer"],
        "time": ", ".join(f"{name} {seconds(spent)}" for name, spent in told["seconds"].items()),
    }
    return (
        rows,
        Text(f"saved to {told['out']}, opened again", style="green"),
        *against_dense(told),
    )


def against_dense(told: dict[str, Any]) -> list[RenderableType]:
    """How the dense model is exported alike, and measured beside this one; of a dense model nothing."""
    if told["dense"] == told["source"]:
        return []
    text = {"--data": told["text"]["name"], "--samples": told["text"]["samples"], "--seq-len": told["text"]["seq_len"]}
    flags = [str(word) for pair in text.items() for word in pair]
    return [
        command("Dense:", "secateur", "export", told["dense"], "--to", "openvino", *flags, "--out", "dense-ov"),
        command("Next:", "secateur", "bench", "dense-ov", told["out"]),
    ]


def _two_of_four(told: dict[str, Any]) -> tuple[Any, ...]:
    rows = {
        "safetensors": f"{_shrunk(told)}, {percent(told['share'])}",
        "2:4": f"{len(told['matrices'])} matrices",
        "bits per weight": _bits(told["bits_per_weight"]),
        "instead": sizes_said(told["alternatives"]),
        "time": _rates(told),
    }
    code = f"model, report = secateur.load_sparse({told['out']!r})"
    return (
        rows,
        Text(f"saved to {told['out']}, read back: every weight is the original's", style="green"),
        Text.assemble(("On a GPU:  ", "bold"), (code, "cyan")),
    )


PAGES: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "sparse-safetensors": _sparse_safetensors,
    "openvino": _openvino,
    "torch-2:4": _two_of_four,
}
"""By target: the rows, then the lines below them."""


def _shrunk(told: dict[str, Any]) -> str:
    return f"{size(told['dense_bytes'])} to {size(told['packed_bytes'])}"


def _rates(told: dict[str, Any]) -> str:
    """Seconds of every stage, and bytes of dense weights a second."""
    rates = told["bytes_per_second"]
    return ", ".join(f"{name} {seconds(spent)} ({_rate(rates[name])})" for name, spent in told["seconds"].items())


def kernels(picked: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in picked.items())


PARTS = {
    "sparse": "in sparse matrices",
    "quantized": "in quantized linears, scales included",
    "whole": "in all, headers included",
}
"""Of a model, and how bits of a weight in them are told."""
UNREAD = "not known: it holds integers, and no codes that secateur can read"


def _bits(bits: dict[str, float | None]) -> str:
    known = [f"{bits[part]:.2f} {words}" for part, words in PARTS.items() if bits.get(part) is not None]
    return ", ".join(known) if bits["whole"] is not None else UNREAD


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
