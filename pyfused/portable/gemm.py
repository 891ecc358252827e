"""Matrix products by the faster of the two libraries inside torch.

For float32 torch calls MKL, which leaves AVX-512 unused on CPUs that are not Intel's; there oneDNN, which torch also
carries, is faster, and on Intel's slower. Figures in NOTES.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _cpu_vendor() -> str:
    """As Linux names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _find_onednn() -> torch._ops.OpOverload | None:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if torch.backends.mkl.is_available() and _cpu_vendor() == "GenuineIntel":
        return None
    # torch.compile's own name for oneDNN's linear layer; not every build has it.
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_onednn = _find_onednn()
# Rows handled at a time where a float32 copy of a 16-bit activation is needed.
_ROWS = 1024


def _takes_onednn(x: Tensor) -> bool:
    return (
        _onednn is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
    )


def _dense(matrix: Tensor) -> Tensor:
    """``matrix`` with rows or columns dense in memory: oneDNN refuses other strides, and reads a bias without them."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    if (column == 1 and row >= columns) or (row == 1 and column == rows):
        return matrix
    return torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (M, K), (N, K), (N,) of any strides -> (M, N)."""
    if _takes_onednn(x):
        return _onednn(_dense(x), _dense(weight), None if bias is None else bias.contiguous(), "none", [], "")
    return F.linear(x, weight, bias)


def add_product_(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y += x W^T, in place: (M, N), (M, K), (N, K)."""
    if _takes_onednn(x):
        y.add_(matmul(x, weight))
    else:
        y.addmm_(x, weight.t())


def sum_outer(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left^T right: (M, I), (M, J) -> (I, J); added to ``total`` where that is given."""
    if not _takes_onednn(left):
        return left.t().mm(right) if total is None else total.addmm_(left.t(), right)
    # oneDNN is several times faster with the narrow matrix on the left.
    wide = left.shape[1] > right.shape[1]
    outer = matmul(right.t(), left.t()).t() if wide else matmul(left.t(), right.t())
    return outer.contiguous() if total is None else total.add_(outer)


def product(x: Tensor, weight: Tensor, channels_first: bool, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (B, L, K), (N, K) -> (B, L, N), which lies in memory as (B, N, L) when ``channels_first``."""
    if not channels_first:
        y = matmul(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:2], weight.shape[0])
    if _takes_onednn(x):
        y = x.new_empty((x.shape[0], weight.shape[0], x.shape[1]))
        for image, out in zip(x, y, strict=True):
            out.copy_(matmul(weight, image)) if bias is None else torch.add(
                matmul(weight, image), bias[:, None], out=out
            )
        return y.transpose(1, 2)
    batched = weight.expand(x.shape[0], *weight.shape)
    if bias is None:
        return torch.bmm(batched, x.transpose(1, 2)).transpose(1, 2)
    return torch.baddbmm(bias[:, None], batched, x.transpose(1, 2)).transpose(1, 2)


def sum_over_rows(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over rows of left^T right: (B, L, I), (B, L, J) -> (I, J), accumulated and returned in ``dtype``."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if left.dtype == dtype:
        return sum_outer(left, right)
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32).to(dtype)
    total = left.new_zeros((left.shape[1], right.shape[1]), dtype=dtype)
    for a, b in zip(left.split(_ROWS), right.split(_ROWS), strict=True):
        total.addmm_(a.to(dtype).t(), b.to(dtype))
    return total
