"""What a step of distillation computes: the student's loss against its teacher, on one batch of token ids.

``Learner`` is a module, so that DDP and FSDP2 can wrap it: all that is differentiated happens inside its forward. A
teacher is a frozen model, or anything else that can tell its logits of some tokens of a batch.

B = rows of a batch, S = tokens of a row, T = B * S, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.core.losses import Distillation, Losses, Taught, distill, shifted
from secateur.models.head import body, head


class Teacher(Protocol):
    """Told a batch, it answers for any of its T tokens, row after row."""

    def __call__(self, ids: Int[Tensor, "B S"]) -> Taught: ...


class ModelTeacher:
    """A frozen model on the device where it lies. Its body runs once a batch; its head when logits are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "B S"]) -> Callable[[int, int], Float[Tensor, "T V"]]:
        hidden = body(self.model, ids.to(self.model.device)).flatten(0, 1)

        def taught(start: int, stop: int) -> Float[Tensor, "T V"]:
            with torch.no_grad():
                return head(self.model, hidden[start:stop]).to(ids.device)

        return taught


class Learner(nn.Module):
    """The student and its loss."""

    def __init__(
        self, student: PreTrainedModel, teacher: Teacher, options: Distillation, autocast: torch.dtype | None = None
    ) -> None:
        """``autocast``: type of products, in teacher and student alike; None leaves the weights' own."""
        super().__init__()
        self.student, self.options, self.autocast = student, options, autocast
        self._teacher = (teacher,)  # a tuple: a teacher is not trained, wrapped or saved, so it is no submodule

    def forward(self, ids: Int[Tensor, "B S"]) -> Losses:
        """Means over the tokens that have a next one."""
        with torch.autocast(ids.device.type, self.autocast) if self.autocast else nullcontext():
            taught = self._teacher[0](ids)
            hidden = body(self.student, ids).flatten(0, 1)
            return distill(hidden, self._head, shifted(ids).flatten(), taught, self.options)

    def _head(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        return head(self.student, hidden)
