"""PEFT's files of a LoRA, "adapter_config.json" and "adapter_model.safetensors", and what of them is what here.

Name for name, below "base_model.model.", with R the rank:

    <layer>.lora_A.weight                     (R, K), of a convolution (R, C, kh, kw): ``<layer>.lora_a`` (R, C kh kw)
    <layer>.lora_B.weight                     (N, R), of a convolution (N, R, 1, 1):   ``<layer>.lora_b``
    <attention>.lora_A.weight                 nn.MultiheadAttention's in_proj, q, k and v together
    <attention>.base_layer.out_proj.lora_A.weight                             and its out_proj
    <module>.<name>                           modules_to_save: the whole state of modules that train

PEFT adds out_proj's term to the output of an nn.MultiheadAttention twice. Equal outputs need twice its B here.

Source: huggingface/peft, src/peft/utils/save_and_load.py, tuners/lora/layer.py and tuners/lora/config.py, 0.21.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyfused.methods.tuned import ATTENTION, CONV, LINEAR, OUT_PROJ, Tuned, is_lora
from pyfused.surgery.paths import under

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TWICE = "PEFT adds out_proj's term of an nn.MultiheadAttention twice, so that B was"
_PREFIX = "base_model.model."
_PEFT = "0.21.2"
# The last minor release that is known to add it twice, and no other is.
_TWICE_UP_TO = (0, 21)
# What has no part in what a file computes: where it came from, which layers the tensors' names tell, how B A started.
_NO_PART = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
# Others change the base's weights too, which the file does not hold.
_STARTS = (True, False, "gaussian")


def to_peft(tuned: Tuned, conv1d: bool = False, caller: str = "save_lora") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors.

    Args:
        tuned: LoRA, and modules that train whole.
        conv1d: whether its linear layers are transformers' Conv1D.
        caller: in whose name errors are raised.

    Raises:
        ValueError: what PEFT has no form for, by name.
    """
    if not any(is_lora(own) for own in tuned.modules.values()):
        raise ValueError(f"{caller}: PEFT's file must hold LoRA, got none")
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for path, own in tuned.modules.items():
        why = _no_form(path, own, tuned)
        if why is not None:
            raise ValueError(f"{caller}: PEFT has no form for {path or 'the model'!r}: {why}; save_tuned keeps it")
        lora_a, lora_b = (
            next(tensor for name, tensor in tuned.of_module(path).items() if name.endswith(kind))
            for kind in ("lora_a", "lora_b")
        )
        place = path
        if own["kind"] == OUT_PROJ:
            place, lora_b = f"{path.rpartition('.')[0]}.base_layer.out_proj", _wide(lora_b) / 2
        else:
            layers[path] = own
        if own["kind"] == CONV:
            lora_a = lora_a.unflatten(1, (-1, *own["kernel_size"]))
            lora_b = lora_b[..., None, None]
        state |= {f"{_PREFIX}{place}.lora_A.weight": lora_a, f"{_PREFIX}{place}.lora_B.weight": lora_b}
    if tuned.trained_parameters:
        raise ValueError(
            f"{caller}: PEFT has no form for the single parameter {tuned.trained_parameters[0]!r}, which trains; "
            "save_tuned keeps it"
        )
    for path in layers:
        root = next((root for root in tuned.trained_modules if re.match(rf"(^|.*\.){root}($|\..*)", path)), None)
        if root is not None:
            raise ValueError(
                f"{caller}: PEFT would take {path!r} for a part of {root!r}, which trains whole, by its name, and give "
                "it no LoRA; save_tuned keeps it"
            )
    state |= {_PREFIX + name: tuned.tensors[name] for name in tuned.trained()}
    return _config(caller, layers, tuned.trained_modules, conv1d), state


