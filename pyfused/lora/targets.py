"""What of a model can carry LoRA, by which names it is chosen, and why the rest is left alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyfused.lora import third_party
from pyfused.lora.attention import LoRAMultiheadAttention
from pyfused.lora.base import LoRAModule
from pyfused.lora.conv import LoRAConv2d
from pyfused.lora.linear import LoRALinear
from pyfused.surgery.bytecode import reads_weight
from pyfused.surgery.paths import Place, places
from pyfused.surgery.refusals import check_plain
from pyfused.surgery.report import LeftAlone, elements
from pyfused.surgery.variants import plain_class

ALL_LINEAR = "all-linear"
# Each selects layers by what they are; every other target is a name.
KEYWORDS = (ALL_LINEAR, "attention", "mlp", "conv1x1")
PARTS = ("in_proj", "out_proj")
_WRAPPERS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, nn.MultiheadAttention: LoRAMultiheadAttention}

# A block's name and class say more than a layer's name: "attn.c_proj" is attention, "mlp.c_proj" is not. The innermost
# block decides.
_BLOCKS = {
    "attention": re.compile("attn|attention|^mha$"),
    "mlp": re.compile("mlp|ffn|feed_?forward|densereludense|^ff$|^intermediate$|experts?$"),
}
# What is neither, though its class may be called so: a whole block or a head; "Output" closes transformers' MLPs.
_CLASSES = {
    "attention": re.compile("(Attention|Attn|MHSA)(?!.*(Block|Layer|Head|Merger|Model|Encoder|Decoder|Net|Stage)$)"),
    "mlp": re.compile("(Mlp|MLP|FFN|FeedForward)(?!.*(Block|Layer|Head|Mixer)|WithBN)|Intermediate$|(?<!Self)Output$"),
    "other": re.compile("Mamba(?!Out)|ShortConv"),
}
# Inside these nothing is attention or MLP: weights of channels, and tables of positions.
_ASIDE = re.compile("SE(Module|Layer)|SqueezeExcit|SplitAttn|RelPosMlp|^cpb_mlp$|position_bias_mlp$")
_LAYERS = {
    "attention": "out_proj q_proj k_proj v_proj o_proj qkv qkv_proj query key value to_q to_k to_v to_out c_attn",
    "mlp": "c_fc c_proj fc1 fc2 linear1 linear2 gate_proj up_proj down_proj wi wi_0 wi_1 wo pwconv1 pwconv2",
}
# Parameters of these names hold positions, tokens or biases.
_TABLE = re.compile("pos|embed|token|query|latent|prefix|class|table|bias|gamma|scale")
_HEADS = ("head", "classifier", "score", "qa_outputs", "fc")


def group_of(path: str, hosts: Sequence[nn.Module | None] = ()) -> str:
    """ "attention", "mlp" or "other", by the dotted path of a layer and the modules on it, the outermost first."""
    *blocks, layer = path.split(".")
    classes = ["" if host is None else plain_class(type(host))[0].__name__ for host in hosts] or [""] * len(blocks)
    if any(_ASIDE.search(name) for name in (*blocks, *classes)):
        return "other"
    for name, kind in zip(reversed(blocks), reversed(classes), strict=True):
        for group, pattern in _BLOCKS.items():
            if pattern.search(name.lower()):
                return group
        # A head of several layers is no MLP of the model.
        for group, pattern in _CLASSES.items():
            if pattern.search(kind) and not name.endswith("_head"):
                return group
    for group, members in _LAYERS.items():
        if layer in members.split():
            return group
    # BERT's second MLP layer; its attention has an "output" of its own.
    if blocks[-1:] == ["output"]:
        return "mlp"
    return next((group for group, pattern in _BLOCKS.items() if pattern.search(layer.lower())), "other")


def hosts_of(model: nn.Module, path: str) -> list[nn.Module | None]:
    """The modules on the way from ``model`` to ``path``, without both; None for a part of a name with a dot in it."""
    hosts: list[nn.Module | None] = []
    host, name = model, ""
    for component in path.split(".")[:-1]:
        name = f"{name}.{component}" if name else component
        child = host._modules.get(name)
        hosts.append(child)
        if child is not None:
            host, name = child, ""
    return hosts


def wrapper_of(module: nn.Module) -> Any:
    """The LoRA class that could stand in for ``module``; None where there is none."""
    if isinstance(module, LoRAModule):
        return next(kind for kind in type(module).__mro__ if "base_class" in vars(kind))
    known = next((wrapper for kind, wrapper in _WRAPPERS.items() if isinstance(module, kind)), None)
    return known or third_party.wrapper(module)


def has_parts(module: nn.Module) -> bool:
    """Whether ``module`` is an attention, whose projections are adapted as parts of it."""
    return isinstance(module, nn.MultiheadAttention) or third_party.is_packed_attention(module)


def lora_places(model: nn.Module) -> list[Place]:
    """Every module of ``model`` once; attentions and LoRA modules, which are replaced whole, without what is inside."""
    return places(model, lambda module: isinstance(module, LoRAModule) or has_parts(module))


@dataclass
class Layer:
    """A layer that LoRA has a form for.

    Attributes:
        place: where it stands.
        kind: "linear", "conv1d", "conv1x1", "conv2d" or "attention".
        group: "attention", "mlp" or "other".
        refusal: why it cannot carry LoRA, as an error; None where it can.
        reserved: why a keyword leaves it alone though it can carry LoRA; None where none does.
    """

    place: Place
    kind: str
    group: str
    refusal: Exception | None = None
    reserved: str | None = None

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.place.module

    @property
    def path(self) -> str:
        """Its first path."""
        return self.place.paths[0]

    def names(self) -> dict[str, set[str]]:
        """Each name that it answers to, and which parts, of an attention, that name selects."""
        names = {path: set(PARTS) for path in self.place.paths}
        if self.kind == "attention":
            names |= {f"{path}.{part}".lstrip("."): {part} for path in self.place.paths for part in PARTS}
        return names

    def parts(self, target: str) -> set[str]:
        """Which of its parts ``target``, a keyword or a name, selects; none where it selects another layer."""
        if target in KEYWORDS:
            return set(PARTS) if self._is(target) else set()
        named = [parts for name, parts in self.names().items() if f".{name}".endswith(f".{target}")]
        return set().union(*named)

    def weights(self, part: str) -> list[nn.Parameter | None]:
        """The weights that a low-rank term of ``part`` would stand beside."""
        if self.kind == "attention" and part == "out_proj":
            return [self.module.get_submodule("out_proj")._parameters.get("weight")]
        return [self.module._parameters.get(name) for name in wrapper_of(self.module)._weight_names(self.module)]

    def _is(self, keyword: str) -> bool:
        if keyword == "conv1x1":
            return self.kind == "conv1x1"
        if keyword == ALL_LINEAR:
            return self.kind in ("linear", "conv1d", "attention")
        return self.group == keyword and self.kind != "conv2d"


def layers_of(model: nn.Module, caller: str) -> list[Layer]:
    """Every layer of ``model`` that LoRA has a form for, whether or not it can carry it."""
    heads, embeddings = heads_of(model), _output_embeddings(model)
    layers = []
    for place in lora_places(model):
        module, wrapper = place.module, wrapper_of(place.module)
        if wrapper is None:
            continue
        layer = Layer(place, kind_of(module), group_of(place.paths[0], hosts_of(model, place.paths[0])))
        try:
            _check(f"{caller}: {layer.path}", place, wrapper)
        except (TypeError, ValueError) as error:
            layer.refusal = error
        if id(module) in embeddings:
            layer.reserved = "a language model's output embedding"
        elif id(module) in heads:
            layer.reserved = f'a classifier head; a fresh one trains whole: train=("{heads[id(module)]}",)'
        layers.append(layer)
    return layers


def kind_of(module: nn.Module) -> str:
    """What LoRA has a form for, by its name; see `Layer`."""
    if has_parts(module):
        return "attention"
    if isinstance(module, nn.Conv2d):
        return "conv1x1" if module.kernel_size == (1, 1) and module.groups == 1 else "conv2d"
    return "linear" if isinstance(module, nn.Linear) else "conv1d"


def _check(caller: str, place: Place, wrapper: Any) -> None:
    if not place.spots:
        raise ValueError(
            f"{caller.removesuffix(': ')}: model must contain the modules to adapt, got a "
            f"{type(place.module).__name__} itself; use {wrapper.__name__}.from_..."
        )
    check_plain(caller, place.module, wrapper.base_class, wrapper._weight_names(place.module))
    for host, name in place.spots:
        if third_party.calling(host, name) is None and reads_weight(host, name):
            raise TypeError(
                f"{caller}: expected a layer that is called, got one whose weight {type(host).__name__} reads itself: "
                "there a low-rank term beside the weight would not run"
            )


def _output_embeddings(model: nn.Module) -> set[int]:
    """Ids of the output embeddings of the language models in ``model``, as transformers has them."""
    found: set[int] = set()
    for module in model.modules():
        method: Any = getattr(module, "get_output_embeddings", None)
        if callable(method):
            # One that has none may say so by raising.
            with contextlib.suppress(Exception):
                found.add(id(method()))
    return found


def heads_of(model: nn.Module) -> dict[int, str]:
    """Id of each module inside a classifier head -> the head's path: timm's by its own word, else by a child's name."""
    heads: list[object] = []
    # What torch.compile returns is a module around the model.
    root = getattr(model, "_orig_mod", model)
    for module in model.modules():
        classifier: Any = getattr(module, "get_classifier", None)
        if callable(classifier):
            with contextlib.suppress(Exception):
                heads.append(classifier())
        children = list(module.named_children())
        packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
        # What a whole model of transformers or torchvision calls so, wherever it stands.
        if "torchvision" in packages or ("transformers" in packages and hasattr(module, "get_output_embeddings")):
            heads += [child for name, child in children if name in (*_HEADS, "heads")]
        elif module is root:
            # A single layer; "fc" may be any layer but the last.
            single = [(name, child) for name, child in children if isinstance(child, nn.Linear) and name in _HEADS]
            heads += [child for name, child in single if name != "fc" or child is children[-1][1]]
    flat = [part for head in heads for part in (head if isinstance(head, tuple | list) else [head])]
    wanted = {id(head) for head in flat if isinstance(head, nn.Module)}
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        if path and id(module) in wanted:
            found |= {id(inside): path for inside in module.modules() if id(inside) not in found}
    return found


