"""``torch-2:4``: written, read in a process of its own, and what is chosen for a GPU, with clocks that are set."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import export_to, load_sparse
from secateur.core.pattern import NM, Unstructured, keep_mask, pattern_to_dict
from secateur.core.two_of_four import pack
from secateur.errors import ArtefactError, DeviceError, UsageError
from secateur.models import sparse24_loader
from secateur.models.container import read_header
from secateur.models.sparse24 import dense_state
from secateur.models.sparse24_loader import checksum, swap


@pytest.fixture
def pruned(tiny_llama, tmp_path) -> Path:
    """A 2:4 model in bfloat16 with its promise."""
    path, linears = tmp_path / "pruned", {}
    for name, parameter in tiny_llama.named_parameters():
        if "_proj" in name:
            parameter *= keep_mask(parameter.abs(), NM(2, 4))
            linears[name] = {"pattern": pattern_to_dict(NM(2, 4)), "transposed": False}
    tiny_llama.bfloat16().save_pretrained(path)
    (path / "secateur").mkdir()
    (path / "secateur" / "promise.json").write_text(json.dumps({"linears": linears, "tied": []}))
    return path


@pytest.fixture
def exported(pruned, tmp_path) -> Path:
    export_to(pruned, "torch-2:4", tmp_path / "out")
    return tmp_path / "out"


def test_every_tensor_comes_back(pruned, tmp_path):
    told = export_to(pruned, "torch-2:4", tmp_path / "out")
    held, state = load_file(pruned / "model.safetensors"), dense_state(tmp_path / "out")
    assert set(state) == set(held)
    assert all(torch.equal(state[name], held[name]) for name in held)
    matrices = [tensor for name, tensor in held.items() if "_proj" in name]
    assert len(told["matrices"]) == len(matrices) == 14
    saved = sum(tensor.nbytes for tensor in matrices) * 7 // 16
    stored = load_file(tmp_path / "out" / "model.sparse24.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == sum(t.nbytes for t in held.values()) - saved
    elements = sum(tensor.numel() for tensor in held.values())
    assert told["bits_per_weight"] == {"sparse": 9, "whole": 8 * told["packed_bytes"] / elements}
    weights = sum(tensor.numel() for tensor in matrices)
    assert told["alternatives"]["dense int8"] == 2 * (elements - weights) + weights  # all else at 16 bit, as everywhere
    assert "without any zeros: dense int8" in told["warnings"][0]
    assert told["share"] == told["packed_bytes"] / told["dense_bytes"] < 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_without_a_promise_what_is_two_of_four_is_packed(pruned, tmp_path):
    shutil.rmtree(pruned / "secateur")
    assert len(export_to(pruned, "torch-2:4", tmp_path / "out")["matrices"]) == 14


def test_what_is_promised_otherwise_is_named_and_stays_dense(pruned, tmp_path):
    other_pattern(pruned, "up_proj")
    held = load_file(pruned / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][0, :4] = 1
    save_file(held, pruned / "model.safetensors", metadata={"format": "pt"})
    told = export_to(pruned, "torch-2:4", tmp_path / "out")
    assert len(told["matrices"]) == 13, "one of the two is 2:4 all the same"
    assert "promised matrices stored with their zeros: 1, the first model.layers.1" in told["warnings"][0]
    assert "up_proj.weight is not 2:4 but 50%" in told["warnings"][0]


def test_a_fresh_process_reads_it_without_secateur(pruned, exported):
    """The reader that lies in the directory needs torch and safetensors."""
    code = (
        "import sys, torch, sparse24_loader as s; state, packed = s.read_state('.');"
        "print(len(packed), float(sum(t.double().abs().sum() for t in state.values())));"
        "assert not any(name.startswith('secateur') for name in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=True)
    count, total = ran.stdout.split()
    wanted = sum(tensor.double().abs().sum() for tensor in load_file(pruned / "model.safetensors").values())
    assert (int(count), float(total)) == (14, pytest.approx(float(wanted)))


def test_slower_matrices_stay_dense(pruned):
    """Clocks say: one form is faster for the wide matrices alone. One fails on every shape, one multiplies wrongly."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pruned).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    packed = [name for name in before if "_proj" in name]

    def wrong(linear: torch.nn.Linear, codes: object) -> torch.nn.Module:
        made = copy.deepcopy(linear)
        made.weight.data *= 1.1
        return made

    def refuse(linear: torch.nn.Linear, codes: object) -> torch.nn.Module:
        raise RuntimeError("wants rows of 128\nand more")

    def fast(linear: torch.nn.Linear, codes: object) -> torch.nn.Module:
        return torch.nn.Sequential(linear)

    def clock(made, X):
        dense = isinstance(made, torch.nn.Linear)
        linear = made if dense else made[0]
        assert X.shape == (16, linear.in_features)
        return 2.0 if dense else (1.0 if linear.out_features == 64 else 3.0)

    forms = {"fast": fast, "wrong": wrong, "broken": refuse}
    report = swap(model, dict.fromkeys(packed), 16, clock, lambda codes: forms)
    chosen = {choice.name: choice.chosen for choice in report}
    assert {name for name, form in chosen.items() if form == "fast"} == {
        name for name in packed if "gate" in name or "up" in name
    }
    for name in packed:
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, torch.nn.Sequential) == (chosen[name] == "fast"), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name.replace(".0.weight", ".weight")]), name
    assert report[0].failed == {"broken": "wants rows of 128", "wrong": "its products are off by 0.1 of their norm"}
    assert report[0].ms == {"dense": 2.0, "fast": 3.0}


