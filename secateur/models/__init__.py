"""The outside world of models: load a checkpoint, see it as blocks, observe a block's structure, save the result.

Whoever reads begins with ``load``, ``adapter``, ``layout`` and ``save``; docs/architecture.md lists the others.
"""
