"""The layer solvers, by the name a user types. A new method is one file and one row here."""

from secateur.core.solvers.admm import ADMM
from secateur.core.solvers.magnitude import Magnitude
from secateur.core.solvers.sparsegpt import SparseGPT
from secateur.core.solvers.wanda import Wanda

Solver = Magnitude | Wanda | SparseGPT | ADMM
SOLVERS: dict[str, type[Solver]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "admm": ADMM}

__all__ = ["ADMM", "SOLVERS", "Magnitude", "Solver", "SparseGPT", "Wanda"]
