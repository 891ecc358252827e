"""Matrix products by the faster of the two libraries inside torch.

For float32 torch calls MKL, which leaves AVX-512 unused on CPUs that are not Intel's; there oneDNN, which torch also
carries, is faster, and on Intel's slower. Figures in docs/measured.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
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
# Multiplications of a product below which oneDNN's preparations take longer than what it gains.
_SMALL = 1 << 23
# Rows handled at a time where a float32 copy of a 16-bit activation is needed.
_ROWS = 1024
# Up to this K a product added to y is no slower than oneDNN's, which needs one more pass over y.
_NARROW = 192
# Images of fewer rows than this, by channels, have their rows gathered: products of so few are slow.
SHORT = 32
# Up to so many rows a transposition of their sum costs more than what it gains.
_FEW = 64


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in a dtype: to ask whether it has that takes a third of what `Tensor.to` takes to find out."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _takes_onednn(x: Tensor, columns: int, images: int = 1) -> bool:
    """Whether oneDNN makes the products of x, or of each of its images, with a matrix of so many columns."""
    return (
        _onednn is not None
        and x.dtype == torch.float32
        and x.numel() * columns >= images * _SMALL
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )


def _dense(matrix: Tensor) -> Tensor:
    """``matrix`` with rows or columns dense in memory: oneDNN refuses other strides, and reads a bias without them."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    if (column == 1 and row >= columns) or (row == 1 and column == rows):
        return matrix
    return torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (M, K), (N, K), (N,) of any strides -> (M, N)."""
    return _onednn(_dense(x), _dense(weight), None if bias is None else bias.contiguous(), "none", [], "")


def _runs_by_channels(x: Tensor) -> bool:
    """Whether the memory of x (B, L, C) runs (B, C, L)."""
    return x.stride(2) != 1 and x.stride(1) == 1


def small_images(x: Tensor, channels_first: bool, rows: int) -> bool:
    """Whether x (B, L, C) holds images by channels of fewer than ``rows`` each, whose products are slow on a CPU."""
    return channels_first and x.shape[0] > 1 and x.shape[1] < rows and x.device.type == "cpu"


def beside(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Memory for as many images and rows as x (B, L, C) has, that runs (channels, B, L): one image to a product."""
    return x.new_empty((channels, *x.shape[:2]), dtype=dtype).permute(1, 2, 0)


def _lies_beside(x: Tensor) -> bool:
    """Whether the memory of x (B, L, C) runs (C, B, L), densely, of several images."""
    batch, length, _ = x.shape
    return batch > 1 and x.stride() == (length, 1, batch * length)


