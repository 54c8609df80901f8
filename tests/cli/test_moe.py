"""A mixture of experts from end to end: what is stored is promised matrix by matrix, and loads as what was pruned."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

SMALL = ["--samples", "4", "--seq-len", "32"]
NAMES = ["mixtral", "qwen2_moe"]


@pytest.fixture(scope="module")
def made(run, moe, byte_tokenizer, text_file, tmp_path_factory):
    """``made("mixtral")``: the dense directory, the pruned one and what the run said."""
    done = {}

    def make(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            moe(name, vocab_size=260).save_pretrained(folder / "dense")
            byte_tokenizer.save_pretrained(folder / "dense")
            flags = ["--method", "sparsellm", "--pattern", "2:4", "--data", text_file, *SMALL]
            ran = run("prune", folder / "dense", *flags, "--out", folder / "out")
            assert ran.code == 0, ran.err
            done[name] = folder / "dense", folder / "out", ran
        return done[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_the_report_counts_all_experts_and_says_what_was_left_alone(made, name):
    _, out, ran = made(name)
    report = json.loads((out / "secateur" / "report.json").read_text())
    experts = 2 * 6 * 3
    assert report["linears"] == 2 * (4 + (3 if name == "qwen2_moe" else 0)) + experts
    assert report["sparsity"] == {"requested": 0.5, "achieved": 0.5}
    gates = ["gate", "shared_expert_gate"] if name == "qwen2_moe" else ["gate"]
    assert report["left_alone"] == [f"model.layers.{i}.mlp.{gate}.weight" for i in range(2) for gate in gates]
    assert f"{2 * len(gates)} routers and gates of experts, the first model.layers.0.mlp.gate.weight" in ran.out
    short = [line for line in report["warnings"] if "routed to this expert" in line]
    assert short, "128 tokens for 6 experts of width 32: some are short of them"
    assert "warning: model.layers.0.mlp.experts." in ran.out


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_is_what_was_pruned(made, run, name, text_file, monkeypatch):
    monkeypatch.setattr("secateur.planning.rates.PATIENCE", 0.0)
    dense, out, _ = made(name)
    flags = ["--method", "sparsellm", "--pattern", "2:4", "--data", text_file, *SMALL, "--json"]
    ran = run("plan", dense, *flags)
    assert ran.code == 0, ran.err
    assert "spread the tokens evenly" in ran.json["notes"][-1]
    report = json.loads((out / "secateur" / "report.json").read_text())
    assert sum(row["count"] for row in ran.json["linears"]) == report["linears"]
    assert sum(row["weights"] for row in ran.json["linears"]) == report["weights"]
    experts = {row["role"]: row["count"] for row in ran.json["linears"] if ".experts." in row["role"]}
    assert experts == {f"mlp.experts.*.{part}_proj": 12 for part in ("gate", "up", "down")}
    lines = (out / "secateur" / "records.jsonl").read_text().splitlines()
    assert {row["name"] for row in ran.json["stages"]} == {*json.loads(lines[0])["stages"], "sample"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_keeps_every_promise_of_every_expert(made, run, name):
    dense, out, _ = made(name)
    found = run("inspect", out, "--baseline", dense, "--json")
    assert found.code == 0, found.out
    rows = [row for row in found.json["rows"] if ".experts." in row["name"]]
    assert len(rows) == 36
    assert all(row["ok"] and row["sparsity"] == 0.5 for row in rows)
    report = json.loads((out / "secateur" / "report.json").read_text())
    assert (found.json["weights"], found.json["sparsity"]) == (report["weights"], 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_loads_as_what_was_pruned(made, name, text_file, tmp_path):
    import torch

    from secateur.api import prune
    from secateur.config import PruneConfig
    from secateur.core.solvers import Wanda
    from secateur.models.load import load

    config = PruneConfig(method=Wanda(), sparsity=0.5, data=str(text_file), samples=4, seq_len=32)
    pruned = prune(str(made(name)[0]), config, out=tmp_path / "out").model
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "out")).model(tokens).logits, pruned(tokens).logits)


EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.4.w3.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.4.up_proj.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_promise_of_one_expert_is_found(made, run, name, tmp_path):
    out = shutil.copytree(made(name)[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors[EXPERT[name]][7, :4] = 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ran = run("inspect", out)
    assert ran.code == 1
    assert f"{EXPERT[name]}: 1 of 192 groups of 4 hold more than 2 weights" in " ".join(ran.out.split())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offload", ["off", "on"])
def test_a_mixture_is_resumed_to_the_same_weights(made, run, name, offload, text_file, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    dense, whole, _ = made(name)
    flags = ["--method", "sparsellm", "--pattern", "2:4", "--data", text_file, *SMALL, "--offload", offload]
    with monkeypatch.context() as patch:
        patch.setattr("secateur.runs.save", fail)
        assert run("prune", dense, *flags, "--out", tmp_path / "out").code == 1
    ran = run("prune", dense, *flags, "--out", tmp_path / "out", "--resume")
    assert ran.code == 0, ran.err
    expected, found = weights(whole), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)
    assert run("inspect", tmp_path / "out", "--baseline", dense).code == 0


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
