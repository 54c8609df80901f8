"""Sparse training: the optimizer that carries the method."""

from secateur.training.optimizer import SparseAdamW

__all__ = ["SparseAdamW"]
