"""What ``secateur quantize`` takes and what that is compared with: one account, whichever verb tells."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from secateur.evaluation.inspect import Checkpoint
from secateur.export.directory import stored_sizes
from secateur.models.container import read_header
from secateur.quantization.accounting import storage_of
from secateur.quantization.compressed import Dequantized


def test_what_is_stored(int4):
    out, _ = int4
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert sorted(key for key in stored if key.startswith(name)) == [
        f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape",
    ]  # fmt: skip
    assert stored[f"{name}.weight_packed"].shape == (128, 256 // 8)
    assert stored[f"{name}.weight_scale"].shape == (128, 2)
    assert stored[f"{name}.weight_scale"].dtype == torch.bfloat16
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "compressed-tensors"
    assert told["format"] == "pack-quantized"
    assert told["ignore"] == ["lm_head"]
    assert "sparsity_config" not in told, "vLLM refuses a model that has one"
    assert "lm_head.weight" not in stored


def test_what_is_told(int4, run, sparse):
    out, ran = int4
    assert "int4, groups of 128, symmetric" in ran.out
    assert "50.00% before" in ran.out
    assert "no zero is lost" in ran.out
    report = json.loads((out / "secateur" / "report.json").read_text())
    storage, weights = report["storage"], report["weights"]
    assert weights == 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert storage["code_bytes"] == weights // 2
    shapes, scales = 14 * 2 * 8, weights // 128 * 2
    assert storage["side_bytes"] == shapes + scales
    assert storage["bits_per_weight"] == pytest.approx(4 + 16 / 128 + 8 * shapes / weights)
    zeros = storage["zeros"] / weights
    assert storage["masked_bits_per_weight"] == pytest.approx(1 + 4 * (1 - zeros) + storage["bits_per_weight"] - 4)
    assert storage["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert storage["other_weights"] == 260 * 128 + 5 * 128 + 2 * (128 * 2 + 64 * 2)
    assert report["alternatives"]["dense int8"] == 2 * storage["other_weights"] + weights
    assert any("zeros take as much room here as any code" in line for line in report["warnings"])
    inspected = run("inspect", out, "--json")
    assert inspected.code == 0
    assert inspected.json["quantized"] == storage
    assert {row["pattern"] for row in inspected.json["rows"] if row["ok"] is not None} == {"2:4"}
    printed = run("inspect", out)
    assert storage["nominal"] == 16 < 32 * weights / (4 * (weights - storage["zeros"])), "rounding prunes nothing"
    for said in (ran.out, printed.out):
        assert "as papers count  16.0 times smaller: non-zero codes alone, from 32 bit" in said
        assert "50.00% zeros take as much room" in said
    assert "every promise is kept" in printed.out
    assert "pack-quantized, int4, groups of 128, symmetric" in printed.out


def test_a_model_has_the_same_alternatives_whichever_verb_tells(run, model_dir, text, tmp_path, monkeypatch):
    """Of float32, 32 and 64 inputs wide, with an embedding that stays as it is."""
    monkeypatch.setattr("secateur.planning.rates.PATIENCE", 0.0)
    monkeypatch.setattr("secateur.planning.rates.DISK_BYTES", 1 << 20)
    flags = ("--method", "magnitude", "--pattern", "2:4")
    planned = run("plan", model_dir, *flags, "--json").json["result"]["bytes"]
    others = {name: count for name, count in planned.items() if name.startswith("dense")}
    assert list(others) == ["dense, 16 bit", "dense int8", "dense int4, groups of 32"]

    def told(*words):
        ran = run(*words, "--json")
        assert ran.code == 0, ran.err
        return ran.json.get("alternatives") or ran.json["room"]["whole"]  # prune tells the room alone

    made = {"pruned": told("prune", model_dir, *flags, "--out", tmp_path / "pruned")}
    rtn = ("--method", "rtn", *text)
    made["int4"] = told("quantize", tmp_path / "pruned", *rtn, "--out", tmp_path / "int4")
    for target in ("torch-2:4", "sparse-safetensors"):
        made[target] = told("export", tmp_path / "pruned", "--to", target, "--out", tmp_path / target)
        made[f"{target}, inspected"] = told("inspect", tmp_path / target)
    made["int4, packed"] = told("export", tmp_path / "int4", "--to", "sparse-safetensors", "--out", tmp_path / "packed")
    shutil.copytree(tmp_path / "pruned", tmp_path / "unpromised", ignore=shutil.ignore_patterns("secateur"))
    for name in (model_dir, *(tmp_path / name for name in ("pruned", "unpromised", "int4", "packed"))):
        made[f"{name}, inspected"] = told("inspect", name)
    for name, found in made.items():
        assert others.items() <= found.items(), name


def test_room_is_counted_without_reading_weights(int4):
    out, read = int4[0], []

    class Noted(Checkpoint):
        def __getitem__(self, name):
            read.append(name.rpartition(".")[2])
            return super().__getitem__(name)

    model = Dequantized(out, Noted(out))
    zeros = {f"{linear}.weight": (0, 0) for linear in model.linears}
    stored = json.loads((out / "secateur" / "report.json").read_text())["storage"]
    assert storage_of(model, zeros, stored_sizes(out), 1).code_bytes == stored["code_bytes"]
    assert set(read) == {"weight_shape"}


def test_a_dense_model_is_told_nothing_of_zeros_that_rounding_made(run, dense, text, tmp_path):
    ran = run("quantize", dense, "--method", "rtn", *text, "--out", tmp_path / "out", "--json")
    storage = ran.json["storage"]
    assert storage["zeros"] > 0 == storage["pruned"]
    assert storage["nominal"] == 8
    assert ran.json["warnings"] == []
    assert run("inspect", tmp_path / "out", "--json").json["quantized"] == storage


def test_where_a_dense_model_would_be_smaller_that_is_said(run, sparse, text, tmp_path):
    ran = run("quantize", sparse, "--bits", 8, "--method", "rtn", *text, "--out", tmp_path / "out", "--json")
    line = next(line for line in ran.json["warnings"] if line.startswith("smaller than the"))
    assert "dense int4, groups of 128" in line
    assert "dense int8" not in line
    assert ran.json["data"]["needed"] is False


def test_packed_for_a_download_and_back(int4, run, tmp_path):
    out, _ = int4
    ran = run("export", out, "--to", "sparse-safetensors", "--out", tmp_path / "packed")
    assert ran.code == 0, ran.err
    assert "prune first" not in ran.out
    assert "sparse  " not in ran.out
    inspected = run("inspect", tmp_path / "packed", "--json")
    assert inspected.code == 0, inspected.err
    storage = inspected.json["quantized"]
    bits = f"{storage['bits_per_weight']:.2f} in quantized linears, scales included, "
    assert f"{bits}{storage['whole_bits_per_weight']:.2f} in all, headers included" in ran.out
    check_packed(inspected.json, tmp_path / "packed" / "model.sparse.safetensors", bits=4)
    words = run("inspect", tmp_path / "packed").out
    assert "zeros take as much room" not in words
    assert "secateur export" not in words
    assert run("unpack", tmp_path / "packed", "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_of_codes_that_are_packed_it_is_said_where_dense_ones_are_smaller(run, sparse, text, tmp_path):
    flags = ("--bits", 8, "--activations", "dynamic", "--method", "rtn", *text)
    assert run("quantize", sparse, *flags, "--out", tmp_path / "int8").code == 0
    ran = run("export", tmp_path / "int8", "--to", "sparse-safetensors", "--out", tmp_path / "packed", "--json").json
    assert ran["alternatives"]["dense int4, groups of 128"] < 0.98 * ran["packed_bytes"]
    (line,) = ran["warnings"]
    assert "as stored without any zeros: dense int4, groups of 128" in line
    assert line in run("inspect", tmp_path / "packed").out
    config = tmp_path / "int8" / "config.json"
    config.write_text(config.read_text().replace('"num_bits": 8', '"num_bits": "eight"'))
    ran = run("export", tmp_path / "int8", "--to", "sparse-safetensors", "--out", tmp_path / "unread")
    assert ran.code == 0, "a download asks for no meaning"
    assert "bits per weight  not known: it holds integers" in ran.out


def check_packed(inspected, file, bits):
    """Bits and bytes are those of the file, not of what it unpacks to."""
    told = inspected["quantized"]
    assert (inspected["packed"], told["bits"], told["file_bytes"]) == (True, bits, file.stat().st_size)
    parts = told["code_bytes"] + told["side_bytes"] + told["other_bytes"]
    assert told["file_bytes"] == parts + read_header(file).data_at
    assert told["bits_per_weight"] == pytest.approx(8 * (told["code_bytes"] + told["side_bytes"]) / told["weights"])