def _no_form(path: str, own: Mapping[str, Any], tuned: Tuned) -> str | None:
    kind, parent = own["kind"], path.rpartition(".")[0]
    if not path:
        return "PEFT adapts layers inside a model"
    if kind == ATTENTION:
        out = tuned.modules.get(f"{path}.out_proj", {})
        if own["qkv"] != "joint":
            return f"LoRA on q, k and v apart (qkv={own['qkv']!r})"
        if not out:
            return "LoRA on in_proj without out_proj"
        same = all(own[name] == out[name] for name in ("rank", "alpha"))
        return None if same else "rank or alpha of in_proj are not those of out_proj"
    if kind == OUT_PROJ:
        return None if parent in tuned.modules else "LoRA on out_proj without in_proj"
    if kind == CONV:
        if own["groups"] != 1:
            return f"a convolution with groups = {own['groups']}, whose B is grouped in PEFT and dense here"
        if list(own["kernel_size"]) != [1, 1] and list(own["dilation"]) != [1, 1]:
            return f"a convolution with dilation = {own['dilation']}, which PEFT's A has not"
        if own["padding_mode"] != "zeros":
            return f"a convolution with padding_mode = {own['padding_mode']!r}, which PEFT's A has not"
        return None
    return None if kind == LINEAR else f"a {kind}"


def _config(caller: str, layers: Mapping[str, dict[str, Any]], trained: tuple[str, ...], conv1d: bool) -> dict:
    for name in ("dropout", "use_rslora"):
        values = sorted({own[name] for own in layers.values()})
        if len(values) > 1:
            raise ValueError(f"{caller}: PEFT has one {name} for all layers, got {values}; save_tuned keeps them")
    rank, alpha = (Counter(own[name] for own in layers.values()).most_common(1)[0][0] for name in ("rank", "alpha"))
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        # Whose reading of these files this is.
        "peft_version": _PEFT,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "lora_dropout": first["dropout"],
        "use_rslora": first["use_rslora"],
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exactly(path): own["rank"] for path, own in layers.items() if own["rank"] != rank},
        "alpha_pattern": {
            _exactly(path): _number(own["alpha"]) for path, own in layers.items() if own["alpha"] != alpha
        },
        # One pattern: PEFT looks for the names of a list at the end of others too.
        "target_modules": "|".join(re.escape(path) for path in sorted(layers)),
        "modules_to_save": list(trained) or None,
    }


def _exactly(path: str) -> str:
    """PEFT's pattern for one path: it looks for patterns at the end of names."""
    return f"^{re.escape(path)}"


def _wide(lora_b: Tensor) -> Tensor:
    """In float32 or wider, where half and twice are exact."""
    return lora_b.to(torch.promote_types(lora_b.dtype, torch.float32))


