"""A directory that ``secateur export --to openvino`` wrote, opened with stock OpenVINO and run step by step.

    openvino_model.xml, .bin       the graph: input_ids, attention_mask, position_ids, beam_idx -> logits; keys and
                                   values of past tokens are kept inside
    openvino_runtime.json          {"version": 1, "properties": {...} for ``compile_model``, "crc32": {FILE: number}}
    openvino_tokenizer.xml, ...    where openvino-tokenizers had it

OpenVINO tells its maker about every import; here it is imported with that switched off.
"""

import json
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoConfig

from secateur.errors import ArtefactError, DeviceError

MODEL, WEIGHTS, RUNTIME = "openvino_model.xml", "openvino_model.bin", "openvino_runtime.json"
VERSION = 1
"""Of ``openvino_runtime.json``."""
SPARSE_RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
"""OpenVINO's property: matrices with at least this share of zeros are kept without them, where the kernels exist."""
INSTALL = "`pip install -e '.[openvino]'` in the clone"
AGAIN = "export it again"
PIECE = 1 << 22
"""Bytes that are checked at one time."""
CPUINFO = Path("/proc/cpuinfo")
"""Where Linux tells what the processor can."""
PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""All that is not int8 in float32, to compare numbers; by default OpenVINO takes less where the processor can."""


def openvino() -> ModuleType:
    """The package; DeviceError where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    try:
        import openvino as package
    except ImportError as error:
        raise DeviceError(f"openvino is not installed here ({error}); install it with {INSTALL}") from error
    return package


def lacks_amx() -> str | None:
    """Why sparse kernels will not be picked on this processor, in one line; None where they may be."""
    flags = CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else ""
    if "amx_int8" in flags.split():
        return None
    return (
        "this processor has no amx_int8: OpenVINO's kernels for sparse weights exist for Intel Xeons from the 4th "
        "generation on, here zeros bring neither speed nor memory"
    )


def is_openvino(directory: Path) -> bool:
    return (directory / MODEL).is_file()


def read_runtime(directory: Path, checked: bool = False) -> dict[str, Any]:
    """What ``compile_model`` is to be given. ArtefactError where it is missing, damaged or from a later version.

    ``checked``: the files were just compared with their checksums, and are not read for it again.
    """
    path = directory / RUNTIME
    if not path.is_file() or not is_openvino(directory):
        raise ArtefactError(f"{directory} lacks {MODEL} or {RUNTIME}; give what `secateur export --to openvino` wrote")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version, properties, sums = told["version"], dict(told["properties"]), dict(told["crc32"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
    if version != VERSION:
        update = f"this secateur reads {VERSION}; update secateur, or {AGAIN}"
        raise ArtefactError(f"{path} is of version {version}, {update}")
    for name in () if checked else (MODEL, WEIGHTS):
        if not (directory / name).is_file() or crc32_of(directory / name) != sums.get(name):
            raise ArtefactError(
                f"{directory / name} is damaged: its checksum is not that of {RUNTIME}; copy or {AGAIN}"
            )
    return properties


def crc32_of(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found = zlib.crc32(piece, found)
    return found


@dataclass
class OpenVINOModel:
    """The compiled graph and how many tokens each row has seen. Looks like a model to who measures perplexity."""

    compiled: Any
    request: Any
    config: Any
    seen: int = 0
    training: ClassVar[bool] = False
    device: ClassVar[torch.device] = torch.device("cpu")
    dtype: ClassVar[torch.dtype] = torch.int8

    @classmethod
    def open(
        cls, directory: Path, *, threads: int | None = None, last_only: bool = False, checked: bool = False
    ) -> "OpenVINOModel":
        """Compile for the CPU. ``last_only``: logits of the last token alone, as who generates wants them.

        ``checked`` as ``read_runtime`` has it.
        """
        ov, properties = openvino(), read_runtime(directory, checked)
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = ov.Core().read_model(directory / MODEL)
            if last_only:
                _slice_last(ov, graph)
            return cls.of(graph, AutoConfig.from_pretrained(directory), properties)
        except RuntimeError as error:
            line = next((line for line in reversed(str(error).splitlines()) if line.strip()), "unknown")
            raise ArtefactError(f"OpenVINO cannot open {directory}: {line.strip()}; copy or {AGAIN}") from error

    @classmethod
    def of(cls, graph: Any, config: Any, properties: dict[str, Any]) -> "OpenVINOModel":
        compiled = openvino().Core().compile_model(graph, "CPU", properties)
        return cls(compiled, compiled.create_infer_request(), config)

    def start(self) -> None:
        """Forget all tokens."""
        self.request.reset_state()
        self.seen = 0

    def step(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Logits of the next tokens, which are remembered."""
        B, S = ids.shape
        self.seen += S
        inputs = {
            "input_ids": ids.numpy(),
            "attention_mask": torch.ones(B, self.seen, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(self.seen - S, self.seen).repeat(B, 1).numpy(),
            "beam_idx": torch.arange(B, dtype=torch.int32).numpy(),
        }
        self.request.infer(inputs, share_inputs=True)
        return torch.from_numpy(self.request.get_tensor("logits").data.copy())

    def __call__(self, input_ids: Int[Tensor, "B S"], use_cache: bool = False) -> SimpleNamespace:
        """Logits of whole rows, from nothing."""
        self.start()
        return SimpleNamespace(logits=self.step(input_ids))

    def kernels(self) -> dict[str, int]:
        """What OpenVINO picked for the matrices, and how often: names end in the type that is multiplied."""
        info = [op.get_rt_info() for op in self.compiled.get_runtime_model().get_ops()]
        picked = [_word(one, "primitiveType") for one in info if _word(one, "layerType") == "FullyConnected"]
        return dict(Counter(picked).most_common())


def _word(info: Any, key: str) -> str:
    return info[key].astype(str) if key in info else ""


def _slice_last(ov: ModuleType, model: Any) -> None:
    """Cut the last token out before the head multiplies. A graph that ends otherwise stays as it is."""
    node = next(result for result in model.get_results() if "logits" in result.get_output_tensor(0).get_names())
    while node.get_type_name() != "MatMul":
        if not node.get_input_size():
            return
        node = node.input_value(0).get_node()
    ops = ov.opset13
    bounds = [ops.constant([value], dtype="int64") for value in (-1, 2**31 - 1, 1, 1)]
    node.input(0).replace_source_output(ops.slice(node.input_value(0), *bounds).output(0))
    model.validate_nodes_and_infer_types()
