"""The loop of docs/training.md: a small Llama learns from its dense self, sparse all the way, and is saved as it is."""

import copy

import torch
from transformers import AutoModelForCausalLM

from secateur.core.losses import Distillation, distill, shifted
from secateur.core.pattern import NM, check_mask
from secateur.core.sparse_adamw import Schedule
from secateur.training import SparseAdamW

STEPS = 80


def test_a_student_learns_from_its_dense_self_and_is_saved_sparse(tiny_llama, tmp_path):
    teacher = copy.deepcopy(tiny_llama)
    for parameter in teacher.parameters():
        parameter *= 4 if parameter.ndim == 2 else 1
    student = copy.deepcopy(teacher).requires_grad_().train()
    matrices = [p for p in student.model.layers.parameters() if p.ndim == 2]
    others = [p for p in student.parameters() if not any(p is matrix for matrix in matrices)]
    optimizer = SparseAdamW(
        [{"params": matrices, "pattern": NM(2, 4)}, {"params": others}], lr=5e-3, schedule=Schedule(steps=STEPS)
    )
    divergence = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(128, (8, 32), generator=generator)
        hidden = student.model(ids).last_hidden_state.flatten(0, 1)
        with torch.no_grad():
            taught = teacher.model(ids).last_hidden_state.flatten(0, 1)
        loss = distill(
            hidden,
            student.lm_head,
            shifted(ids).flatten(),
            lambda i, j, taught=taught: teacher.lm_head(taught[i:j]),
            Distillation(alpha=1.0, chunk=50),
        )
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        divergence.append(loss.divergence.item())
    optimizer.project()
    assert sum(divergence[-4:]) < 0.7 * sum(divergence[:4])
    student.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    stored = [p for p in saved.model.layers.parameters() if p.ndim == 2]
    assert not [matrix.shape for matrix in stored if check_mask(matrix != 0, NM(2, 4))]
    assert all(torch.equal(a, b) for a, b in zip(stored, matrices, strict=True))
