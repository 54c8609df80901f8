"""A pruned directory as OpenVINO IR with int8 weights and int8 activations: what its sparse kernels multiply.

Only W8A8 pays there: weight-only int8 and bf16 accept the sparse property and ignore it. Scales of activations are
fixed by calibration; weights are rounded to the nearest per row after balancing (``core.int8``), so zeros stay zeros.
The graph is converted twice. In float32 first, where it must give torch's logits, in one go and step by step, or the
export is refused. Then in int8, where no such line can be drawn: a rounding that falls the other way grows from block
to block. What int8 costs is measured on the saved graph, as it runs by default: perplexity, greedy tokens.

Memory: the model in float32 and OpenVINO's copy of it while the first graph is compared.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ModelError, UsageError, first_line
from secateur.export.directory import Watch, dense_names, refuse_stored_branches
from secateur.export.int8 import NO_EXPERTS, Int8Record, calibrate, to_int8
from secateur.export.openvino_graph import convert
from secateur.models.experts import fused_row
from secateur.models.load import Loaded, load
from secateur.models.openvino import (
    MODEL,
    PRECISE,
    RUNTIME,
    SPARSE_RATE,
    VERSION,
    WEIGHTS,
    OpenVINOModel,
    crc32_of,
    lacks_amx,
    openvino,
)
from secateur.models.runners import OpenVINORunner, TorchRunner, greedy
from secateur.models.save import OWN, clear_leftovers, place_of, refuse_nested, refuse_occupied, staged
from secateur.models.skeleton import skeleton

TOLERANCE = 1e-3
"""Largest difference of logits between graph and torch in float32, relative to the largest logit."""
SAME_TEXT = 64
"""Tokens on which the two are compared."""
GREEDY = 32
"""Tokens that are generated to be compared."""
HOW = "ov.Core().compile_model('openvino_model.xml', 'CPU', json.load(open('openvino_runtime.json'))['properties'])"

Measure = Callable[[Any, Int64[Tensor, "n S"]], float]
"""Mean loss of a model, torch's or OpenVINO's, on windows."""


@dataclass(frozen=True)
class OpenVINOOptions:
    """How the int8 graph is made."""

    balance: float = 0.8
    """Share of the size of activations that moves into the weights, 0 to 1. SmoothQuant's own 0.5 costs SmolLM2-135M
    several times as much: weights have a scale for each row, activations one for all (docs/export.md)."""
    rate: float = 0.49
    """OpenVINO packs matrices with at least this share of zeros. Below 50 % nothing was measured to gain."""

    def __post_init__(self) -> None:
        for name in ("balance", "rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} {getattr(self, name)}; wanted a share between 0 and 1")


@dataclass(frozen=True)
class Windows:
    """Of text, cut with the tokenizer of the model."""

    calibration: Int64[Tensor, "n S"]
    held_out: Int64[Tensor, "m S"]


def export_openvino(
    source: str, out: Path, options: OpenVINOOptions, cut: Callable[[Loaded], Windows], measure: Measure, watch: Watch
) -> dict[str, Any]:
    """Write `out`, all of it or nothing, and return what is to be told of it."""
    openvino()
    out = place_of(out)
    _refuse(source, out)
    refuse_occupied(out, overwrite=False)
    with watch.stage("load"):
        loaded = load(source, dtype="float32")
        windows = cut(loaded)
    model, probe = loaded.model, windows.held_out[:1, :SAME_TEXT]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with watch.stage("reference", "measure the model as it is"):
        before = measure(model, windows.held_out)
        wanted = greedy(TorchRunner(model, {}), probe, GREEDY)
    with watch.stage("compare", "convert in float32 and compare"):
        logits_apart = _same_logits(model, probe)
    with watch.stage("calibrate"):
        seen = calibrate(model, _shown(windows.calibration, watch))
        records = to_int8(model, seen, options.balance)
    with staged(out) as stage:
        with watch.stage("convert"):
            graph = convert(model)
            openvino().save_model(graph, stage / MODEL, compress_to_fp16=False)
            del graph
            properties = sparse_properties(records, options.rate)
            _write_rest(loaded, stage, properties)
            tokenizer = _tokenizer(loaded, stage)
        with watch.stage("check", "open it and measure"):
            opened = OpenVINOModel.open(stage)
            after = measure(opened, windows.held_out)
            agreed = _agreed(opened, probe, wanted)
        told = {
            "parameters": parameters,
            "linears": [vars(record) for record in records],
            "properties": properties,
            "packed": sum(will_pack(record, options.rate) for record in records),
            "kernels": opened.kernels(),
            "amx": lacks_amx() is None,
            "tokenizer": tokenizer,
            "logits_apart": logits_apart,
            "nll": {"torch": before, "openvino": after, "windows": list(windows.held_out.shape)},
            "greedy": {"tokens": GREEDY, **agreed},
            "model_bytes": sum((stage / name).stat().st_size for name in (MODEL, WEIGHTS)),
            "dense_bytes": 2 * parameters,
        }
        (stage / OWN).mkdir()
        (stage / OWN / "export.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    clear_leftovers(out)
    return told


def will_pack(record: Int8Record, rate: float) -> bool:
    return record.packable and record.sparsity >= rate


def sparse_properties(records: Iterable[Int8Record], rate: float) -> dict[str, Any]:
    """What ``compile_model`` is given: packing switched on where there is something to pack."""
    return {SPARSE_RATE: rate} if any(will_pack(record, rate) for record in records) else {}


def _agreed(opened: OpenVINOModel, probe: Int64[Tensor, "1 S"], wanted: Int64[Tensor, "1 n"]) -> dict[str, int]:
    """Of torch's greedy tokens: how many are the likeliest here too behind the same text, and how many come out equal
    where the graph is left alone, before the first that does not."""
    logits = opened(torch.cat([probe, wanted[:, :-1]], 1)).logits
    following = logits[:, probe.shape[1] - 1 :].argmax(-1) == wanted
    alone = greedy(OpenVINORunner(opened), probe, wanted.shape[1]) == wanted
    return {"same": int(following.sum()), "before_first_other": int(alone[0].int().cumprod(0).sum())}


def _refuse(source: str, out: Path) -> None:
    """What would fail late, before a weight is read."""
    refuse_stored_branches(Path(source))
    if Path(source).is_dir():
        refuse_nested(out, Path(source).resolve())
        dense_names(Path(source))
        if any(fused_row(module) for module in skeleton(source).model.modules()):
            raise ModelError(NO_EXPERTS)


def _shown(windows: Tensor, watch: Watch) -> Iterable[Tensor]:
    for done, ids in enumerate(windows.split(1), 1):
        yield ids
        watch.progress.update(done, len(windows))


def _write_rest(loaded: Loaded, stage: Path, properties: dict[str, Any]) -> None:
    """Everything beside the graph that others look for, and what to compile it with."""
    loaded.model.config.use_cache = True
    loaded.model.config.save_pretrained(stage)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(stage)
    loaded.tokenizer.save_pretrained(stage)
    sums = {name: crc32_of(stage / name) for name in (MODEL, WEIGHTS)}
    told = {"version": VERSION, "properties": properties, "crc32": sums, "how": HOW}
    (stage / RUNTIME).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _tokenizer(loaded: Loaded, stage: Path) -> str:
    """Written as graphs where openvino-tokenizers knows this kind and gives the same tokens; else why not."""
    try:
        from openvino_tokenizers import convert_tokenizer
    except (ImportError, RuntimeError) as error:
        return f"not converted: openvino-tokenizers is not usable here ({first_line(error)})"
    try:
        pair: Any = convert_tokenizer(loaded.tokenizer, with_detokenizer=True)
    except Exception as error:  # whatever a converter of foreign files raises; the Hugging Face files are there
        return f"not converted: {first_line(error)}"
    text = "The cat (12) sat,\non my été."
    found = openvino().compile_model(pair[0], "CPU")([text])["input_ids"]
    if found[0].tolist() != loaded.tokenizer(text)["input_ids"]:
        return "not converted: openvino-tokenizers gives other tokens than Hugging Face"
    for name, graph in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), pair, strict=True):
        openvino().save_model(graph, stage / name)
    return "converted"


@torch.inference_mode()
def _same_logits(model: PreTrainedModel, probe: Int64[Tensor, "B S"]) -> float:
    """The largest difference, in one go and step by step. ModelError where it is no rounding."""
    wanted = model(input_ids=probe, use_cache=False).logits
    graph = OpenVINOModel.of(convert(model), model.config, PRECISE)
    whole = graph(probe).logits
    graph.start()
    half = probe.shape[1] // 2
    stepped = torch.cat([graph.step(piece) for piece in probe.tensor_split([half, half + 1], 1) if piece.shape[1]], 1)
    apart = max(float((got - wanted).abs().max() / wanted.abs().max()) for got in (whole, stepped))
    if not apart < TOLERANCE:
        raise ModelError(
            f"OpenVINO's float32 logits differ from torch's by {apart:.1e} of the largest, wanted below {TOLERANCE:g};"
            " this architecture cannot be exported to openvino yet"
        )
    return apart