def test_opened_where_nothing_is_sparse(pruned, exported, monkeypatch):
    """The whole of ``load_sparse`` but the GPU: what no kernel takes stays dense, and is the same function."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(sparse24_loader, "lacks", lambda: None)
    monkeypatch.setattr(sparse24_loader, "time_on_gpu", lambda form, X: float(form(X).isfinite().all()))
    model, report = load_sparse(exported, device="cpu", tokens=64)
    assert {choice.chosen for choice in report} == {"dense"}
    assert "cutlass" in report[0].failed
    ids = torch.arange(32)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(pruned)(ids).logits)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_function(pruned, exported):
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, report = load_sparse(exported, tokens=64)
    dense = AutoModelForCausalLM.from_pretrained(pruned).cuda()
    ids = torch.arange(32, device="cuda")[None]
    assert len(report) == 14
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)


# ---- what is refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu(exported):
    with pytest.raises(DeviceError, match=r"no CUDA device here; .* compute capability 8.0 or more"):
        load_sparse(exported)


def other_pattern(pruned: Path, part: str = "") -> None:
    path = pruned / "secateur" / "promise.json"
    told = json.loads(path.read_text())
    for name in told["linears"]:
        if part in name:
            told["linears"][name]["pattern"] = pattern_to_dict(Unstructured(0.5))
    path.write_text(json.dumps(told))


def broken_weight(pruned: Path) -> None:
    held = load_file(pruned / "model.safetensors")
    held["model.layers.0.self_attn.k_proj.weight"][3, :4] = 1
    save_file(held, pruned / "model.safetensors", metadata={"format": "pt"})


def dense(pruned: Path) -> None:
    shutil.rmtree(pruned / "secateur")
    held = {name: tensor.fill_(1) for name, tensor in load_file(pruned / "model.safetensors").items()}
    save_file(held, pruned / "model.safetensors", metadata={"format": "pt"})


def no_promise(pruned: Path) -> None:
    (pruned / "secateur" / "promise.json").write_text('{"linears": 3}')


def truncated(pruned: Path) -> None:
    file = pruned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def nested_promise(pruned: Path) -> None:
    (pruned / "secateur" / "promise.json").write_text("[" * 9999)


def branched(pruned: Path) -> None:
    (pruned / "low_rank").mkdir()


def test_experts_that_the_model_holds_fused_are_not_packed(moe, tmp_path):
    moe("mixtral").bfloat16().save_pretrained(tmp_path / "moe")
    file = tmp_path / "moe" / "model.safetensors"
    held = {name: W * keep_mask(W.abs(), NM(2, 4)) if W.ndim == 2 else W for name, W in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    told = export_to(tmp_path / "moe", "torch-2:4", tmp_path / "out")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in told["matrices"]} == {
        *(f"{x}_proj" for x in "qkvo"),
        "lm_head",
    }
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert name in held
    linears = {name: {"pattern": pattern_to_dict(NM(2, 4)), "transposed": False}}
    (tmp_path / "moe" / "secateur").mkdir()
    (tmp_path / "moe" / "secateur" / "promise.json").write_text(json.dumps({"linears": linears, "tied": []}))
    with pytest.raises(UsageError, match=rf"{name} is no linear of its own in the model"):
        export_to(tmp_path / "moe", "torch-2:4", tmp_path / "packed")


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (branched, UsageError, r"has low-rank branches, which this target cannot carry; prune without --low-rank"),
        (other_pattern, UsageError, r"model.layers.0.*weight is not 2:4 but 50%; prune with --pattern 2:4"),
        (broken_weight, UsageError, r"model.layers.0.self_attn.k_proj.weight is not 2:4: row 3 has more than 2"),
        (dense, UsageError, r"model\..*weight is not 2:4, nor is any matrix of"),
        (no_promise, ArtefactError, r"not a promise file"),
        (nested_promise, ArtefactError, r"promise.json: not readable JSON"),
        (truncated, ArtefactError, r"/pruned/model.safetensors has \d+ bytes and \d+ by its header; copy or download"),
    ],
)
def test_what_cannot_be_exported(spoil, kind, said, pruned, tmp_path):
    spoil(pruned)
    with pytest.raises(kind, match=said):
        export_to(pruned, "torch-2:4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def flipped_in_a_norm(file: Path) -> None:
    header = read_header(file)
    data = bytearray(file.read_bytes())
    data[header.data_at + header.tensors["model.norm.weight"].start] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def later(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"sparse24":"2"', b'"sparse24":"3"'))


def gone(file: Path) -> None:
    file.unlink()


NAME = "model.layers.0.mlp.up_proj.weight"


def rewritten(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """One tensor changed, and its checksum with it."""

    def spoil(file: Path) -> None:
        held = load_file(file)
        held[part] = change(held[part]).contiguous()
        sums = {name: checksum(tensor) for name, tensor in held.items()}
        save_file(held, file, metadata=read_header(file).metadata | {"sums": json.dumps(sums)})

    return spoil


def says(**words: str) -> Callable[[Path], None]:
    """Other metadata."""
    return lambda file: save_file(load_file(file), file, metadata=read_header(file).metadata | words)


def test_a_missing_shard_is_not_filled_in_at_random(pruned, tmp_path, monkeypatch):
    """The head is tied and stored nowhere: only what really lacks is missed."""
    held = load_file(pruned / "model.safetensors")
    for number in (1, 2):
        part = {name: tensor for name, tensor in held.items() if (".layers.1." in name) == (number == 2)}
        save_file(part, pruned / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    (pruned / "model.safetensors").unlink()
    export_to(pruned, "torch-2:4", tmp_path / "out")
    monkeypatch.setattr(sparse24_loader, "lacks", lambda: None)
    monkeypatch.setattr(sparse24_loader, "time_on_gpu", lambda form, X: 1.0)
    load_sparse(tmp_path / "out", device="cpu", tokens=32)
    (tmp_path / "out" / "model-00002-of-00002.sparse24.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"lacks 9 tensors, such as model.layers.1.input_layernorm.weight; copy"):
        load_sparse(tmp_path / "out", device="cpu", tokens=32)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flipped, "damaged"),
        (flipped_in_a_norm, "model.norm.weight is damaged"),
        (cut, "cannot be read"),
        (later, r"is of version 3, this reads 2"),
        (gone, r"holds no \*"),
        (rewritten(f"{NAME}.values", lambda values: values[:-1]), r"\(63, 16\) values have \(64, 4\) places"),
        (rewritten(f"{NAME}.values", torch.Tensor.flatten), r"\(1024,\) values have"),
        (rewritten(f"{NAME}.values", lambda values: values[0, 0]), r"\(\) values have"),
        (rewritten(f"{NAME}.places", lambda places: places[:, :-1]), r"have \(64, 3\) places"),
        (rewritten(f"{NAME}.places", torch.Tensor.float), "places in torch.float32"),
        *((says(packed=text), "cannot be read") for text in ("", "3", "null", "[3]", "[[]]", "[" * 9999)),
        *((says(sums=text), "cannot be read") for text in ("", "3", "null", "[]", "{}", "[" * 9999)),
        (says(packed="{}"), "packs no matrix"),
    ],
)
def test_damaged_directories(spoil, said, exported):
    """The reader's own error, in the line that Secateur gives on: the path, what is wrong, what to do."""
    spoil(exported / "model.sparse24.safetensors")
    with pytest.raises(sparse24_loader.DamagedError, match=said) as caught:
        sparse24_loader.read_state(str(exported))
    with pytest.raises(ArtefactError, match=rf"^{re.escape(str(caught.value))}$"):
        dense_state(exported)
    assert re.match(rf"{re.escape(str(exported))}.*(copy|export|give|update)[^\n]*$", str(caught.value))


def embedding_packed(out: Path) -> None:
    name, file = "model.embed_tokens.weight", out / "model.sparse24.safetensors"
    held, words = load_file(file), read_header(file).metadata
    held[f"{name}.values"], held[f"{name}.places"] = pack(torch.zeros_like(held.pop(name)))
    sums = {name: checksum(tensor) for name, tensor in held.items()}
    told = {"packed": json.dumps([*json.loads(words["packed"]), name]), "sums": json.dumps(sums)}
    save_file(held, file, metadata=words | told)


def other_model(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


@pytest.mark.parametrize(
    "spoil",
    [
        embedding_packed,
        other_model,
        lambda out: (out / "config.json").unlink(),
        lambda out: (out / "config.json").write_text("["),
    ],
)
def test_what_is_no_model(spoil, exported, monkeypatch):
    monkeypatch.setattr(sparse24_loader, "lacks", lambda: None)
    spoil(exported)
    with pytest.raises(sparse24_loader.DamagedError) as caught:
        sparse24_loader.load_sparse(str(exported), device="cpu")
    wanted = rf"{re.escape(str(exported))} cannot be opened \(.*\); copy or export it again"
    assert re.fullmatch(wanted, str(caught.value))
