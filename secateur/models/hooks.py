"""Modules watched, or answering otherwise, for a while: in a ``with``, and afterwards as before, whatever happens.

with hooked(module.register_forward_hook(note) for module in modules):
    model(input_ids)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks stand in here. As a generator registers them: where one cannot be, those before it come off."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """The modules keep their attributes (a model may read them) and answer with these."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, previous in own.items():
            del module.forward
            if previous is not None:
                module.forward = previous
