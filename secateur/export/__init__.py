"""What a pruned directory can be turned into, and back.

coding             a tensor's bytes as zstd frames of bounded size
sparse_safetensors the packed file: written, read back, checked
directory          a whole directory packed and unpacked, all of it or nothing; its tensors without unpacking
openvino           int8 weights and activations: int8 (the torch side), openvino_graph (the conversion)
sparse24           2:4 matrices packed; models.sparse24_loader opens them, in any process that has torch
targets            the table behind ``secateur export --to``
"""
