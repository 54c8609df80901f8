"""The compressed-tensors form, which transformers and vLLM load: written and read by the library of that name.

A linear's ``weight`` becomes ``weight_packed`` (codes of any width in int32 words, bits side by side: pack-quantized)
or int8 codes under its old name (int-quantized, which int8 activations ask for), beside ``weight_scale`` and, where the
grid is asymmetric, a packed ``weight_zero_point``; ``input_scale`` where activations have a static one. Which of the
two forms it is, the library decides. Everything else is stored as it was. ``config.json`` says the scheme, and never
has a ``sparsity_config``: current vLLM refuses a model that does.

Zeros survive because a code of 0 stands for 0.0 exactly; nothing in this format knows that they are there, so they take
as much room as any other code.
"""

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.core.grid import Scheme
from secateur.errors import ArtefactError, UsageError, first_line
from secateur.models.codes import INSTALL, METHOD, PACKAGE
from secateur.models.grids import grid_of, largest_input
from secateur.models.save import save

Activations = Literal["none", "dynamic", "static"]


def library(name: str = "") -> Any:
    """The library's package, or a module of it; UsageError where it is not installed."""
    try:
        return import_module(f"{PACKAGE}{name}")
    except ImportError as error:
        raise UsageError(f"quantized models need compressed-tensors ({error}); install it with {INSTALL}") from None


def layer_scheme(scheme: Scheme, activations: Activations) -> Any:
    """The library's QuantizationScheme of all quantized linears, its format settled."""
    q = library(".quantization")
    args: dict[str, Any] = {"num_bits": scheme.bits, "symmetric": scheme.symmetric, "type": "int"}
    args |= {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    inputs = {
        "none": None,
        "dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        "static": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    }[activations]
    made = q.QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    made.format = library(".compressors.format").infer_module_format(nn.Linear, made)
    return made


def _codec(scheme: Any) -> tuple[str, Any]:
    """The format that the library takes such a scheme to have, and what turns weights into codes and back."""
    told = scheme.format or library(".compressors.format").infer_module_format(nn.Linear, scheme)
    name = str(getattr(told, "value", told))
    return name, library(".compressors").BaseCompressor.get_value_from_registry(name)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    linears: Mapping[str, nn.Linear],
    scheme: Scheme,
    activations: Activations,
) -> None:
    """Save a model whose ``linears`` carry their grids into an existing directory. The model stays as it is."""
    scheme_there = layer_scheme(scheme, activations)
    state = model.state_dict()
    for name, linear in linears.items():
        del state[f"{name}.weight"]
        for key, tensor in _compressed(linear, scheme_there, scheme.scales).items():
            state[f"{name}.{key}"] = tensor
    save(model, tokenizer, folder, state)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    config = library(".quantization").QuantizationConfig(
        config_groups={"group_0": scheme_there},
        format=scheme_there.format.value,
        quantization_status="compressed",
        ignore=left,
    )
    told = {**config.model_dump(mode="json"), "version": library().__version__}
    if not scheme.symmetric:  # transformers with compressed-tensors 0.20 opens packed zero points in this way only
        told["dequantize"] = True
    path = folder / "config.json"
    held = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": told}
    path.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compressed(linear: nn.Linear, scheme: Any, scales: torch.dtype) -> dict[str, Tensor]:
    """Codes and what goes with them. Computed in float32: in 16 bit the nearest code would be missed."""
    grid = grid_of(linear)
    told = {
        "weight": linear.weight.detach().float(),
        "weight_scale": grid.scale,
        "weight_zero_point": grid.zero_point.to(torch.int8),
    }
    made = dict(_codec(scheme)[1].compress(told, scheme))
    made["weight_scale"] = grid.scale.to(scales)
    largest = largest_input(linear)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic and largest is not None:
        made["input_scale"] = (largest / 127).clamp(min=torch.finfo(scales).tiny).to(scales)
    return {key: tensor.cpu().contiguous() for key, tensor in made.items()}


# ---- reading


def is_quantized(directory: Path) -> bool:
    """Whether a directory's config says so, in this form."""
    return _told(directory).get("quant_method") == METHOD


def _told(directory: Path) -> dict[str, Any]:
    try:
        told = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


class Dequantized(Mapping[str, Tensor]):
    """A quantized directory's tensors as those of an ordinary model: ``weight`` in place of codes, each when asked for.

    Raises ArtefactError where codes and scales do not fit one another or the config.
    """

    def __init__(self, directory: Path, stored: Mapping[str, Tensor]) -> None:
        self.directory, self.stored = directory, stored
        known = library(".quantization").QuantizationConfig
        told = {key: value for key, value in _told(directory).items() if key in known.model_fields}
        try:
            config = known.model_validate(told)
            (self.scheme,) = config.config_groups.values()
            self.format, self._codec = _codec(self.scheme)
            if self.scheme.weights is None:
                raise ValueError("no scheme of weights")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtefactError(
                f"{directory}: its quantization_config is not one that secateur reads "
                f"({first_line(error)}); quantize again, or copy it again"
            ) from error
        self.linears = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
        own = {f"{name}.weight" for name in self.linears}
        beside = tuple(f"{name}." for name in self.linears)
        self.plain = [n for n in stored if not n.startswith(beside) or n.endswith(".bias")]
        self._names = [*self.plain, *sorted(own)]

    def stored_names(self, linear: str) -> list[str]:
        """Of all that is stored of a quantized linear."""
        return [name for name in self.stored if name.startswith(f"{linear}.")]

    def parts(self, linear: str) -> dict[str, Tensor]:
        """All of that, by its name in the module."""
        return {name.removeprefix(f"{linear}."): self.stored[name] for name in self.stored_names(linear)}

    def __getitem__(self, name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_scale" not in self.stored:
            return self.stored[name]
        try:
            parts = self.parts(linear)
            W = self._codec.decompress(dict(parts), self.scheme)["weight"]
            _check_shapes(W, parts, self.scheme.weights)
            return W
        except (RuntimeError, KeyError, ValueError, AssertionError, TypeError, IndexError) as error:
            raise ArtefactError(
                f"{self.directory}: codes and scales of {linear} do not fit ({first_line(error)}); quantize again"
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_shapes(W: Tensor, parts: Mapping[str, Tensor], scheme: Any) -> None:
    """ValueError where what is stored is not what such a matrix, (R, C), needs; the library cuts and repeats it."""
    *rows, C = W.shape
    held = {name: list(part.shape) for name, part in parts.items()}
    wanted = {"weight": [*rows, C]}
    if "weight_packed" in parts:
        wanted["weight_packed"] = [*rows, -(-C * scheme.num_bits // (8 * parts["weight_packed"].element_size()))]
    if "weight_shape" in parts:
        held["weight_shape"], wanted["weight_shape"] = parts["weight_shape"].tolist(), [*rows, C]
    if scheme.strategy in ("channel", "group"):
        wanted["weight_scale"] = [*rows, -(-C // (scheme.group_size or C))]
    for name, shape in held.items():
        if shape != wanted.get(name, shape):
            raise ValueError(f"{name} {shape}, wanted {wanted[name]}")
