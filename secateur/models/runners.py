"""One way to run a saved model for every runtime: a prompt, then token by token. What ``bench`` times.

A runner begins anew with every ``prefill`` and goes on with ``decode``; both take token ids (B, S) and return the
likeliest next ones (B, 1) on the CPU, so that whoever waits for them has waited for the device.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from secateur.errors import DeviceError, UsageError
from secateur.models.branches import FOLDER
from secateur.models.caches import cache_argument
from secateur.models.codes import made_of_codes
from secateur.models.load import check_device, load, locate
from secateur.models.openvino import MODEL, WEIGHTS, OpenVINOModel, is_openvino, lacks_amx, openvino, read_runtime
from secateur.models.sparse24 import is_sparse24, load_sparse
from secateur.models.sparse24_loader import SUFFIX, lacks


class Opened(NamedTuple):
    """How a model is to be opened."""

    source: str
    threads: int
    dtype: str
    """Of transformers: "auto" keeps the checkpoint's."""
    device: str
    tokens: int
    """Multiplied at once, for runtimes that choose kernels by it."""


class Runner(Protocol):
    """An open model."""

    config: Any

    def prefill(self, ids: Tensor) -> Tensor: ...
    def decode(self, ids: Tensor) -> Tensor: ...
    def facts(self) -> dict[str, Any]:
        """Kernels and types, what there is to say."""
        ...


def greedy(runner: Runner, ids: Tensor, tokens: int) -> Tensor:
    """The likeliest next tokens, one after the other."""
    found = [runner.prefill(ids)]
    while len(found) < tokens:
        found.append(runner.decode(found[-1]))
    return torch.cat(found, 1)


class TorchRunner:
    """A transformers model, its matrices whatever they are."""

    def __init__(self, model: PreTrainedModel, facts: dict[str, Any]):
        self.model, self.config, self._facts = model, model.config, facts
        self.argument, self.cache = cache_argument(model), DynamicCache()
        takes = inspect.signature(type(model).forward).parameters
        self.more = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.config)
        return self.decode(ids)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        place = ids.to(self.model.device)
        logits = self.model(input_ids=place, use_cache=True, **{self.argument: self.cache}, **self.more).logits
        return logits[:, -1:].argmax(-1).cpu()

    def facts(self) -> dict[str, Any]:
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "device": str(self.model.device), **self._facts}


class OpenVINORunner:
    """A stateful graph."""

    def __init__(self, model: OpenVINOModel):
        self.model, self.config = model, model.config

    def prefill(self, ids: Tensor) -> Tensor:
        self.model.start()
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        return self.model.step(ids)[:, -1:].argmax(-1)

    def facts(self) -> dict[str, Any]:
        return {"dtype": "int8", "device": "cpu", "kernels": self.model.kernels(), "lacks": lacks_amx()}


def _transformers(opened: Opened) -> Runner:
    torch.set_num_threads(opened.threads)
    loaded = load(opened.source, dtype=opened.dtype, codes=True)
    torch.nn.Module.to(loaded.model, opened.device)
    codes = made_of_codes(loaded.folder)
    return TorchRunner(loaded.model, {"codes": codes} if codes else {})


def _openvino(opened: Opened) -> Runner:
    model = OpenVINOModel.open(Path(opened.source), threads=opened.threads, last_only=True, checked=True)
    return OpenVINORunner(model)


def _two_of_four(opened: Opened) -> Runner:
    model, report = load_sparse(opened.source, tokens=opened.tokens)
    return TorchRunner(model, {"chosen": [choice._asdict() for choice in report]})


def _check_transformers(source: str, device: str) -> None:
    locate(source)
    check_device(device)


def _check_openvino(source: str, device: str) -> None:
    openvino()
    read_runtime(Path(source))


def _check_two_of_four(source: str, device: str) -> None:
    if lacking := lacks():
        raise DeviceError(lacking)


class Runtime(NamedTuple):
    """One way to open what lies in a directory."""

    open: Callable[[Opened], Runner]
    """Takes what ``check`` let pass."""
    check: Callable[[str, str], object]
    """Refuses, before any process starts, what cannot be run here; takes a source and a device."""
    imports: Callable[[], object]
    """What it needs beside torch and transformers, so that memory can be told apart from the model's."""
    fits: Callable[[Path], bool]
    files: tuple[str, ...]
    """Patterns of the files that hold the weights."""


RUNTIMES = {
    "openvino": Runtime(_openvino, _check_openvino, openvino, is_openvino, (MODEL, WEIGHTS)),
    "torch-2:4": Runtime(_two_of_four, _check_two_of_four, tuple, is_sparse24, (f"*{SUFFIX}",)),
    "transformers": Runtime(
        _transformers,
        _check_transformers,
        tuple,
        lambda _: True,
        ("*.safetensors", "*.gguf", f"{FOLDER}/*.safetensors"),
    ),
}
"""Asked in this order; transformers opens whatever ``load`` does."""


def runtime_of(source: str, wanted: str = "auto") -> str:
    """The runtime of a directory. UsageError where another is wanted than the directory is for."""
    found = next(name for name, runtime in RUNTIMES.items() if runtime.fits(Path(source)))
    if wanted in ("auto", found):
        return found
    if found != "transformers":
        raise UsageError(f"{source} was exported to {found} and {wanted} is wanted; give another directory")
    command = f"secateur export {source} --to {wanted} --out DIR"
    raise UsageError(f"{source} is not for {wanted}; first run `{command}` and give that DIR")


def file_bytes(source: str, runtime: str) -> int:
    """Of the files that hold the weights."""
    place = Path(source) if runtime != "transformers" else _folder(source)
    if place.is_file():
        return place.stat().st_size
    return sum(path.stat().st_size for pattern in RUNTIMES[runtime].files for path in place.glob(pattern))


def _folder(source: str) -> Path:
    place = locate(source)
    return Path(place.name, place.options.get("gguf_file", "")) if os.path.isdir(place.name) else Path(source)
