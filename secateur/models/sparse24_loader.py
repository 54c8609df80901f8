"""Open a 2:4 model on a CUDA GPU. Needs torch, transformers and safetensors, and nothing else: this file lies in every
directory that ``secateur export --to torch-2:4`` wrote, so

    python -c "import sparse24_loader as s; model, report = s.load_sparse('.')"        # run there

Every packed matrix is multiplied by the sparse tensor cores where that is faster for as many tokens at once as
``tokens`` says, and stays dense where it is not: decoding one token at a time is usually slower with 2:4. What was
measured and chosen is in the report. int8 matrices want int8 inputs, so each token's are rounded on the way in; that
takes time too, and where 16-bit inputs and weights are faster, those are taken.

    NAME.sparse24.safetensors    every tensor as it was, but a packed one as TENSOR.values (R, C/2) and TENSOR.places
                                 (R, C/8): a byte of places holds two groups of four, the left one in the lower bits,
                                 and of each the places of its two values, two bits each, the lower one first
    its metadata                 sparse24: the version, "2"; packed: JSON [TENSOR]; sums: JSON {NAME: crc32} of all that
                                 is stored
    int8 TENSORs                 are codes; TENSOR_scale (R, 1) times them gives the weights

R = out_features, C = in_features, T = tokens.
"""

import copy
import json
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

SUFFIX, VERSION = ".sparse24.safetensors", "2"
CAPABILITY = (8, 0)
"""The first GPUs with sparse tensor cores."""
TOKENS = 2048
"""Tokens multiplied at once for which a choice is made: a prompt, or a large batch."""
REPEATS = 20
"""Timed products of each form."""
ROWS = 32
"""int8 products take tokens in multiples of so many."""
WRONG = 0.05
"""Relative error of a form's products above which it is not taken, however fast; rounded inputs make 0.01 or so."""
STEPS = 127.5
"""int8 steps to each side of zero, as compressed-tensors counts them where inputs are rounded as they come."""


class DamagedError(RuntimeError):
    """The directory is not what was written."""


class NotHereError(RuntimeError):
    """This machine lacks something."""


class Codes(NamedTuple):
    """An int8 matrix."""

    codes: Tensor
    """(R, C)."""
    scale: Tensor
    """(R, 1)."""

    @property
    def weight(self) -> Tensor:
        """(R, C) in the type of the scale."""
        return self.codes.to(self.scale.dtype) * self.scale


Times = tuple[dict[str, float], dict[str, str]]
"""Milliseconds by form, and why the others failed."""
Form = Callable[[nn.Linear, Codes | None], nn.Module]
"""Makes what multiplies by a linear's weight in one way; the codes are there where that weight came from int8."""


class Choice(NamedTuple):
    """What became of one packed matrix."""

    name: str
    shape: tuple[int, int]
    chosen: str
    """A form, or "dense": the linear in the model's own type."""
    ms: dict[str, float]
    """Milliseconds of a product with so many tokens, by form; forms that failed are absent."""
    failed: dict[str, str]


def load_sparse(directory: str, device: str = "cuda", tokens: int = TOKENS) -> tuple[Any, list[Choice]]:
    """The model on the GPU, and what was chosen for every packed matrix."""
    if lacking := lacks():
        raise NotHereError(lacking)
    state, packed = read_state(directory)
    with told(f"{directory} cannot be opened"):
        model, codes = build(directory, state)
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if others := sorted({*packed} - linears):
            raise ValueError(f"{others[0]} is packed and no linear")
    held = {name: codes.get(name) for name in packed}
    return model.to(device), swap(model, held, tokens, time_on_gpu)


