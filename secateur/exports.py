"""Exporting from Python: ``export_to`` and ``unpack``, behind the two verbs, and what they tell.

    told = export_to("pruned", "sparse-safetensors", "packed")
    told["share"], told["bits_per_weight"]
    unpack("packed", "again")             # the bytes of "pruned"

A share says nothing by itself: the same weights could have been quantized instead. What that takes stands beside it.
"""

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.data.sources import read_texts
from secateur.data.tokens import check_seq_len, eval_windows, sample_windows, tokenize
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.inspect import Checkpoint
from secateur.evaluation.perplexity import window_losses
from secateur.export.directory import file_bytes, pack_directory, stored_sizes, unpack_directory
from secateur.export.openvino import OpenVINOOptions, Windows, export_openvino
from secateur.export.sizes import Sizes
from secateur.export.sparse24 import export_sparse24
from secateur.export.targets import check_target
from secateur.models.load import Loaded
from secateur.models.openvino import lacks_amx
from secateur.quantization.accounting import storage_of
from secateur.quantization.compressed import Dequantized, is_quantized
from secateur.report.facts import Stopwatch
from secateur.report.progress import Progress
from secateur.report.quantize_page import alternatives, storage_warnings
from secateur.report.runtimes import competitors, smaller_lines
from secateur.teachers import dense_original

Path_ = str | os.PathLike[str]
CALIBRATED = ("openvino",)
"""Targets that look at ``ExportOptions``."""
LOST = 0.05
"""Log-perplexity above the original's from which on int8 is warned of."""


@dataclass(frozen=True)
class ExportOptions:
    """What only some targets ask for."""

    data: str = "embedded"
    """Text that calibrates and checks an int8 graph, as in ``PruneConfig``."""
    samples: int = 32
    """Windows that calibrate."""
    held_out: int = 8
    """Windows that check, of the text's evaluation part; of a text without parts the first ones, which then do not
    calibrate."""
    seq_len: int = 512
    """Tokens of a window; never more than the model's context."""
    seed: int = 0
    openvino: OpenVINOOptions = field(default_factory=OpenVINOOptions)

    def __post_init__(self) -> None:
        for name in ("samples", "held_out"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}; wanted at least 1")


