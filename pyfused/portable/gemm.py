"""Matrix products by the faster of the two libraries inside torch.

For float32 torch calls MKL, which leaves AVX-512 unused on CPUs that are not Intel's; oneDNN, which torch also carries,
uses it. Figures in NOTES.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _find_onednn() -> torch._ops.OpOverload | None:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    # torch.compile's own name for oneDNN's linear layer; not every build has it.
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


_onednn = _find_onednn()


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
    if (column == 1 and row >= columns) or (row == 1 and column >= rows):
        return matrix
    return torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (M, K), (N, K), (N,) of any strides -> (M, N)."""
    if _takes_onednn(x):
        return _onednn(_dense(x), _dense(weight), None if bias is None else bias.contiguous(), "none", [], "")
    return F.linear(x, weight, bias)


def sum_outer(left: Tensor, right: Tensor) -> Tensor:
    """left^T right: (M, I), (M, J) -> (I, J)."""
    if not _takes_onednn(left):
        return left.t().mm(right)
    if left.shape[1] <= right.shape[1]:
        return matmul(left.t(), right.t())
    # oneDNN is several times faster with the narrow matrix on the left.
    return matmul(right.t(), left.t()).t().contiguous()