def build(directory: str, state: dict[str, Tensor]) -> tuple[Any, dict[str, Codes]]:
    """The model with every weight in its own type, and the codes of those that are stored as int8.

    DamagedError where tensors are missing, which would be filled in at random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = [name for name, W in state.items() if W.dtype == torch.int8 and f"{name}_scale" in state]
    codes = {name: Codes(state[name], state.pop(f"{name}_scale")) for name in stored}
    state |= {name: held.weight for name, held in codes.items()}
    config: Any = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = next(W.dtype for W in state.values() if W.is_floating_point())
    with torch.device("meta"):  # AutoModel itself opens nothing that has no place
        kind: Any = type(AutoModelForCausalLM.from_config(config))
    model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise DamagedError(f"{directory} lacks {len(missing)} tensors, such as {missing[0]}; copy the missing file too")
    return model.eval().requires_grad_(False), codes


def lacks() -> str | None:
    """What this machine lacks for sparse products, in one line; None where it has all."""
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device here; 2:4 products need an NVIDIA GPU of compute capability 8.0 or more (Ampere "
            "on) and a CUDA build of torch"
        )
    if (found := torch.cuda.get_device_capability()) < CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {found[0]}.{found[1]}; 2:4 products need 8.0 or more (Ampere on)"
    return None


def forms_here(codes: bool) -> dict[str, Form]:
    """All but the dense one that torch has here, for 16-bit weights or for int8 ``codes``."""
    found = dict(INT8 if codes else HALF)
    if not torch.backends.cusparselt.is_available():
        del found["int8 cusparselt" if codes else "cusparselt"]
    return found


def swap(
    model: nn.Module,
    packed: Mapping[str, Codes | None],
    tokens: int,
    timer: Callable[..., float],
    forms: Callable[[bool], Mapping[str, Form]] = forms_here,
) -> list[Choice]:
    """Put the fastest form in each packed linear's place. Equal shapes are timed once."""
    timed: dict[tuple[torch.Size, bool], Times] = {}
    report = []
    for name, codes in packed.items():
        place = name.removesuffix(".weight")
        linear = cast(nn.Linear, model.get_submodule(place))
        if codes is not None:
            codes = Codes(*(part.to(linear.weight.device) for part in codes))
        shape, possible = linear.weight.shape, forms(codes is not None)
        if (shape, codes is None) not in timed:
            timed[shape, codes is None] = measured(linear, codes, tokens, possible, timer)
        ms, failed = timed[shape, codes is None]
        chosen = min(ms, key=lambda form: ms[form])
        if chosen != "dense":
            model.set_submodule(place, possible[chosen](linear, codes))
        report.append(Choice(name, (shape[0], shape[1]), chosen, ms, failed))
    return report


def measured(
    linear: nn.Linear, codes: Codes | None, tokens: int, forms: Mapping[str, Form], timer: Callable[..., float]
) -> Times:
    """Milliseconds of each form, and why some have none: what a kernel does not take, and products that are wrong."""
    W = linear.weight
    X = torch.randn(tokens, W.shape[1], generator=torch.Generator().manual_seed(0)).to(W.device, W.dtype)
    wanted, ms, failed = linear(X).float(), {"dense": timer(linear, X)}, {}
    for form, make in forms.items():
        try:
            made = make(linear, codes)
            off = float((made(X).float() - wanted).norm() / wanted.norm())
            if off <= WRONG:
                ms[form] = timer(made, X)
            else:
                failed[form] = f"its products are off by {off:.2g} of their norm"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[form] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ms, failed


def time_on_gpu(f: Callable[..., Any], *args: Tensor) -> float:
    """Median milliseconds, the first calls left out."""
    spent = []
    for _ in range(REPEATS + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f(*args)
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent[5:])


# ---- forms

_ops: Any = torch.ops.aten


def _half(convert: Callable[[Tensor], Tensor]) -> Form:
    """A linear whose weight is a semi-structured tensor."""

    def make(linear: nn.Linear, codes: Codes | None) -> nn.Module:
        made = copy.copy(linear)
        made._parameters = {**linear._parameters, "weight": nn.Parameter(convert(linear.weight.detach()), False)}
        return made

    return make


def _cutlass(W: Tensor) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    return SparseSemiStructuredTensorCUTLASS.from_dense(W)


def _cusparselt(W: Tensor) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    return SparseSemiStructuredTensorCUSPARSELT.from_dense(W)


HALF: dict[str, Form] = {"cutlass": _half(_cutlass), "cusparselt": _half(_cusparselt)}

