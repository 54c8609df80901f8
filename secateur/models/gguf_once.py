"""One parse of a GGUF file per load: transformers parses it three times (config, weights, tokenizer), in pure Python,
and builds its table of tensor names anew for every module. For 135M parameters that is 24 of 36 s of CPU."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import gguf


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, a file that was read and a table that was built are kept; nothing is kept afterwards."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(reader), functools.cache(names)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
