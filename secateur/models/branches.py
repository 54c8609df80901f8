"""Low-rank branches beside a model's linears, y = x Wᵀ + (x Xᵀ) Sᵀ, with nothing in the model replaced.

The factors of a ``core.low_rank.Branch`` become two parameters of the linear's own module, ``low_rank_S`` and
``low_rank_X``, and a forward hook adds the second term. So they move, train and are cast with the model, and W stays
the weight that it was: sparse, under its name. What must not see them takes them off: ``detach``, or for a while
``set_aside``, as saving does. ``save_pretrained`` of a model that still has them would store them among its weights.

On disk they lie apart from the weights, in ``low_rank/``, as an ordinary LoRA adapter of PEFT: lora_A = X, lora_B = S,
and alpha = rank, so that PEFT's scale is 1. Written here, since two files need no dependency:

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(OUT), OUT + "/low_rank")

Factors take the dtype of the weight that they stand beside. PEFT multiplies 16 bit ones in float32.

R = out_features, C = in_features, r = rank.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.low_rank import Branch
from secateur.errors import ArtefactError, ModelError, UsageError
from secateur.models.linears import PlainLinear, matrix

FOLDER = "low_rank"
"""Inside a saved directory."""
CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
S, X, HOOK = "low_rank_S", "low_rank_X", "low_rank_hook"
"""What a module with a branch has more than others: two parameters, and the handle of its hook."""
LORA_S, LORA_X = ".lora_B.weight", ".lora_A.weight"
PEFT = "base_model.model."
"""PEFT wraps the model twice before it comes to the names of its modules."""
Branches = dict[str, Branch]
"""By the linear's full name."""


# -------------------------------------------------------------------------------------------------------- in the model


def attach(model: nn.Module, branches: Mapping[str, Branch]) -> list[nn.Parameter]:
    """Put branches beside linears of ``model`` (or of a block); the new parameters, S and X of each, without gradients.

    Raises ModelError where a module can carry none, UsageError where it is not there, has one, or has another shape.
    All are checked before the first is attached.
    """
    linears = {name: carrier(model, name) for name in branches}
    for name, linear in linears.items():
        _check_fit(name, matrix(linear), branches[name])
    parameters: list[nn.Parameter] = []
    for name, linear in linears.items():
        for key, factor in ((S, branches[name].S), (X, branches[name].X)):
            values = factor.detach().to(linear.weight.device, linear.weight.dtype, copy=True).contiguous()
            parameters.append(nn.Parameter(values, requires_grad=False))
            linear.register_parameter(key, parameters[-1])
        vars(linear)[HOOK] = linear.register_forward_hook(_add)
    return parameters


def detach(model: nn.Module) -> Branches:
    """Take all branches off, and give them back."""
    taken = attached(model)
    for name in taken:
        linear = model.get_submodule(name)
        vars(linear).pop(HOOK).remove()
        delattr(linear, S)
        delattr(linear, X)
    return taken


def attached(model: nn.Module) -> Branches:
    """The branches of a model or block, by the linear's name in it; the factors are the parameters themselves."""
    return {
        name: Branch(module.get_parameter(S), module.get_parameter(X))
        for name, module in model.named_modules()
        if HOOK in vars(module)
    }


@contextmanager
def set_aside(model: nn.Module) -> Iterator[Branches]:
    """Inside, the model is the sparse one alone; afterwards its branches are what they were, as new parameters."""
    branches = detach(model)
    try:
        yield branches
    finally:
        attach(model, branches)


def refuse_branches(found: Mapping[str, Branch], source: str) -> None:
    """UsageError for a model that has some: pruned again, its branches would make up for weights that are gone."""
    if found:
        raise UsageError(
            f"{source} has low-rank branches beside {len(found)} linears, fitted to the zeros that it has now; prune "
            f"the dense model, or take {FOLDER}/ away first"
        )


