"""Hidden states that wait: the same in memory and on disk, and nothing is left behind."""

import gc

import pytest
import torch

from secateur.pruning.hidden import Budget, Hidden

ROWS = [torch.full((1, 4, 8), float(i)) for i in range(5)]
SIZE = 4 * 8 * 4


@pytest.mark.parametrize("room", [0, 2, 5])
def test_the_same_wherever_it_waits(room, tmp_path):
    budget = Budget(room * SIZE, tmp_path)
    hidden = Hidden(budget, ROWS)
    assert len(list(tmp_path.iterdir())) == 5 - room
    assert len(hidden) == 5
    assert all(torch.equal(a, b) for a, b in zip(hidden, ROWS, strict=True))
    assert torch.equal(hidden[-1], ROWS[-1])
    assert [float(rows[0, 0, 0]) for rows in hidden[1:3]] == [1, 2]


def test_files_and_room_go_with_the_last_user(tmp_path):
    budget = Budget(2 * SIZE, tmp_path)
    hidden = Hidden(budget, ROWS)
    part, other = hidden[1:3], Hidden(budget)
    other.share(hidden, 4)
    del hidden
    gc.collect()
    assert budget.used == SIZE, "chunk 1 is in memory and still used"
    assert len(list(tmp_path.iterdir())) == 2, "chunks 2 and 4"
    assert torch.equal(other[0], ROWS[4])
    del part, other
    gc.collect()
    assert budget.used == 0
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_there_is_no_limit():
    assert Hidden(Budget(), ROWS).budget.used == 5 * SIZE


@pytest.mark.parametrize("room", [0, 9])
def test_rows_can_be_parted_anywhere(room, tmp_path):
    rows = torch.arange(10.0).view(10, 1, 1)
    hidden = Hidden(Budget(room * 4, tmp_path), rows.split(3))
    assert (hidden.rows, hidden.tokens) == (10, 10)
    for first in range(12):
        head, tail = hidden.parted(first)
        assert torch.equal(torch.cat([*head, *tail]), rows)
        assert head.rows == min(first, 10)
