"""What the tests of ``adapter_residual`` share: its plans, its inputs, and its comparison with the oracle."""

from __future__ import annotations

import functools

import torch
from operator_cases import DEVICE, every_backend_of, planned, seed, serving
from oracle import Tensors, assert_as_accurate_as_torch, exact, randn
from torch import Tensor

import pyfused
from pyfused import reference
from pyfused.ops.adapter_residual import PLANS

every_backend = every_backend_of("adapter_residual")
every_plan = planned(dict.fromkeys(serving("adapter_residual"), PLANS))
FORMATS = ("rows", "NCHW", "channels_last")
# Every argument that gets a gradient.
NAMES = ("z", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "layer_scale")
# What no part of the operator rounds to z's dtype.
UNROUNDED = ("residual", "layer_scale")


def draw(
    shape: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    adapters: torch.dtype | None = None,
    residual: torch.dtype | None = None,
    layer_scale: str | None = "channels",
    channel_dim: int = -1,
    device: torch.device | str = DEVICE,
) -> dict[str, Tensor | None]:
    """Tensors for z of ``shape``, sized so that the bottleneck weighs as much as z.

    ``layer_scale`` is float32 and "channels", "scalar" or absent; ``residual`` is the dtype of a separate residual.
    """
    channels, adapters = shape[channel_dim], adapters or dtype
    drawn = {
        "z": randn(*shape, dtype=dtype, seed=1),
        "down_weight": (randn(hidden, channels, seed=2) / channels**0.5).to(adapters),
        "down_bias": randn(hidden, dtype=adapters, seed=3) if bias else None,
        "up_weight": (2 * randn(channels, hidden, seed=4) / hidden**0.5).to(adapters),
        "up_bias": randn(channels, dtype=adapters, seed=5) if bias else None,
        "residual": None if residual is None else randn(*shape, dtype=residual, seed=6),
        "layer_scale": {None: None, "scalar": torch.tensor(0.7), "channels": randn(channels, seed=7)}[layer_scale],
    }
    if dtype == torch.float64 and layer_scale is not None:
        drawn["layer_scale"] = drawn["layer_scale"].double()
    return {name: None if value is None else value.to(device) for name, value in drawn.items()}


def sample_scale(batch: int, kind: str | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Of the samples none ("kept"), the first of every two ("some") or "all" are dropped; None: no sample_scale."""
    if kind is None:
        return None
    scale = 1.0 + torch.arange(batch, dtype=torch.float64) / 4
    if kind != "kept":
        scale[:: 1 if kind == "all" else 2] = 0.0
    return scale.to(dtype).to(DEVICE)


def check(
    tensors: Tensors,
    backend: str,
    plan: str = "auto",
    *,
    skip: float = 1.0,
    activation: str = "gelu",
    sample_scale: Tensor | None = None,
    dy=None,
    **options,
) -> dict[str, Tensor]:
    """Holds the operator to the oracle. Returns its output and gradients."""

    def scales(tensors: Tensors, cotangent: Tensor) -> dict[str, Tensor]:
        # Root of the sum of the squares of the terms: the size that a result has unless its terms cancel, as the few
        # terms of a narrow tensor may, and all those of a scalar layer_scale's gradient do. No activation exceeds its
        # argument and no slope exceeds 1.13: their terms are sized as identity's.
        squares = {name: None if value is None else value.double().square() for name, value in tensors.items()}
        sums = exact(
            reference.adapter_residual, squares, torch.float64, cotangent.double() ** 2, skip=skip**2,
            activation="identity", sample_scale=None if sample_scale is None else sample_scale.double() ** 2, **options,
        )  # fmt: skip
        return {name: value.sqrt() for name, value in sums.items()}

    return assert_as_accurate_as_torch(
        functools.partial(pyfused.adapter_residual, backend=backend, plan=plan),
        reference.adapter_residual,
        tensors,
        tensors["z"].dtype,
        scales=scales,
        unrounded=UNROUNDED,
        skip=skip,
        activation=activation,
        sample_scale=sample_scale,
        **({} if dy is None else {"dy": dy}),
        **options,
    )


def image(side: int, channels: int, layout: str, batch: int = 2) -> tuple[tuple[int, ...], int]:
    """(shape, channel_dim) of ``side`` by ``side`` positions in one of `FORMATS`."""
    if layout == "rows":
        return (batch, side * side, channels), -1
    return (batch, channels, side, side), 1


def check_drawn(shape: tuple[int, ...], channel_dim: int, hidden: int, backend: str, options: dict) -> None:
    """Draws what ``options`` asks for, checks it, and that results lie in memory as z does."""
    tensors = draw(
        shape, hidden, options["dtype"], bias=options["bias"], adapters=options["adapters"],
        residual=options["residual"], layer_scale=options["layer_scale"], channel_dim=channel_dim,
    )  # fmt: skip
    if options["layout"] == "channels_last":
        for name in ("z", "residual"):
            if tensors[name] is not None:
                tensors[name] = tensors[name].to(memory_format=torch.channels_last)
    results = check(
        tensors, backend, options["plan"], skip=options["skip"], activation=options["activation"],
        sample_scale=sample_scale(shape[0], options["drop"]), dropout_p=options["p"], seed=seed(),
        channel_dim=channel_dim,
    )  # fmt: skip
    for name in ("output", "dz"):
        kept = torch.channels_last if options["layout"] == "channels_last" else torch.contiguous_format
        assert results[name].is_contiguous(memory_format=kept), f"{name} changed its layout"
