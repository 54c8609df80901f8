import json

import pytest

from secateur.data import sources
from secateur.data.sources import KNOWN, STREAMED_DOCUMENTS, HubText, Texts, parse_hub, read_texts
from secateur.errors import DataError, UsageError


def test_txt_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n \n\ntwo é\u2028\n".encode())
    texts = read_texts(str(path), "evaluation")
    assert texts.text == "one\r\n \n\ntwo é\u2028\n"
    assert texts.name == "a.txt"
    assert texts.provenance["source"] == str(path)
    assert texts.provenance["bytes"] == len(path.read_bytes())


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one"}, {"text": "two\u2028still two", "url": 1}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    texts = read_texts(str(path), "calibration")
    assert texts.documents == ["one", "two\u2028still two"]
    assert texts.text == "one\n\ntwo\u2028still two"
    assert texts.provenance["documents"] == 2


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert read_texts(str(path), "calibration").documents == ["one", "two"]
    pq.write_table(pa.table({"content": ["one"]}), path)
    with pytest.raises(DataError, match=r"no column text, it has content"):
        read_texts(str(path), "calibration")
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(DataError, match=r"row 2: NoneType where text was wanted"):
        read_texts(str(path), "calibration")


BAD_FILES = [
    ("a.txt", b"", r"a\.txt: the text is empty"),
    ("a.txt", b" \n\n", r"a\.txt: the text is empty"),
    ("a.txt", b"caf\xe9", r"byte 3 is not UTF-8"),
    ("a.txt", b"a\0b", r"NUL bytes"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r'line 2: no string field "text"'),
    ("a.jsonl", b'{"text": 3}\n', r'line 1: no string field "text"'),
    ("a.jsonl", b"[1]\n", r'line 1: no string field "text"'),
    ("a.jsonl", b'{"text": "a"}\n\n{oops\n', r"line 3: not JSON"),
    ("a.parquet", b"not parquet at all", r"not a parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_texts(str(tmp_path / name), "calibration")
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_texts(str(tmp_path / "gone.txt"), "calibration")
    for name in ("wikitext3", "a.csv", str(tmp_path)):
        with pytest.raises(UsageError, match="wanted one of wikitext2, c4, ptb, embedded"):
            read_texts(name, "calibration")
    with pytest.raises(ValueError, match="split 'test'"):
        read_texts("embedded", "test")


def test_embedded_is_deterministic_and_its_sides_share_no_paragraph():
    calibration, evaluation = read_texts("embedded", "calibration"), read_texts("embedded", "evaluation")
    assert calibration == read_texts("embedded", "calibration")
    sides = [{" ".join(p.split()) for p in side.text.split("\n\n")} for side in (calibration, evaluation)]
    assert not sides[0] & sides[1]
    assert calibration.provenance["bytes"] > 200_000
    assert evaluation.provenance["bytes"] > 40_000


HUB_FORMS = [
    ("hf:a/b", HubText("a/b", split="test", documents=STREAMED_DOCUMENTS)),
    ("hf:a/b:c", HubText("a/b", "c", split="test", documents=STREAMED_DOCUMENTS)),
    ("hf:a/b::train", HubText("a/b", split="train", documents=STREAMED_DOCUMENTS)),
    ("hf:a/b:c:d:e", HubText("a/b", "c", split="d", column="e", documents=STREAMED_DOCUMENTS)),
]


@pytest.mark.parametrize(("data", "hub"), HUB_FORMS)
def test_hub_forms(data, hub):
    assert parse_hub(data, "evaluation") == hub


@pytest.mark.parametrize("data", ["hf:", "hf::c", "hf:a:b:c:d:e"])
def test_bad_hub_forms(data):
    with pytest.raises(UsageError, match="wanted hf:ID"):
        read_texts(data, "evaluation")


def fake_hub(monkeypatch, rows):
    """Rows in place of the hub; returns the list of HubText that were asked for."""
    asked = []
    monkeypatch.setattr(sources, "_rows", lambda hub: asked.append(hub) or iter(rows))
    return asked


def test_known_names_follow_the_papers(monkeypatch):
    asked = fake_hub(monkeypatch, [{"text": "", "sentence": "s"}, {"text": " = A = \n", "sentence": "t"}] * 1000)
    wikitext = read_texts("wikitext2", "evaluation")
    assert wikitext.text.startswith("\n\n = A = \n\n\n\n\n = A = \n")
    c4 = read_texts("c4", "evaluation")
    assert (len(c4.documents), c4.joiner, c4.windows) == (1100, " ", 256)
    assert read_texts("ptb", "calibration").text.startswith("s t s")
    assert asked == [KNOWN["wikitext2"]["evaluation"], KNOWN["c4"]["evaluation"], KNOWN["ptb"]["calibration"]]
    assert c4.provenance["source"] == "en/c4-validation.00000-of-00008.json.gz"


def test_a_hub_collection_is_read_only_as_far_as_needed(monkeypatch):
    def endless():
        while True:
            yield {"text": "a"}

    fake_hub(monkeypatch, endless())
    assert len(read_texts("hf:big/one", "calibration").documents) == STREAMED_DOCUMENTS


def test_hub_arguments(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"text": "a"}])
    read_texts("wikitext2", "calibration")
    read_texts("c4", "calibration")
    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"data_files": None, "split": "train", "streaming": False}),
        (("allenai/c4", None), {"data_files": shard, "split": "train", "streaming": True}),
    ]


def test_hub_failures_are_one_line(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach it; check the name and the connection, or give") as error:
        read_texts("wikitext2", "evaluation")
    assert "\n" not in str(error.value)
    fake_hub(monkeypatch, [{"content": "a", "id": 1}])
    with pytest.raises(DataError, match=r"no column text; it has content, id"):
        read_texts("hf:a/b", "calibration")


def test_real_files(data_dir):
    wikitext = read_texts(str(data_dir / "ppl" / "wikitext2_raw_test.txt"), "evaluation")
    assert wikitext.provenance["sha256"] == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    assert len(read_texts(str(data_dir / "ppl" / "c4_en_validation_200.jsonl"), "evaluation").documents) == 200


def test_texts_need_no_torch():
    import subprocess
    import sys

    code = "import secateur.data.sources, secateur.errors, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Texts("a", ["b", "c"], "-").text == "b-c"


@pytest.mark.parametrize("change", ["appended", "replaced"])
def test_a_file_that_changes_while_it_is_read(change, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("the first half")
    read = sources.READERS[".txt"]

    def slowly(path):
        documents = read(path)
        if change == "appended":
            path.write_text("the first half and the second")
        else:
            other = path.with_name("other")
            other.write_text("another text. ")
            other.rename(path)
        return documents

    monkeypatch.setitem(sources.READERS, ".txt", slowly)
    with pytest.raises(DataError, match="changed while it was read; wait until it is complete"):
        read_texts(str(path), "calibration")
