"""``export``, ``unpack`` and ``inspect`` on a packed directory, as they are typed."""

import filecmp
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def pruned(run, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    assert run("prune", model_dir, "--method", "magnitude", "--sparsity", "0.7", "--out", out).code == 0
    return out


@pytest.fixture
def packed(run, pruned, tmp_path):
    assert run("export", pruned, "--to", "sparse-safetensors", "--out", tmp_path / "packed").code == 0
    return tmp_path / "packed"


def test_there_and_back(run, pruned, tmp_path):
    out, again = tmp_path / "packed", tmp_path / "again"
    ran = run("export", pruned, "--to", "sparse-safetensors", "--out", out)
    assert ran.code == 0
    assert "bits per weight" in ran.out
    assert f"secateur unpack {out} --out {out}-unpacked" in ran.out
    ran = run("unpack", out, "--out", again)
    assert ran.code == 0
    assert "byte for byte" in ran.out
    names = [str(path.relative_to(pruned)) for path in pruned.rglob("*") if path.is_file()]
    assert "secateur/promise.json" in names
    assert filecmp.cmpfiles(pruned, again, names, shallow=False)[1:] == ([], [])
    assert len(names) == sum(path.is_file() for path in again.rglob("*"))


def test_json(run, pruned, tmp_path):
    told = run("export", pruned, "--to", "sparse-safetensors", "--out", tmp_path / "packed", "--json").json
    size = (tmp_path / "packed" / "model.sparse.safetensors").stat().st_size
    assert told["packed_bytes"] == size
    assert told["dense_bytes"] == (pruned / "model.safetensors").stat().st_size
    assert told["share"] == size / told["dense_bytes"]
    held = load_file(pruned / "model.safetensors")
    pruned_weights = sum(tensor.numel() for name, tensor in held.items() if "_proj" in name)
    assert (told["sparse"]["tensors"], told["sparse"]["elements"]) == (14, pruned_weights)
    rest = sum(tensor.numel() for tensor in held.values()) - pruned_weights
    assert told["alternatives"]["dense int8"] == 2 * rest + pruned_weights
    assert set(told["seconds"]) == set(told["bytes_per_second"]) == {"pack", "check"}
    (warning,) = told["warnings"]
    assert "dense int4, groups of 32" in warning
    told = run("unpack", tmp_path / "packed", "--out", tmp_path / "again", "--json").json
    assert told["bytes"] == (pruned / "model.safetensors").stat().st_size


def test_dense_weights_are_warned_of(run, model_dir, tmp_path):
    ran = run("export", model_dir, "--to", "sparse-safetensors", "--out", tmp_path / "packed", "--json")
    assert ran.json["warnings"] == [
        "no floating-point matrix is sparse: what was saved is compression of dense numbers, prune first"
    ]
    assert ran.json["bits_per_weight"]["sparse"] is None


def test_inspect_checks_promises_and_checksums_of_a_packed_directory(run, pruned, packed):
    dense, ran = run("inspect", pruned, "--json").json, run("inspect", packed, "--json")
    assert ran.code == 0
    room = {
        **dense["room"],
        "form": "sparse-safetensors",
        "bytes": (packed / "model.sparse.safetensors").stat().st_size,
    }
    assert ran.json == {**dense, "path": str(packed), "packed": True, "room": room}
    assert dense["packed"] is False
    assert dense["room"]["bytes"] == (pruned / "model.safetensors").stat().st_size
    assert "zeros take as much room" in run("inspect", pruned).out
    words = run("inspect", packed).out
    assert f"{8 * room['bytes'] / dense['elements']:.2f} bits a weight in all: packed, zeros are left out" in words
    assert "secateur export" not in words
    assert "every promise is kept" in words
    assert "every tensor's checksum is right" in words
    file = packed / "model.sparse.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 4
    file.write_bytes(damaged)
    for verb in (["inspect", packed], ["unpack", packed, "--out", packed.parent / "again"]):
        ran = run(*verb)
        assert ran.code == 1
        assert "is damaged" in ran.error
        assert "copy or download it again" in ran.error
    assert not (packed.parent / "again").exists()


def test_a_packed_directory_that_breaks_its_promise(run, pruned, tmp_path):
    tensors = load_file(pruned / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name] = torch.ones_like(tensors[name])
    for path in pruned.iterdir():
        if path.suffix == ".json":
            (tmp_path / "broken").mkdir(exist_ok=True)
            (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken" / "secateur").mkdir()
    (tmp_path / "broken" / "secateur" / "promise.json").write_bytes((pruned / "secateur/promise.json").read_bytes())
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    assert run("export", tmp_path / "broken", "--to", "sparse-safetensors", "--out", tmp_path / "packed").code == 0
    ran = run("inspect", tmp_path / "packed")
    assert ran.code == 1
    assert "1 broken" in ran.out


def test_an_unknown_target(run, pruned, tmp_path):
    ran = run("export", pruned, "--to", "zip", "--out", tmp_path / "packed")
    assert (ran.code, ran.error.split(";")[0]) == (2, "secateur: unknown target 'zip'")


def test_occupied(run, pruned, packed):
    ran = run("export", pruned, "--to", "sparse-safetensors", "--out", packed)
    assert ran.code == 2
    assert "choose a new directory" in ran.error


def test_a_packed_directory_is_not_evaluated(run, packed):
    ran = run("eval", packed, "--data", "embedded")
    assert ran.code == 1
    assert f"secateur unpack {packed}" in ran.error


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(end, run, tmp_path):
    """Nothing is at OUT; SIGTERM leaves nothing anywhere; the next attempt is not hindered, and clears up."""
    (tmp_path / "dense").mkdir()
    save_file({f"W{i}": torch.randn(1 << 20) for i in range(12)}, tmp_path / "dense" / "model.safetensors")
    words = ["export", tmp_path / "dense", "--to", "sparse-safetensors", "--out", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-m", "secateur", *map(str, words)], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.*.partial/model.sparse.safetensors")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    process.send_signal(end)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == (2 if end == signal.SIGKILL else 1)
    assert run(*words).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}
