"""What ``secateur quantize`` prints, and what ``secateur inspect`` adds for a quantized directory."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from secateur.report.runtimes import CLEARLY, competitors, sizes_said, smaller_lines
from secateur.report.tables import (
    command,
    eval_command,
    facts,
    memory_of,
    percent,
    size,
    skipped_lines,
    text_name,
    time_of,
    warning_lines,
)


def alternatives(storage: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the whole model by what else could become of the quantized linears."""
    return competitors(storage["weights"] + storage["other_weights"], storage["weights"], storage["inputs"])


def storage_warnings(storage: Mapping[str, Any], others: Mapping[str, float], *, packed: bool = False) -> list[str]:
    """What makes the result a poor bargain. ``packed``: its zeros are left out already."""
    made = storage["code_bytes"] + storage["side_bytes"] + storage["other_bytes"]
    lines = smaller_lines(made, others)
    if storage["pruned"] > CLEARLY * storage["weights"] and not packed:
        lines.append(
            f"{percent(storage['pruned'] / storage['weights'])} zeros take as much room here as any code: the dense "
            f"model quantized alike has the same {size(made)}; a smaller download with `secateur export --to "
            "sparse-safetensors`"
        )
    return lines


def storage_rows(storage: Mapping[str, Any], others: Mapping[str, float]) -> dict[str, str]:
    """Bits and bytes, line by line."""
    group = f"groups of {storage['group_size']}" if storage["group_size"] else "one scale an output row"
    kind = "symmetric" if storage["symmetric"] else "asymmetric"
    inputs = {"none": "", "dynamic": ", inputs int8, dynamic", "static": ", inputs int8, static"}[
        storage["activations"]
    ]
    return {
        "stored as": f"{storage['format']}, int{storage['bits']}, {group}, {kind}{inputs}",
        "bits per weight": f"{storage['bits_per_weight']:.3f} in {storage['linears']} quantized linears, scales and "
        f"zero points included; {storage['masked_bits_per_weight']:.3f} with a bitmask and no codes of zeros; "
        f"{storage['whole_bits_per_weight']:.3f} in all, embeddings included",
        "against 16 bit": f"{16 / storage['bits_per_weight']:.1f} times smaller as stored, with a bitmask "
        f"{16 / storage['masked_bits_per_weight']:.1f}",
        "as papers count": f"{storage['nominal']:.1f} times smaller: non-zero codes alone, from 32 bit",
        "files": f"{size(storage['file_bytes'])}: codes {size(storage['code_bytes'])}, scales and zero points "
        f"{size(storage['side_bytes'])}, all else {size(storage['other_bytes'])}",
        "instead": sizes_said(others),
    }


def quantized_lines(storage: Mapping[str, Any], *, packed: bool) -> list[RenderableType]:
    """What ``secateur inspect`` adds."""
    others = alternatives(storage)
    warnings = storage_warnings(storage, others, packed=packed)
    return [*facts("quantized", storage_rows(storage, others)), *warning_lines(warnings)]


def quantize_summary(report: Mapping[str, Any]) -> list[RenderableType]:
    """What was done, and the command that measures it."""
    recipe, zeros, data = report["recipe"], report["zeros"], report["data"]
    error = report["output_error"]
    text = f"{text_name(data['name'])}, {data['samples']} x {data['seq_len']} tokens, seed {report['seed']}"
    rows = {
        "quantized": f"{report['linears']} linears in {report['blocks']['quantized']} of {report['blocks']['total']} "
        f"blocks, {report['weights']:,} weights",
        "zeros": f"{percent(zeros['before'] / report['weights'])} before, "
        f"{percent(zeros['after'] / report['weights'])} after; patterns {', '.join(report['patterns'][:4])}",
        **storage_rows(report["storage"], report["alternatives"]),
        "text": text if data["needed"] else "none: rtn looks at the weights alone",
        **_balanced(report["balance"], recipe["balance"]),
        "output error": "not measured"
        if error is None
        else f"{error['mean']:.4f} mean over blocks, {error['last']:.4f} last block (share of a block's work lost)",
        "dropped rows": str(report["dropped_rows"]),
        "skipped": skipped_lines(report["skipped"]),
        "time": time_of(report["seconds"]),
        "peak memory": memory_of(report),
    }
    source = report["model"]["source"]
    return [
        *facts(f"{source} quantized with {recipe['method']}: {report['scheme']}", rows),
        *warning_lines(report["warnings"]),
        Text(f"saved to {report['out']}, opened again: every weight comes back, no zero is lost", style="green"),
        command("Next:", *eval_command(report["out"], source, dict(data))),
    ]


def _balanced(told: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Said only where it was asked for."""
    if kind == "none":
        return {}
    refused = (
        f"; not possible at {len(told['refused'])} places, such as {told['refused'][0]}" if told["refused"] else ""
    )
    return {"balanced": f"{kind}, folded at {told['folded']} places{refused}"}
