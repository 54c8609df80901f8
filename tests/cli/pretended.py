"""A GPU that is not there: tensors that say they are elsewhere, and are computed by the CPU all the same.

What goes wrong first on a machine with a GPU is a tensor left behind, and on machines without one nothing tells. Here
tensors of two devices in one operation are an error, as they are there: torch lets Python stand for a device
("privateuseone"), an operation on its tensors runs on the CPU tensors inside them. Kernels, streams and memory are not
pretended. It changes torch for the whole process, so tests with it have a process of their own.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "pretended"
aten = torch.ops.aten
BETWEEN = {aten._to_copy.default, aten.copy_.default}
"""Operations that move tensors from one device to another."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
"""Those that take indices from the CPU for a tensor on the GPU."""


class Module(backend_registration._DummyBackendModule):
    """What torch asks of ``torch.cuda``."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Far(Tensor):
    """A tensor on the pretended device."""

    near: Tensor
    """The one that holds its numbers."""
    operations: ClassVar[int] = 0
    """How many there were so far, with such a tensor."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        made = Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.near = near
        return made

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})


def operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation; RuntimeError where its tensors are on two devices and it does not move them."""
    if torch.is_inference_mode_enabled():  # tensors around tensors are not made in it
        with torch.inference_mode(False), torch.no_grad():
            return operate(func, args, kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    left = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Far) and tensor.ndim]
    if far and left and func not in BETWEEN | INDEXED:
        raise RuntimeError(f"{func}: tensors of shapes {left} are on the CPU, others on the GPU")
    if far and func is aten._fused_sdp_choice.default:
        return 0  # the CPU's own kernel for attention has another name
    if far and func is aten.histc.default and not args[0].is_floating_point():
        return operate(func, (args[0].float(), *args[1:]), kwargs)  # it counts whole numbers on GPUs only
    Far.operations += bool(far)
    asked = kwargs.get("device")
    gives_far = torch.device(asked).type == NAME if asked is not None else bool(far)
    if func is aten.copy_.default:
        gives_far = isinstance(args[0], Far)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    near_args, near_kwargs = pytree.tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs))
    out = func(*near_args, **near_kwargs)
    if not gives_far:
        return out
    out = pytree.tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, Far) else Far(tensor), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class Operations(TorchDispatchMode):
    """For those that have no tensor yet: ``torch.zeros(3, device="pretended")``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {})


class Methods(TorchFunctionMode):
    """``cuda`` means this device; and what is not an operation but looks into a tensor's memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map(meant, (args, kwargs or {}))
        if func in (Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage) and isinstance(args[0], Far):
            args = (args[0].near,)
        if func is Tensor.tolist and isinstance(args[0], Far):
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


def meant(value: Any) -> Any:
    """The device where ``cuda`` is said."""
    said = value.type if isinstance(value, torch.device) else value
    return torch.device(NAME, 0) if isinstance(said, str) and said.split(":")[0] == "cuda" else value


LIBRARY = torch.library.Library("aten", "IMPL")


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    """What C++ asks for on its way to another device, past the modes."""
    return Far(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    source, into = (tensor.near if isinstance(tensor, Far) else tensor for tensor in (source, to))
    into.copy_(source)
    return to


def apply(module: torch.nn.Module, *args: Any, _apply: Any = torch.nn.Module._apply, **kwargs: Any) -> torch.nn.Module:
    """``module.to``: parameters stay the same objects, as they do with a real GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def register() -> None:
    """Once in a process: a device of that name, for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.nn.Module._apply = apply
    LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
    LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
    LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")