Product = Callable[[Tensor], Tensor]
"""int8 (T, C) to int32 (T, R), T a multiple of ``ROWS``."""


class Int8Linear(nn.Module):
    """y = (q W^T) s_x s_w + bias, where q s_x is x with each token rounded to int8 by its largest input."""

    def __init__(self, product: Product, scale: Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.product, self.bias = product, bias
        self.register_buffer("scale", scale.float().T)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = (rows.abs().amax(1, keepdim=True) / STEPS).clamp(min=torch.finfo(x.dtype).tiny)
        q = (rows / scale).round().clamp(-128, 127).to(torch.int8)
        products = self.product(F.pad(q, (0, 0, 0, -len(q) % ROWS)))[: len(q)]
        y = products * (scale * cast(Tensor, self.scale))
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _int8(product_of: Callable[[Tensor], Product]) -> Form:
    def make(linear: nn.Linear, codes: Codes | None) -> nn.Module:
        assert codes is not None
        return Int8Linear(product_of(codes.codes), codes.scale, linear.bias)

    return make


def _dense_int8(W: Tensor) -> Product:
    return lambda q: _ops._int_mm(q, W.T)


def _cutlass_int8(W: Tensor) -> Product:
    held: Any = _cutlass(W)
    return lambda q: _ops._sparse_semi_structured_mm(held.packed, held.meta, q.T, out_dtype=torch.int32).T


def _cusparselt_int8(W: Tensor) -> Product:
    held = _ops._cslt_compress(W)
    return lambda q: _ops._cslt_sparse_mm(held, q.T, out_dtype=torch.int32).T


INT8: dict[str, Form] = {
    "int8": _int8(_dense_int8),
    "int8 cutlass": _int8(_cutlass_int8),
    "int8 cusparselt": _int8(_cusparselt_int8),
}


# ---- files


def read_state(directory: str) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors as they were, zeros filled in, and which of them are packed. Works on any machine."""
    files = sorted(Path(directory).glob(f"*{SUFFIX}"))
    if not files:
        raise DamagedError(f"{directory} holds no *{SUFFIX}; give what `secateur export --to torch-2:4` wrote")
    state: dict[str, Tensor] = {}
    packed: list[str] = []
    for path in files:
        with told(f"{path} cannot be read"):
            packed += read_file(path, state)
    if not packed:
        raise DamagedError(f"{directory} packs no matrix; export it again")
    return state, packed


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever damage ends in, as a DamagedError of one line."""
    try:
        yield
    except DamagedError:
        raise
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedError(f"{what} ({said}); copy or export it again") from error


def read_file(path: Path, into: dict[str, Tensor]) -> list[str]:
    with safe_open(path, framework="pt") as file:
        words = file.metadata() or {}
        if words.get("sparse24") != VERSION:
            raise DamagedError(
                f"{path} is of version {words.get('sparse24')}, this reads {VERSION}; update secateur, or export again"
            )
        packed: list[str] = json.loads(words["packed"])
        sums: dict[str, int] = json.loads(words["sums"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in stored.items():
        if checksum(tensor) != sums[name]:
            raise DamagedError(f"{path}: {name} is damaged, its checksum is another; copy or export it again")
    into |= {name: unpack(stored.pop(f"{name}.values"), stored.pop(f"{name}.places")) for name in packed}
    into |= stored
    return packed


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """(R, C/2) values and (R, C/8) bytes of places as the (R, C) matrix."""
    if values.ndim != 2 or places.dtype != torch.uint8 or places.shape != (len(values), values.shape[1] / 4):
        raise ValueError(f"{tuple(values.shape)} values have {tuple(places.shape)} places in {places.dtype}")
    R, half = values.shape
    nibbles = torch.stack([places & 15, places >> 4], 2).reshape(R, half // 2)
    index = torch.stack([nibbles & 3, nibbles >> 2], 2).long()
    groups = values.new_zeros(R, half // 2, 4)
    return groups.scatter_(2, index, values.view(R, half // 2, 2)).view(R, 2 * half)