def _number(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha


# ---- from PEFT


def from_peft(config: Mapping[str, Any], state: Mapping[str, Tensor], caller: str = "load_lora") -> Tuned:
    """What PEFT's configuration and tensors are here.

    Raises:
        ValueError: what has no form here, by name; or a file that contradicts itself.
    """
    _check_config(caller, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(_PREFIX):
            raise ValueError(f"{caller}: names of PEFT's file must begin with {_PREFIX!r}, got {name!r}")
        name = name.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif re.search(r"\.lora_[a-zA-Z_]+(\.|$)", name):
            raise ValueError(
                f"{caller}: {name!r} of PEFT's file has no form here: weights of linear layers, convolutions and "
                "nn.MultiheadAttention alone have one"
            )
        else:
            rest[name] = tensor
    if not pairs:
        raise ValueError(f"{caller}: PEFT's file must hold LoRA, got none")
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    twice = {path for path in pairs if path.endswith(".base_layer.out_proj")}
    attentions = {path.removesuffix(".base_layer.out_proj") for path in twice}
    if twice:
        _check_version(caller, config)
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{caller}: PEFT's file must hold lora_A and lora_B of {path!r}, got one of them")
        layer = path.removesuffix(".base_layer.out_proj") if path in twice else path
        if path in twice and layer not in pairs:
            raise ValueError(f"{caller}: PEFT's file must hold in_proj's pair of {layer!r} beside out_proj's, got none")
        own = _settings(caller, layer, pair, config)
        here = f"{layer}.out_proj" if path in twice else layer
        lora_a, lora_b = pair["A"].flatten(1), pair["B"].flatten(1)
        if path in twice:
            own["kind"], lora_b = OUT_PROJ, _wide(lora_b) * 2
        prefix = ""
        if path in attentions:
            own |= {"kind": ATTENTION, "qkv": "joint"}
            prefix = "in_proj_"
        modules[here] = own
        tensors |= {f"{here}.{prefix}lora_a": lora_a, f"{here}.{prefix}lora_b": lora_b}
    roots = _saved_modules(caller, rest, config)
    return Tuned(tensors | rest, modules, roots)


def _check_config(caller: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{caller}: peft_type of {CONFIG} must be 'LORA', got {config.get('peft_type')!r}")
    number = (int, float)
    for name, expected, default in (("r", int, None), ("lora_alpha", number, None), ("lora_dropout", number, 0.0)):
        value = config.get(name, default)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise ValueError(f"{caller}: {CONFIG} must hold {name}, got {value!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(isinstance(value, number) for value in patterns.values()):
            raise ValueError(f"{caller}: {name} of {CONFIG} must hold numbers by pattern, got {patterns!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{caller}: modules_to_save of {CONFIG} must be a list of names, got {saved!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{caller}: bias of {CONFIG} must be 'none', got {config['bias']!r}: it trains biases too")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"{caller}: init_lora_weights of {CONFIG} must be one of {_STARTS}, got {start!r}: such a start changes "
            "the base's weights, which the file does not hold; let PEFT convert it to plain LoRA"
        )
    known = _NO_PART | _READ | {"init_lora_weights", "modules_to_save"}
    for name in sorted(config.keys() - known):
        if config[name]:
            raise ValueError(f"{caller}: {name} of {CONFIG} has no form here, got {config[name]!r}")


def _check_version(caller: str, config: Mapping[str, Any]) -> None:
    given = str(config.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", given)
    if found and (int(found[1]), int(found[2])) > _TWICE_UP_TO:
        raise ValueError(
            f"{caller}: peft_version of {CONFIG} must be at most {'.'.join(map(str, _TWICE_UP_TO))} for an "
            f"nn.MultiheadAttention, got {given}: whether that release adds out_proj's term twice is not known here"
        )


def _settings(caller: str, layer: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Kind and settings of one layer."""
    lora_a, lora_b = pair["A"], pair["B"]
    rank = _by_pattern(caller, "rank_pattern", layer, config, config["r"])
    alpha = _by_pattern(caller, "alpha_pattern", layer, config, config["lora_alpha"])
    conv = lora_a.dim() == 4
    expected = (lora_b.shape[0], rank, 1, 1) if conv else (lora_b.shape[0], rank)
    if lora_a.dim() not in (2, 4) or lora_b.dim() != lora_a.dim() or lora_a.shape[0] != rank:
        raise ValueError(
            f"{caller}: lora_A and lora_B of {layer!r} must be matrices, or a convolution's, of the rank {rank} that "
            f"{CONFIG} says, got shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    if lora_b.shape != expected:
        raise ValueError(
            f"{caller}: lora_B of {layer!r} must have shape {expected}, got {tuple(lora_b.shape)}: a convolution with "
            "groups, whose B is grouped in PEFT and dense here, has no form here"
        )
    own = {
        "kind": CONV if conv else LINEAR,
        "rank": rank,
        "alpha": float(alpha),
        "dropout": float(config.get("lora_dropout", 0.0)),
        "use_rslora": bool(config.get("use_rslora", False)),
    }
    if conv:
        own |= {"kernel_size": list(lora_a.shape[2:]), "groups": 1, "dilation": [1, 1], "padding_mode": "zeros"}
    return own


def _by_pattern(caller: str, name: str, layer: str, config: Mapping[str, Any], default: Any) -> Any:
    """As PEFT finds it: the first pattern that the layer's name, or the end of it behind a dot, matches."""
    patterns: Mapping[str, Any] = config.get(name) or {}
    try:
        key = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", layer)), None)
    except re.error as error:
        raise ValueError(f"{caller}: {name} of {CONFIG} must hold patterns, got {error.pattern!r}: {error}") from error
    return default if key is None else patterns[key]


def _saved_modules(caller: str, rest: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules of modules_to_save whose state is ``rest``."""
    ends = tuple(config.get("modules_to_save") or ())
    roots: list[str] = []
    for name in sorted(rest):
        if under(name, roots):
            continue
        parts = name.split(".")[:-1]
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        # PEFT goes by the end of names, whatever stands before it.
        root = next((path for path in paths if path.endswith(ends)), None) if ends else None
        if root is None:
            raise ValueError(
                f"{caller}: {name!r} of PEFT's file must be LoRA or in modules_to_save, {list(ends)}, got neither"
            )
        roots.append(root)
    return tuple(roots)
