"""A saved directory loads as any other and gives the same numbers; a directory appears complete or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import load
from secateur.models.quiet import quiet
from secateur.models.save import clear_leftovers, place_of, save, staged

TOKENS = torch.arange(2, 34)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_gguf_becomes_an_ordinary_directory(tiny_gguf, tmp_path, capfd):
    check_round_trip(load(str(tiny_gguf)), tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_demo_model_becomes_an_ordinary_directory(tmp_path):
    check_round_trip(load("demo"), tmp_path)


def check_round_trip(loaded, out):
    save(loaded.model, loaded.tokenizer, out)
    with quiet():
        again = AutoModelForCausalLM.from_pretrained(out).eval()
        tokenizer = AutoTokenizer.from_pretrained(out)
    assert torch.equal(logits(again), logits(loaded.model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert tokenizer("the hen").input_ids == loaded.tokenizer("the hen").input_ids
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == loaded.model.generation_config.eos_token_id
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"]
    assert "quantization_config" not in config
    assert load(str(out)).fingerprint == loaded.fingerprint


def test_a_gguf_model_that_someone_else_loaded(tiny_gguf, tmp_path):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    assert model.config.quantization_config.quant_method == "gguf"  # its weights are plain all the same
    DecoderAdapter(model).verify(TOKENS)
    save(model, load(str(tiny_gguf)).tokenizer, tmp_path)
    assert torch.equal(logits(load(str(tmp_path)).model), logits(model))


def test_16_bit_models_stay_16_bit(stories, tmp_path):
    loaded = load(str(stories), dtype="bfloat16")
    save(loaded.model, loaded.tokenizer, tmp_path)
    again = load(str(tmp_path))
    assert again.model.dtype == torch.bfloat16
    assert again.fingerprint == loaded.fingerprint
    assert not loaded.model.config.use_cache


def test_saving_twice_gives_the_same_bytes(stories, tmp_path):
    for name in ("one", "two"):
        loaded = load(str(stories))
        (tmp_path / name).mkdir()
        save(loaded.model, loaded.tokenizer, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "model.safetensors" in files
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def write(folder, text):
    (folder / "secateur").mkdir()
    (folder / "weights").write_text(text)


def test_a_directory_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "new" / "out"
    with staged(out) as stage:
        write(stage, "1")
        assert not out.exists()
        assert stage.parent == out.parent
    assert (out / "weights").read_text() == "1"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    with staged(out, overwrite=True) as stage:
        write(stage, "old")

    def fail():
        with staged(out, overwrite=True) as stage:
            write(stage, "new")
            raise error

    with pytest.raises(error):
        fail()
    assert (out / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_our_own_directory_is_replaced_only_when_allowed(tmp_path):
    out = tmp_path / "out"
    with staged(out, overwrite=True) as stage:
        write(stage, "old")
    with pytest.raises(UsageError, match="out exists; choose a new directory"), staged(out):
        pass
    with staged(out, overwrite=True) as stage:
        write(stage, "new")
    assert (out / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_refused(tmp_path, overwrite):
    for name, make in {
        "folder": lambda p: (p.mkdir(), (p / "thesis.tex").touch()),
        "file": lambda p: p.touch(),
        "project": lambda p: ((p / "secateur").mkdir(parents=True), (p / "secateur" / "__init__.py").touch()),
    }.items():
        make(tmp_path / name)
        with pytest.raises(UsageError, match="choose a new directory"), staged(tmp_path / name, overwrite=overwrite):
            pass


@pytest.mark.parametrize("name", ["my_notes.txt", ".git/config", "gguf/model.gguf", "secateur/inner/model.safetensors"])
def test_what_was_put_into_our_directory_is_not_lost(tmp_path, name):
    with staged(tmp_path / "out", overwrite=True) as stage:
        write(stage, "old")
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).touch()
    with pytest.raises(UsageError, match=f"out holds {name}, which no run"), staged(tmp_path / "out", overwrite=True):
        pass
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to(tmp_path)
    with pytest.raises(UsageError, match=f"out holds {name}, which no run"), staged(tmp_path / "out", overwrite=True):
        pass


@pytest.mark.parametrize("there", ["nothing", "empty", "ours"])
def test_a_link_stays_one_and_what_is_written_goes_where_it_leads(tmp_path, there):
    (tmp_path / "disk").mkdir()
    out, target = tmp_path / "out", tmp_path / "disk" / "result"
    out.symlink_to(target)
    if there == "nothing":
        with pytest.raises(UsageError, match=r"out is a link to .*result, where nothing is"):
            place_of(out)
        return
    target.mkdir()
    if there == "ours":
        with staged(target, overwrite=True) as stage:
            write(stage, "old")
    with staged(out, overwrite=True) as stage:
        assert stage.parent == target.parent
        write(stage, "new")
    assert (out.readlink(), (target / "weights").read_text()) == (target, "new")
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_directory_is_nobodys(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with staged(out) as stage:
        write(stage, "1")
    assert (out / "weights").exists()


def test_leftovers_of_killed_runs_are_cleared_but_never_the_only_copy(tmp_path):
    out = tmp_path / "out"
    names = [".out.0123abcd.partial", ".out.0123abcd.old", ".out2.0123abcd.partial", "out.0123abcd.partial"]
    for name in names:
        (tmp_path / name).mkdir()
    clear_leftovers(out)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
    out.mkdir()
    (tmp_path / ".out.89abcdef.old").symlink_to(tmp_path / names[3])
    clear_leftovers(out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[2:]}
