"""Measuring: how well a model still speaks, and whether a saved directory keeps what was promised.

    perplexity.py   perplexity as the pruning papers measure it, every choice named in the result
    inspect.py      a saved directory read tensor by tensor: sparsity, patterns, finiteness, tied weights

Import from the modules: ``inspect`` needs torch and safetensors only, no model is ever built.
"""
