"""Layers that read one x, as q, k and v do, or gate and up: one call of ``lora_linear`` for all of them.

Their weights lie one below the other, A too, and B is block-diagonal:

    [y_q y_k y_v] = x [W_q; W_k; W_v]^T + s (x [A_q; A_k; A_v]^T) diag(B_q, B_k, B_v)^T

No source is rewritten: the layer that runs first computes for all, and each of the others takes its part when it is
called with the same x.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfused.ops import decision
from pyfused.ops.lora_linear import MAX_RANK, lora_linear
from pyfused.surgery import watch
from pyfused.surgery.paths import Place
from pyfused.surgery.report import folded

if TYPE_CHECKING:
    from pyfused.lora.linear import LoRALinear


@dataclass
class _Held:
    """What the call for all left for the others: for which x, in which state of torch, and the parts by layer."""

    x: Tensor
    moment: tuple[object, ...]
    parts: dict[int, tuple[tuple[object, ...], Tensor]]


class SharedInput:
    """LoRALinears of one parent that read one x, in the order in which they run.

    Each call decides anew; where it is not one for all, each layer computes for itself, as without this. Copies and
    pickles have weights of their own, which their first call puts below each other.

    Attributes:
        names: of the layers in their parent.
        layers: the layers.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[LoRALinear]) -> None:
        self.names, self.layers = tuple(names), tuple(layers)
        self._packed: Tensor | None = None
        self._held: _Held | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "layers": self.layers, "_packed": None, "_held": None}

    def loosen(self) -> None:
        """Weights have moved: put them below each other again in the next call."""
        self._packed = self._held = None

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        """What ``layer`` returns for ``x``; None where it has to compute that itself."""
        if torch.compiler.is_compiling():
            # No graph can be guarded by where weights lie in memory.
            return None
        if layer is not self.layers[0]:
            return self._part(layer, x)
        self._held = None
        why = self.alone()
        if decision.observers:
            decision.notify(decision.OneCall(self.names, why))
        return None if why is not None else self._all(x)

    def alone(self) -> str | None:
        """Why each layer computes for itself, as they are now."""
        first, weights = self.layers[0], [layer.weight for layer in self.layers]
        if any(layer.merged for layer in self.layers):
            return "LoRA is merged"
        if any(layer._chosen is not None for layer in self.layers):
            return "not the first adapter alone acts"
        if any(type(weight) is not nn.Parameter for weight in weights):
            return "a weight is sharded, or of another kind"
        if any(weight.requires_grad for weight in weights):
            return "a weight trains"
        if any(weight.dtype != first.weight.dtype or weight.device != first.weight.device for weight in weights):
            return "weights differ in dtype or device"
        if any(layer.lora_a.dtype != first.lora_a.dtype for layer in self.layers):
            return "LoRA parameters differ in dtype"
        if any(layer.training != first.training or layer.lora_dropout != first.lora_dropout for layer in self.layers):
            return "layers differ in mode or dropout"
        if any((layer.bias is None) != (first.bias is None) for layer in self.layers):
            return "some have a bias"
        if self._packed is None:
            self._pack(weights)
        return None if self._below_each_other(weights) else "somebody has put weights into other memory"

    @torch.no_grad()
    def _pack(self, weights: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):
            self._packed = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, self._packed.split([len(weight) for weight in weights]), strict=True):
            # The parameter stays the one that others hold.
            weight.data = part

    def _below_each_other(self, weights: Sequence[Tensor]) -> bool:
        assert self._packed is not None
        address = self._packed.data_ptr()
        for weight in weights:
            if weight.data_ptr() != address or not weight.is_contiguous():
                return False
            address += weight.numel() * weight.itemsize
        return True

    def _all(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        lora_b = torch.block_diag(
            *(
                layer.lora_b if layer.scaling == first.scaling else layer.lora_b * (layer.scaling / first.scaling)
                for layer in self.layers
            )
        )
        assert self._packed is not None
        y = lora_linear(
            x, self._packed, torch.cat([layer.lora_a for layer in self.layers]), lora_b,
            None if first.bias is None else torch.cat([layer.bias for layer in self.layers]),
            scaling=first.scaling, dropout_p=first.lora_dropout, training=first.training,
        )  # fmt: skip
        # Nobody else sees y: each part may be changed in place, as an output of its own may be.
        parts = torch.unsafe_split_with_sizes(y, [len(layer.weight) for layer in self.layers], -1)
        others = zip(self.layers[1:], parts[1:], strict=True)
        self._held = _Held(x, _moment(x), {id(layer): (_versions(layer), part) for layer, part in others})
        return parts[0]

    def _part(self, layer: LoRALinear, x: Tensor) -> Tensor | None:
        held = self._held
        if held is None or held.x is not x or held.moment != _moment(x):
            return None
        versions, part = held.parts.pop(id(layer), (None, None))
        if not held.parts:
            self._held = None
        return part if versions == _versions(layer) else None


def _moment(x: Tensor) -> tuple[object, ...]:
    kind = x.device.type
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _versions(layer: LoRALinear) -> tuple[object, ...]:
    # A merged layer has another weight.
    own = (layer.lora_a, layer.lora_b, layer.weight, layer.bias)
    return (
        layer.training,
        layer._chosen,
        *((id(tensor), tensor._version) for tensor in own if tensor is not None),
    )


# ---- finding


def share_inputs(
    model: nn.Module, layers: Sequence[tuple[Place, LoRALinear]], args: tuple, kwargs: Mapping[str, Any]
) -> list[str]:
    """Let those of ``layers`` that one parent runs on one x, in one call of ``model``, share it; says which do."""
    read: dict[int, list[Tensor]] = {}

    def reads(layer: nn.Module, given: tuple) -> None:
        read.setdefault(id(layer), []).extend(given[:1])

    handles = [layer.register_forward_pre_hook(reads) for _, layer in layers]
    try:
        with torch.no_grad():
            watch.undisturbed(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    # The order in which they ran; of a layer that stands in several places, its first.
    ran = {id(layer): (place, layer) for place, layer in layers}
    alike: dict[tuple, list[tuple[str, LoRALinear]]] = {}
    for key, given in read.items():
        place, layer = ran[key]
        parent = place.spots[0][0]
        alike.setdefault((id(parent), *map(id, given)), []).append((place.paths[0], layer))
    notes: Counter[str] = Counter()
    for group in alike.values():
        if len(group) < 2:
            continue
        paths = [path for path, _ in group]
        names, parent_path = [path.rpartition(".")[2] for path in paths], paths[0].rpartition(".")[0]
        ranks = sum(layer.rank for _, layer in group)
        shared = SharedInput(names, [layer for _, layer in group])
        why = f"their ranks are {ranks} together, and {MAX_RANK} is the most" if ranks > MAX_RANK else shared.alone()
        what = f"{folded(parent_path) or 'the model'}: {', '.join(names)} read one x"
        notes[f"{what}: one call for all" if why is None else f"{what}, but each has a call of its own: {why}"] += 1
        if why is None:
            for _, layer in group:
                layer._shared_input = shared
    return [f"{note} ({times} times)" if times > 1 else note for note, times in notes.items()] or [
        "group: no two adapted linear layers of one module read one x"
    ]
