"""Sparse training: the optimizer that carries the method, in one process or several, and its whole state by name."""

from secateur.training.named_state import deal_state, gather_state
from secateur.training.optimizer import SparseAdamW

__all__ = ["SparseAdamW", "deal_state", "gather_state"]
