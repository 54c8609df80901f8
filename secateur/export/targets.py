"""What ``secateur export --to`` can write: names, and what they are in one line each."""

from secateur.errors import UsageError

TARGETS = {
    "sparse-safetensors": "a lossless download: a mask, what is not zero, zstd; `secateur unpack` undoes it",
    "openvino": "int8 weights and activations for OpenVINO on CPUs, zeros packed where the processor has AMX",
    "torch-2:4": "2:4 matrices in 9/16 of their size, for sparse tensor cores of NVIDIA GPUs",
}


def check_target(name: str) -> None:
    """UsageError for a name that is not in the table."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; there is {', '.join(TARGETS)}")