def left_alone(model: nn.Module, layers: Iterable[Layer], why: dict[int, str]) -> tuple[LeftAlone, ...]:
    """What of ``model`` carries no LoRA and has a matrix in it; ``why`` is by id of a module."""
    found: dict[tuple[str, str], LeftAlone] = {}

    def add(kind: str, reason: str, path: str, tensors: Iterable[Tensor]) -> None:
        row = found.setdefault((kind, reason), LeftAlone(kind, reason))
        row.paths.append(path)
        row.parameters += elements(tensors)

    known = {id(layer.module): layer for layer in layers}
    for place in lora_places(model):
        module, path = place.module, place.paths[0]
        if isinstance(module, LoRAModule):
            continue
        kind = type(module).__name__
        layer = known.get(id(module))
        if layer is not None:
            kind = "Conv2d 1x1" if layer.kind == "conv1x1" else kind
            add(kind, why.get(id(module)) or _reason(layer), path, module.parameters())
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            add(kind, "an embedding", path, module.parameters(recurse=False))
        elif hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children()):
            tensors = [*module.parameters(), *module.buffers()]
            add(kind, "another kind of linear layer, or a quantised one", path, tensors)
        elif type(module).__module__.startswith("torch.nn.") and not isinstance(module, _NormBase):
            matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
            if matrices:
                add(kind, "LoRA has no form for it here", path, module.parameters(recurse=False))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                reason = _raw_reason(name, parameter)
                if reason is not None:
                    add("Parameter", reason, f"{path}.{name}".lstrip("."), [parameter])
    return tuple(found.values())


def _reason(layer: Layer) -> str:
    if layer.reserved is not None:
        return layer.reserved
    if layer.refusal is not None:
        return str(layer.refusal).partition(": ")[2].partition(": ")[2] or str(layer.refusal)
    if layer.kind == "conv1x1":
        return 'a 1x1 convolution: target "conv1x1" adapts it'
    return "a convolution: adapted by name alone" if layer.kind == "conv2d" else "not among target_modules"


def _raw_reason(name: str, parameter: Tensor) -> str | None:
    """Why a parameter that stands outside any layer is left alone; None where it is no matrix."""
    sizes = [size for size in parameter.shape if size > 1]
    if len(sizes) < 2:
        return None
    if _TABLE.search(name.lower()) and not name.endswith(("proj", "projection", "proj_weight")):
        return "an embedding or a table"
    return "experts stacked in one parameter" if len(sizes) > 2 else "a matrix that is in no layer"
