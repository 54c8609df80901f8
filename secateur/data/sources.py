"""Where text comes from. ``read_texts("wikitext2", "evaluation")`` -> ``Texts``: documents, joiner, provenance.

    wikitext2 | c4 | ptb                    hub data sets read as the pruning papers read them (table KNOWN)
    hf:ID[:config][:split][:column]         any other hub data set; an empty part takes its default
    FILE.txt | FILE.jsonl | FILE.parquet    local: a .txt is one document, the others have a ``text`` field or column
    embedded                                CPython's own help text (embedded.py)

The joiner is part of the protocol and changes perplexity, so it is stated with every result. A ``.txt`` file is taken
as it is: ``wiki.test.raw`` given as a file is that file's own line structure (303,415 SmolLM2 tokens), while the name
``wikitext2`` joins the hub's rows, which keep their line ends, by a further blank line as the papers do (304,986
tokens). A local file is the same text for calibration and for evaluation: keeping them apart is then the caller's job.

Cost: a text is one string in memory. Hub collections that would not fit are streamed and cut after ``documents``.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from secateur.data.embedded import embedded_documents
from secateur.errors import DataError, UsageError

Split = Literal["calibration", "evaluation"]
BLANK_LINE = "\n\n"
STREAMED_DOCUMENTS = 5_000
"""Documents taken from a hub collection of unknown size: about 2.4 million tokens of C4, nine times 128 x 2048."""


@dataclass(frozen=True)
class Texts:
    """Documents in order, what joins them into one string, and where they came from."""

    name: str
    """Short name for tables: ``wikitext2``, a file name, a hub id."""
    documents: list[str]
    joiner: str
    """Put between two documents. A blank line unless a paper's protocol says otherwise."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Source, split, number of documents, UTF-8 bytes and sha256 of the joined text."""
    windows: int | None = None
    """Evaluation windows after which the protocol stops (C4: 256); None = the whole text."""

    @property
    def text(self) -> str:
        return self.joiner.join(self.documents)


@dataclass(frozen=True)
class HubText:
    """One text on the hub: what to ask ``datasets.load_dataset`` for, and how to read the rows."""

    id: str
    config: str | None = None
    files: str | None = None
    """A file of the repository (or an hf:// address), where the whole collection is too large or needs a script."""
    split: str = "train"
    column: str = "text"
    joiner: str = BLANK_LINE
    documents: int | None = None
    """Stream and stop after so many rows; None = download the split whole and keep it in the hub's cache."""
    windows: int | None = None


def _ptb(split: str) -> HubText:
    """PTB's own repository holds a script, which ``datasets`` no longer runs; the hub's parquet copy holds the rows."""
    copy = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
    return HubText("parquet", files=f"{copy}/{split}/0000.parquet", column="sentence", joiner=" ")


KNOWN: dict[str, dict[Split, HubText]] = {
    "wikitext2": {
        "calibration": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split="train"),
        "evaluation": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split="test"),
    },
    "c4": {  # evaluation: 1,100 documents joined by a space, 256 windows, as GPTQ, SparseGPT and Wanda do
        "calibration": HubText("allenai/c4", files="en/c4-train.00000-of-01024.json.gz", documents=STREAMED_DOCUMENTS),
        "evaluation": HubText(
            "allenai/c4", files="en/c4-validation.00000-of-00008.json.gz", joiner=" ", documents=1100, windows=256
        ),
    },
    "ptb": {"calibration": _ptb("train"), "evaluation": _ptb("test")},
}