def one_image(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Those (B, L, C) as (1, B L, C), views, if all of them lie side by side; else as they are."""
    if all(map(_lies_beside, tensors)):
        return tuple([x.flatten(0, 1)[None] for x in tensors])
    return tensors


def _images(weight: Tensor, x: Tensor) -> Tensor:
    return weight.expand(x.shape[0], *weight.shape)


def product(
    x: Tensor,
    weight: Tensor,
    channels_first: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """alpha x W^T + b: (..., K), (N, K) -> (..., N); of x (B, L, K) it lies in memory as (B, N, L) when
    ``channels_first``, or as (N, B, L) where x lies as (K, B, L).

    Rounded once, alpha and bias included: 16 bits may hold the result and not the product. ``out``, where given, lies
    so and receives it; ``alpha`` is for products without a bias.
    """
    if out is None and not channels_first and alpha == 1.0:
        # Of two dimensions: torch rounds a product of three before it adds the bias.
        rows = x.reshape(-1, x.shape[-1])
        linear = _by_onednn if _takes_onednn(x, weight.shape[0]) else torch.nn.functional.linear
        y = linear(rows, weight, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
    if out is None and channels_first and _lies_beside(x):
        out = beside(x, weight.shape[0], x.dtype)
    elif out is None and channels_first:
        out = x.new_empty((x.shape[0], weight.shape[0], x.shape[1])).transpose(1, 2)
    elif out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    made = out
    if channels_first:
        x, out = one_image(x, out)
    if not channels_first:
        rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
        if _takes_onednn(x, weight.shape[0]):
            torch.mul(_by_onednn(rows, weight, bias), alpha, out=flat)
        elif bias is None:
            torch.addmm(flat, rows, weight.t(), beta=0, alpha=alpha, out=flat)
        else:
            torch.addmm(bias, rows, weight.t(), out=flat)
    elif _takes_onednn(x, weight.shape[0], x.shape[0]):
        for image, part in zip(x, out.transpose(1, 2), strict=True):
            torch.mul(_by_onednn(weight, image), alpha, out=part)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        images = out.transpose(1, 2)
        torch.baddbmm(images, _images(weight, x), x.transpose(1, 2), beta=0, alpha=alpha, out=images)
    else:
        torch.baddbmm(bias[:, None], _images(weight, x), x.transpose(1, 2), out=out.transpose(1, 2))
    return made


def add_product_(y: Tensor, x: Tensor, weight: Tensor, alpha: float = 1.0) -> None:
    """y += alpha x W^T, in place: (..., N), (..., K), (N, K), of two or three dimensions."""
    if weight.shape[1] > _NARROW and _takes_onednn(x, weight.shape[0]):
        y.add_(product(x, weight, y.dim() == 3 and _runs_by_channels(y)), alpha=alpha)
    elif y.dim() == 2:
        y.addmm_(x, weight.t(), alpha=alpha)
    elif _runs_by_channels(y):
        y, x = one_image(y, x)
        y.transpose(1, 2).baddbmm_(_images(weight, x), x.transpose(1, 2), alpha=alpha)
    else:
        y.view(-1, y.shape[2]).addmm_(x.reshape(-1, x.shape[2]), weight.t(), alpha=alpha)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """left right: (B, M, K), (B or 1, K, N) -> (B, M, N)."""
    if not _takes_onednn(left, right.shape[2], left.shape[0]):
        return torch.bmm(left, right.expand(left.shape[0], *right.shape[1:]))
    y = left.new_empty((*left.shape[:2], right.shape[2]))
    for x, matrix, part in zip(left, right.expand(left.shape[0], *right.shape[1:]), y, strict=True):
        part.copy_(_by_onednn(x, matrix.t()))
    return y


def baddbmm(y: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out <- y + left right: (B, M, N), (B, M, K), (B or 1, K, N); ``out`` has the factors' dtype."""
    right = right.expand(left.shape[0], *right.shape[1:])
    if left.shape[2] > _NARROW and _takes_onednn(left, right.shape[2], left.shape[0]):
        for base, x, matrix, part in zip(y, left, right, out, strict=True):
            torch.add(base, _by_onednn(x, matrix.t()), out=part)
    else:
        torch.baddbmm(y, left, right, out=out)


def narrow_first(rows: int, i: int, j: int) -> bool:
    """Whether the sum over rows of a^T b, (rows, i) and (rows, j), is faster as b^T a, transposition included.

    Either library is two to several times faster with a narrow matrix on the left, but for few rows.
    """
    return i > 2 * j and rows > _FEW


def _outer(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha a^T b, rounded once: (M, I), (M, J) -> (I, J)."""
    if narrow_first(a.shape[0], a.shape[1], b.shape[1]):
        return _outer(b, a, alpha).t().contiguous()
    if _takes_onednn(a, b.shape[1]):
        product = _by_onednn(a.t(), b.t())
        return product if alpha == 1.0 else product.mul_(alpha)
    if alpha == 1.0:
        return torch.mm(a.t(), b)
    return torch.addmm(a.new_empty((a.shape[1], b.shape[1])), a.t(), b, beta=0, alpha=alpha)


def _together(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Images whose rows are to be summed over as one image, unless those run by channels, are long and lie apart."""
    if left.shape[0] > 1 and (_runs_by_channels(left) or _runs_by_channels(right)):
        left, right = one_image(left, right)
        if left.shape[1] >= SHORT:
            return left, right
    if left.shape[0] == 1:
        return left, right
    return left.reshape(1, -1, left.shape[2]), right.reshape(1, -1, right.shape[2])


def _by_image(left: Tensor, right: Tensor) -> bool:
    """Whether each image's sum over rows is less to write than its rows are to read, and they come in one call."""
    (batch, length, i), j = left.shape, right.shape[2]
    return batch > 1 and i * j <= length * (i + j) and not _takes_onednn(left, j, batch)


def add_outer_(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """total += alpha times the sum over rows of left^T right, in place: (I, J), (B, L, I), (B, L, J)."""
    left, right = _together(left, right)
    if _by_image(left, right):
        total.add_(torch.bmm(left.mT, right).sum(0), alpha=alpha)
        return
    for a, b in zip(left, right, strict=True):
        if _takes_onednn(a, b.shape[1]):
            total.add_(_outer(a, b), alpha=alpha)
        else:
            total.addmm_(a.t(), b, alpha=alpha)


def sum_over_rows(left: Tensor, right: Tensor, dtype: torch.dtype, alpha: float = 1.0) -> Tensor:
    """alpha times the sum over rows of left^T right: (..., I), (..., J) -> (I, J), of two or three dimensions.

    Accumulated and returned in ``dtype``, to which 16 bits are rounded once, alpha included.
    """
    if left.dtype == dtype:
        if left.dim() == 2:
            return _outer(left, right, alpha)
        left, right = _together(left, right)
        if left.shape[0] == 1:
            return _outer(left[0], right[0], alpha)
        if dtype.itemsize >= 4 and _by_image(left, right):
            total = torch.bmm(left.mT, right).sum(0)
            return total if alpha == 1.0 else total.mul_(alpha)
        if dtype.itemsize >= 4:
            total = _outer(left[0], right[0], alpha)
            add_outer_(total, left[1:], right[1:], alpha)
            return total
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        return _outer(left, right, alpha)
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32).mul_(alpha).to(dtype)
    total = left.new_zeros((left.shape[1], right.shape[1]), dtype=dtype)
    for a, b in zip(left.split(_ROWS), right.split(_ROWS), strict=True):
        total.addmm_(a.to(dtype).t(), b.to(dtype), alpha=alpha)
    return total
