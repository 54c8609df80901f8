"""What a plan knows of the model."""

import torch

from secateur.models.adapter import DecoderAdapter
from secateur.planning.subject import Subject


def test_unpacking_a_gguf_file_is_counted(tiny_llama):
    """Measured: 3.30 GB for Gemma-3-270m, 1.40 more than what stays; its embedding takes 0.67 in float32."""
    adapter = DecoderAdapter(tiny_llama)
    embedding = 4 * 128 * 32
    assert Subject(adapter, "", torch.float32, 1000, gguf=True).unpacking == 1000 + 2 * embedding
    assert Subject(adapter, "", torch.float32, 1000, gguf=False).unpacking == 0