def read_texts(data: str, split: Split) -> Texts:
    """Read the text that ``data`` names. UsageError for a name that means nothing, DataError for a text that fails."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r}; wanted one of {', '.join(get_args(Split))}")
    if data == "embedded":
        return _texts(data, embedded_documents(split), source="pydoc_data.topics", split=split)
    if data in KNOWN:
        return _from_hub(data, KNOWN[data][split])
    if data.startswith("hf:"):
        return _from_hub(data, parse_hub(data, split))
    return _from_file(data)


def parse_hub(data: str, split: Split) -> HubText:
    """``hf:ID[:config][:split][:column]`` -> HubText. Split defaults to train (calibration) or test (evaluation)."""
    id_, *rest = data.removeprefix("hf:").split(":")
    if not id_ or len(rest) > 3:
        raise UsageError(f"data {data!r}; wanted hf:ID[:config][:split][:column], for example hf:allenai/c4:en::text")
    config, hub_split, column = (*rest, "", "", "")[:3]
    return HubText(
        id_,
        config or None,
        split=hub_split or {"calibration": "train", "evaluation": "test"}[split],
        column=column or "text",
        documents=STREAMED_DOCUMENTS,
    )


def _texts(name: str, documents: list[str], joiner: str = BLANK_LINE, windows: int | None = None, **origin) -> Texts:
    texts = Texts(name, documents, joiner, windows=windows)
    text = texts.text
    if not text.strip():
        raise DataError(f"{name}: the text is empty; give a file or data set that holds text")
    raw = text.encode()
    texts.provenance.update(
        origin, documents=len(documents), bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest(), joiner=joiner
    )
    return texts


# ---- local files


def _from_file(data: str) -> Texts:
    path = Path(data)
    if path.suffix not in READERS:
        forms = ", ".join([*KNOWN, "embedded", "hf:ID[:config][:split][:column]", *(f"FILE{s}" for s in READERS)])
        raise UsageError(f"unknown data {data!r}; wanted one of {forms}")
    if not path.is_file():
        raise DataError(f"no file {data}; check the path, or use `embedded` for text that needs no file")
    before = _state(path)
    documents = READERS[path.suffix](path)
    if _state(path) != before:
        raise DataError(f"{path} changed while it was read; wait until it is complete, or give a copy")
    return _texts(path.name, documents, source=data)


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _decoded(path: Path) -> str:
    """The file's text with its own line ends; only a byte-order mark is dropped."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8, the file is binary or in another encoding; convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{path}: holds NUL bytes, so it is binary; give a text file")
    return text


def _read_txt(path: Path) -> list[str]:
    return [_decoded(path)]


def _read_jsonl(path: Path) -> list[str]:
    lines = _decoded(path).split("\n")  # not splitlines(): U+2028 inside a string does not end a line
    return [_text_of_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text_of_line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg}); wanted one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{path}, line {number}: no string field "text"; wanted one object {{"text": ...}} a line')
    return row["text"]


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
        if "text" in columns:
            rows = pq.read_table(path, columns=["text"]).column("text").to_pylist()
            return _strings(rows, f"{path}, column text")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({_first_line(error)}); give a valid one") from error
    raise DataError(f"{path}: no column text, it has {', '.join(columns)}; rename the column that holds the text")


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# ---- the hub


def _from_hub(name: str, hub: HubText) -> Texts:
    try:
        rows = list(islice(_rows(hub), hub.documents))
    except Exception as error:  # the hub client's errors share no base class: httpx, OSError, ValueError, ...
        raise DataError(
            f"hub data set {name} ({hub.files or hub.id}): {_first_line(error)}; check the name and the connection, or "
            "give a local .txt, .jsonl or .parquet file, or `embedded`"
        ) from error
    if rows and hub.column not in rows[0]:
        raise DataError(f"hub data set {name} has no column {hub.column}; it has {', '.join(rows[0])}: name one")
    documents = _strings([row[hub.column] for row in rows], f"hub data set {name}, column {hub.column}")
    origin = {"source": hub.files or hub.id, "config": hub.config, "split": hub.split}
    return _texts(name, documents, hub.joiner, hub.windows, **origin)


def _rows(hub: HubText) -> Iterator[Any]:
    from datasets import load_dataset

    streaming = hub.documents is not None
    data_files = {hub.split: hub.files} if hub.files else None
    yield from load_dataset(hub.id, hub.config, data_files=data_files, split=hub.split, streaming=streaming)


def _strings(values: list[Any], where: str) -> list[str]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise DataError(f"{where}, row {number}: {type(value).__name__} where text was wanted; name a text column")
    return values


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
