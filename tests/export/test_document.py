"""The reader that docs/sparse_safetensors.md prints is run: what is written there is the format."""

import re
from pathlib import Path

from secateur.export.sparse_safetensors import pack_file

DOCUMENT = Path(__file__).parents[2] / "docs" / "sparse_safetensors.md"


def test_the_printed_reader_reads_every_type(dense, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    pack_file(dense, tmp_path / "packed", lambda _: None)
    assert names["dense_file"](tmp_path / "packed") == dense.read_bytes()
