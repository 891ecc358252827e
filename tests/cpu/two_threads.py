"""Calls of the C++ kernels for CPUs on two threads, each of which has work in every step."""

from __future__ import annotations

import torch

import pyfused
from pyfused.choice import backends


def main() -> None:
    assert backends.CPU_REFUSAL is None, backends.CPU_REFUSAL
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for shape, channel_dim, hidden in (((2, 200, 96), -1, 24), ((6, 64, 7, 7), 1, 80)):
        channels = shape[channel_dim]
        z, residual = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        weights = [
            torch.randn(hidden, channels),
            torch.randn(hidden),
            torch.randn(channels, hidden),
            torch.randn(channels),
        ]
        for weight in weights:
            weight.requires_grad_()
        gamma = torch.rand(channels, requires_grad=True)
        for plan in ("save", "recompute"):
            y = pyfused.adapter_residual(
                z, *weights, residual=residual, layer_scale=gamma, sample_scale=torch.arange(shape[0]) % 3.0,
                dropout_p=0.2, seed=1, channel_dim=channel_dim, plan=plan, backend="cpu",
            )  # fmt: skip
            torch.autograd.grad(y, [z, residual, *weights, gamma], torch.ones_like(y))
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(80, 96)
    lora_a, lora_b = torch.randn(3, 8, 96, requires_grad=True), torch.randn(80, 3, 8, requires_grad=True)
    index = torch.arange(300) % 4
    y = pyfused.lora_linear(x, weight, lora_a, lora_b, adapter_index=index, dropout_p=0.2, seed=1, backend="cpu")
    torch.autograd.grad(y, [x, lora_a, lora_b], torch.ones_like(y))
    print("two threads: no report")


if __name__ == "__main__":
    main()
