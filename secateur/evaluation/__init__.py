"""Measuring: how well a model still speaks, how fast, and whether a saved directory keeps what was promised.

Import from the modules. ``inspect`` reads files, tensor by tensor: no model is ever built.
"""
