"""A model without its weights: the config builds it of tensors that have a shape and no memory, and the headers of the
checkpoint's files are held against it.

Nothing of a weight is read, so a checkpoint of any size takes a moment. The tensors are torch's fake ones rather than
plain meta tensors: forwards of real architectures run on them, so that the adapter finds the blocks and the order of
the linears as it does with weights. What depends on numbers (which phi, whether a replay equals the forward, who is
routed where) is left to the run itself: fused experts answer with the shape of their input.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from secateur.errors import ModelError, SecateurError, first_line
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import load_branches, refuse_branches
from secateur.models.experts import fused_row, routing
from secateur.models.gguf_once import parsed_once
from secateur.models.headers import STORED, Headers, read_headers, shards
from secateur.models.hub import hub_headers
from secateur.models.load import DTYPES, Place, branches_folder, in_one_line, locate, read_config
from secateur.models.quiet import quiet


@dataclass(frozen=True)
class Skeleton:
    """A model of shapes, as the run would load it."""

    model: PreTrainedModel
    source: str
    dtype: torch.dtype
    mode: FakeTensorMode
    file_bytes: int
    """Of the checkpoint's files."""
    gguf: bool

    @contextmanager
    def adapter(self) -> Iterator[DecoderAdapter]:
        """The model as blocks, inside the mode in which it can be run."""
        with self.mode, _structure_in_one_line(self.source):
            stand_in_for_experts(self.model)
            yield DecoderAdapter(self.model)


def skeleton(source: str, dtype: str = "auto") -> Skeleton:
    """Shapes of the model at ``source``; ModelError where config or headers do not make a model that can be pruned."""
    place = locate(source)
    if folder := branches_folder(place):
        refuse_branches(load_branches(folder), source)
    gguf = "gguf_file" in place.options
    with quiet(), parsed_once(), in_one_line(source, place.advice):
        config = read_config(place, source)
        headers, size = stored(place)
        chosen = _dtype(dtype, config.dtype, headers)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
        _check(model, _gguf_shapes(model, gguf_file(place)) if gguf else _renamed(model, headers), source, place.advice)
    model.requires_grad_(False).eval()
    return Skeleton(model, source, chosen, mode, size, gguf)


def linear_weights(directory: Path) -> set[str]:
    """Weights of the linears that the model of a directory consists of; a fused expert's matrices are none."""
    with quiet(), in_one_line(str(directory), "check its config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def stored(place: Place) -> tuple[Headers, int]:
    """What the checkpoint's files say of themselves, and their bytes; a GGUF file is read later."""
    if place.on_hub:
        return hub_headers(place.name)
    if "gguf_file" in place.options:
        return {}, gguf_file(place).stat().st_size
    files = shards(Path(place.name))
    return read_headers(files), sum(file.stat().st_size for file in files)


def stand_in_for_experts(model: PreTrainedModel) -> None:
    """How many tokens an expert sees is a number, and so are the shapes inside it: they are passed over."""

    def answer(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty_like(routing(name, args, kwargs).hidden)

    for name, module in model.named_modules():
        if fused_row(module):
            vars(module)["forward"] = partial(answer, name)


def _dtype(asked: str, of_config: Any, headers: Headers) -> torch.dtype:
    """The type that the run would load: asked for, or the config's, or the stored one (GGUF: float32)."""
    if asked != "auto":
        chosen = DTYPES[asked]
        assert isinstance(chosen, torch.dtype)
        return chosen
    if isinstance(of_config, torch.dtype):
        return of_config
    return next((STORED[kind] for _, kind in headers.values() if kind in STORED), torch.float32)


# ------------------------------------------------------------------------------------------------------------ the check

Found = dict[str, tuple[int, ...] | None]
"""Shapes of stored tensors by the model's names; None where loading builds the tensor from several."""


def _renamed(model: PreTrainedModel, headers: Headers) -> Found:
    """Stored names as the model's, by the rules with which transformers loads."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    wanted, found = model.state_dict(), {}
    for stored, (shape, _) in headers.items():
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and stored in wanted:
            name, converted = stored, None
        found[name] = None if converted else shape
    return found


def gguf_file(place: Place) -> Path:
    return Path(place.name) / place.options["gguf_file"]


def _gguf_shapes(model: PreTrainedModel, path: Path) -> Found:
    """Stored tensors by the model's names; GGUF lists axes from the fastest one."""
    from gguf import GGUFReader

    processor = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    tensors = {
        names[t.name]: tuple(int(n) for n in reversed(t.shape)) for t in GGUFReader(path).tensors if t.name in names
    }
    wanted = model.state_dict()
    return {name: None if sorted(shape) == sorted(wanted[name].shape) else shape for name, shape in tensors.items()}


def _check(model: PreTrainedModel, found: Found, source: str, advice: str) -> None:
    """ModelError for a tensor of the model that is not stored, or in another shape."""
    wanted = model.state_dict()
    excused = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())}
    missing = sorted(name for name in wanted if name not in found and name not in excused)
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} of the model's tensors, such as {missing[0]}; {advice}")
    for name, shape in found.items():
        if name in wanted and shape is not None and shape != tuple(wanted[name].shape):
            shapes = f"{name} is {shape} in the file and {tuple(wanted[name].shape)} by config.json"
            raise ModelError(f"{source}: weights and config do not fit, {shapes}; {advice}")


@contextmanager
def _structure_in_one_line(source: str) -> Iterator[None]:
    """A forward that needs numbers does not run on shapes; torch would log a page about it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        lacks = f"{source} cannot be planned without its weights ({first_line(error)})"
        raise ModelError(f"{lacks}; prune may still do it") from error
    finally:
        log.setLevel(level)
