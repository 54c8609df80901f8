"""Floor 2: a quantized model written, and read, in the compressed-tensors form. Needs the extra ``quantize``."""