def export_to(
    directory: Path_, target: str, out: Path_, options: ExportOptions | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `directory` as `target` to `out`, a directory that does not exist yet, and read it back.

    UsageError for an unknown target, one that does not fit or has no use for `options`, or an occupied `out`;
    ArtefactError for a directory that is not sound; DeviceError where something is not installed.
    """
    check_target(target)
    if options and target not in CALIBRATED:
        raise UsageError(
            f"data, samples and seq-len calibrate {', '.join(CALIBRATED)} and not {target}; leave them out"
        )
    watch = Stopwatch(progress)
    told = WRITERS[target](os.fspath(directory), Path(out), options or ExportOptions(), watch)
    seconds = watch.seconds
    rates = {name: _rate(told["dense_bytes"], spent) for name, spent in seconds.items()}
    places = {"target": target, "source": os.fspath(directory), "out": os.fspath(out)}
    return {**places, **told, "seconds": seconds, "bytes_per_second": rates}


def _packed(source: str, out: Path, options: ExportOptions, watch: Stopwatch) -> dict[str, Any]:
    sizes = pack_directory(Path(source), out, watch)
    told, coded = sizes.to_dict(), _coded(Path(source), out)
    if coded is None:
        others = _instead_of_sparse(sizes)
        return {**told, "alternatives": others, "warnings": warnings(sizes, others)}
    told["bits_per_weight"] |= {"quantized": coded["bits_per_weight"], "whole": coded["whole_bits_per_weight"]}
    others = alternatives(coded)
    return {**told, "alternatives": others, "warnings": storage_warnings(coded, others, packed=True)}


def _two_of_four(source: str, out: Path, options: ExportOptions, watch: Stopwatch) -> dict[str, Any]:
    if is_quantized(Path(source)):
        _check_codes(source)
    told = export_sparse24(Path(source), out, watch)
    coded = _coded(Path(source), out)
    others = alternatives(coded) if coded else _instead(told["elements"], told["matrices"].values())
    left = told["left_dense"]
    said = [f"promised matrices stored with their zeros: {len(left)}, the first {left[0]}"] if left else []
    return {**told, "alternatives": others, "warnings": said + smaller_lines(told["packed_bytes"], others)}


def _coded(source: Path, out: Path) -> dict[str, Any] | None:
    """Bits and bytes of a quantized directory as `out` stores it; None where there are no codes that we can read.

    That stops no export: a download needs neither the library of the codes nor their meaning.
    """
    if not is_quantized(source):
        return None
    try:
        held = Dequantized(source, Checkpoint(source))
        return storage_of(held, {}, stored_sizes(out), file_bytes(out)).to_dict()
    except (SecateurError, KeyError):
        return None


def _check_codes(source: str) -> None:
    """UsageError for codes that no sparse product takes as they are."""
    held = Dequantized(Path(source), Checkpoint(Path(source)))
    weights, inputs = held.scheme.weights, held.scheme.input_activations
    fits = weights.num_bits == 8 and weights.symmetric and weights.strategy == "channel"
    if not (fits and inputs is not None and inputs.dynamic):
        raise UsageError(
            f"{source} holds int{weights.num_bits} codes ({held.format}); sparse products take int8 rows of weights "
            "and int8 inputs rounded as they come: quantize with --bits 8 --activations dynamic, or export the model "
            "as it was before"
        )


def _openvino(source: str, out: Path, options: ExportOptions, watch: Stopwatch) -> dict[str, Any]:
    told = export_openvino(source, out, options.openvino, lambda loaded: _windows(loaded, options), _loss, watch)
    nll = told["nll"]
    gap = nll["openvino"] - nll["torch"]
    perplexity = {name: _exp(nll[name]) for name in ("torch", "openvino")}
    said = [lacks_amx()]
    said.append(f"int8 costs {gap:+.3f} of log-perplexity" if not gap < LOST else None)
    said.append(None if told["packed"] else "no matrix has enough zeros to be packed: sparse kernels stay off")
    text = {"name": options.data, "samples": options.samples, "seq_len": nll["windows"][1]}
    others = _instead(told["parameters"], [row["shape"] for row in told["linears"]])
    said += smaller_lines(told["model_bytes"], others)
    return {
        **told,
        "dense": dense_original(source),
        "text": text,
        "perplexity": perplexity,
        "gap": gap,
        "alternatives": others,
        "warnings": [line for line in said if line],
    }


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _windows(loaded: Loaded, options: ExportOptions) -> Windows:
    """Windows that calibrate, at random, and others that check."""
    context = getattr(loaded.model.config, "max_position_embeddings", None) or options.seq_len
    seq_len = min(options.seq_len, context)
    check_seq_len(seq_len, context)
    shown, held = read_texts(options.data, "calibration"), read_texts(options.data, "evaluation")
    tokens = tokenize(held, loaded.tokenizer)
    check = eval_windows(tokens, seq_len, options.held_out)
    local = shown.provenance["sha256"] == held.provenance["sha256"]  # a file, of which the rest calibrates
    tokens = tokens[check.numel() :] if local else tokenize(shown, loaded.tokenizer)
    return Windows(sample_windows(tokens, options.samples, seq_len, torch.Generator().manual_seed(options.seed)), check)


def _loss(model: Any, windows: torch.Tensor) -> float:
    losses = [window_losses(model, ids) for ids in windows.split(1)]
    return float(torch.cat(losses).mean())


WRITERS: dict[str, Callable[[str, Path, ExportOptions, Stopwatch], dict[str, Any]]] = {
    "sparse-safetensors": _packed,
    "openvino": _openvino,
    "torch-2:4": _two_of_four,
}
"""What each target of ``export.targets`` runs."""


def unpack(directory: Path_, out: Path_, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the dense directory that was packed, byte for byte, to `out`, a directory that does not exist yet.

    UsageError for an occupied `out`; ArtefactError for a damaged directory, or one from a later version.
    """
    watch = Stopwatch(progress)
    count = unpack_directory(Path(directory), Path(out), watch)
    rate = _rate(count, watch.total)
    return {
        "source": os.fspath(directory),
        "out": os.fspath(out),
        "bytes": count,
        "seconds": watch.seconds,
        "bytes_per_second": rate,
    }


def _rate(count: int, spent: float) -> float | None:
    return count / spent if spent else None


def _instead_of_sparse(sizes: Sizes) -> dict[str, float]:
    """Bytes of the whole model by what else could become of the pruned matrices; none of codes that nobody can read."""
    return {} if sizes.codes.tensors else _instead(sizes.whole.elements, sizes.matrices.values())


def _instead(elements: int, shapes: Collection[Sequence[int]]) -> dict[str, float]:
    """The same of matrices of these shapes in a model of so many numbers."""
    return competitors(elements, sum(map(math.prod, shapes)), {shape[-1] for shape in shapes})


def warnings(sizes: Sizes, others: dict[str, float]) -> list[str]:
    """What makes the result a poor bargain."""
    if not sizes.sparse.tensors and not sizes.codes.tensors:
        return ["no floating-point matrix is sparse: what was saved is compression of dense numbers, prune first"]
    return smaller_lines(sizes.packed_bytes, others)
