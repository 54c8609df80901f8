"""One line of whatever was raised, for messages of our own."""

import pytest

from secateur.errors import ProcessError, first_line
from secateur.pruning.ranks import _heard


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError("\n one "), "one"), (ImportError(), "ImportError")],
)
def test_first_line(error, line):
    assert first_line(error) == line


def test_a_process_that_is_gone_without_a_word():
    with pytest.raises(ProcessError, match=r"is gone \(RuntimeError\)"), _heard():
        raise RuntimeError