def carrier(model: nn.Module, name: str) -> PlainLinear:
    """The linear of that name, if a branch can stand beside it; raises as ``attach``."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"a branch for {name}, which is no module of this model; name one of its linears") from None
    if not isinstance(linear, PlainLinear):
        raise ModelError(
            f"{name} is a {type(linear).__name__}; a low-rank branch stands beside an nn.Linear or a Conv1D, fused "
            "experts carry none"
        )
    weight = linear.weight
    if weight.is_meta or not weight.is_floating_point():
        raise ModelError(f"{name} holds no plain weights in memory; load the model as a whole, in 16 or 32 bit")
    if HOOK in vars(linear):
        raise UsageError(f"{name} has a low-rank branch already; detach it first")
    return linear


def _add(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(args[0], linear.get_parameter(X)), linear.get_parameter(S))


def _check_fit(name: str, W: Tensor, branch: Branch) -> None:
    S, X = branch
    if (S.shape[0], X.shape[1]) != tuple(W.shape) or S.shape[1] != X.shape[0]:
        raise UsageError(
            f"{name} is {tuple(W.shape)} (out, in), its branch {tuple(S.shape)} times {tuple(X.shape)}; wanted (R, r) "
            "times (r, C)"
        )


# ------------------------------------------------------------------------------------------------------------- on disk


def tensors_of(branches: Mapping[str, Branch], prefix: str = "") -> dict[str, Tensor]:
    """The factors under the names that PEFT gives them."""
    named: dict[str, Tensor] = {}
    for name, branch in branches.items():
        named[prefix + name + LORA_S] = branch.S.detach().contiguous()
        named[prefix + name + LORA_X] = branch.X.detach().contiguous()
    return named


def branches_of(tensors: Mapping[str, Tensor], prefix: str = "") -> Branches:
    """Inverse of ``tensors_of``; names of other things are passed over. KeyError where half of a branch is missing."""
    names = [key.removeprefix(prefix).removesuffix(LORA_X) for key in tensors if key.endswith(LORA_X)]
    return {name: Branch(tensors[prefix + name + LORA_S], tensors[prefix + name + LORA_X]) for name in names}


def save_branches(branches: Mapping[str, Branch], folder: Path, *, transposed: bool = False) -> None:
    """Write a PEFT adapter into ``folder``, which is made. ``transposed``: the weights are stored (in, out)."""
    folder.mkdir()
    ranks = {name: branch.X.shape[0] for name, branch in branches.items()}
    text = json.dumps(_peft_config(ranks, transposed), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors_of(branches, PEFT), folder / FACTORS, {"format": "pt"})


def load_branches(folder: Path, factors: Mapping[str, Tensor] | None = None) -> Branches:
    """What ``save_branches`` wrote. ArtefactError where files are missing or damaged, or say something else.

    ``factors`` stand for its tensors where these are packed.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        branches = branches_of(load_file(folder / FACTORS) if factors is None else factors, PEFT)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtefactError(f"{folder}: not a readable adapter ({error}); save or copy it again") from error
    if foreign := _foreign(config, branches):
        raise ArtefactError(f"{folder}: {foreign}; wanted branches as secateur saves them, prune again")
    return branches


def _peft_config(ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that matter; the most common rank is ``r``, the others have rows of their own."""
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r))
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
    }


def _foreign(config: Any, branches: Branches) -> str | None:
    """What in an adapter's config is not ours: another scale than 1, another method, other linears."""
    ranks = {name: branch.X.shape[0] for name, branch in branches.items()}
    if not ranks or not isinstance(config, dict):
        return f"{CONFIG} or {FACTORS} is empty"
    wanted = _peft_config(ranks, bool(config.get("fan_in_fan_out")))
    differ = [key for key in wanted if key != "target_modules" and config.get(key) != wanted[key]]
    if set(config.get("target_modules") or ()) != set(ranks):
        return f"{CONFIG} and {FACTORS} name different linears"
    if differ:
        return f"{CONFIG} has {differ[0]} {config.get(differ[0])!r} where its factors want {wanted[differ[0]]!r}"
    return None
