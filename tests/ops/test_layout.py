"""How operators see tensors: as (B, L, C) by strides, without a copy wherever strides allow it."""

from __future__ import annotations

import pytest
import torch
from operator_cases import IMAGES, LAYOUTS
from oracle import randn

from pyfused.ops.contract.layout import as_channels, as_rows, rows_like


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _channels_last(*shape: int) -> torch.Tensor:
    return randn(*shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"image {name}" for name in IMAGES)])
def test_rows_hold_what_the_tensor_holds_in_order(layout):
    channel_dim = 1 if layout.startswith("image ") else -1
    x = IMAGES[layout.removeprefix("image ")]() if channel_dim == 1 else LAYOUTS[layout]()
    (rows,), (channels_first,) = as_rows(channel_dim, x)
    by_row = x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
    assert torch.equal(rows.flatten(0, 1), by_row), "row m is b * L + l"
    back = as_channels(rows, x, channels_first) if channel_dim == 1 else rows.view(x.shape)
    assert torch.equal(back, x)
    assert back.shape == x.shape


# Shape of the rows of each layout, and whether memory runs (B, C, L); what cannot be viewed is left out.
VIEWS = {
    "3-D": (randn(2, 5, 20), -1, (1, 10, 20), False),
    "1-D": (randn(20), -1, (1, 1, 20), False),
    "transposed matrix": (randn(20, 9).t(), -1, (1, 9, 20), False),
    "[L, B, D] permuted to [B, L, D]": (randn(5, 3, 20).transpose(0, 1), -1, (3, 5, 20), False),
    "expanded batch": (randn(1, 9, 20).expand(3, 9, 20), -1, (3, 9, 20), False),
    "NCHW": (randn(2, 20, 5, 7), 1, (2, 35, 20), True),
    "NCL": (randn(2, 20, 9), 1, (2, 9, 20), True),
    "NCDHW": (randn(2, 20, 2, 3, 2), 1, (2, 12, 20), True),
    "channels_last": (_channels_last(2, 20, 5, 7), 1, (1, 70, 20), False),
    "channels_last by rows": (_channels_last(2, 20, 5, 7).movedim(1, -1), -1, (1, 70, 20), False),
    "one channel": (randn(2, 1, 5, 7), 1, (2, 35, 1), True),
    "one position": (randn(2, 20, 1, 1), 1, (1, 2, 20), False),
    "slice of images": (randn(4, 20, 5, 7)[::2], 1, (2, 35, 20), True),
}


@pytest.mark.parametrize("case", VIEWS)
def test_nothing_is_copied_where_strides_allow(case):
    x, channel_dim, shape, expected = VIEWS[case]
    (rows,), (channels_first,) = as_rows(channel_dim, x)
    assert _storage(rows) == _storage(x)
    assert (tuple(rows.shape), channels_first) == (shape, expected)


def test_tensors_that_go_together_get_one_shape():
    """One of them cannot be merged into one image, so none is: row m is the same everywhere."""
    merged, apart = randn(3, 5, 20), randn(5, 3, 20).transpose(0, 1)
    for pair in ((merged, apart), (apart, merged)):
        rows, channels_first = as_rows(-1, *pair)
        assert channels_first == [False, False]
        for x, view in zip(pair, rows, strict=True):
            assert view.shape == (3, 5, 20)
            assert _storage(view) == _storage(x)
            assert torch.equal(view, x)
    rows, _ = as_rows(-1, merged, merged + 1)
    assert [tuple(view.shape) for view in rows] == [(1, 15, 20)] * 2


@pytest.mark.parametrize("formats", [("NCHW", "channels_last"), ("channels_last", "NCHW")], ids=" ".join)
def test_each_of_two_images_says_how_its_memory_runs(formats):
    images = {"NCHW": randn(2, 20, 5, 7), "channels_last": _channels_last(2, 20, 5, 7)}
    rows, channels_first = as_rows(1, *(images[name] for name in formats))
    assert channels_first == [name == "NCHW" for name in formats]
    for name, view in zip(formats, rows, strict=True):
        assert view.shape == (2, 35, 20)
        assert _storage(view) == _storage(images[name])
        assert torch.equal(view, images[name].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("channels_first", [False, True])
def test_new_rows_lie_as_asked(channels_first):
    x = randn(2, 35, 20)
    y = rows_like(x, 9, channels_first)
    assert y.shape == (2, 35, 9)
    assert (y.transpose(1, 2) if channels_first else y).is_contiguous()
    assert y.dtype == x.dtype
    assert _storage(y) != _storage(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_come_back_in_their_format_with_other_channels(memory_format):
    x = randn(2, 20, 5, 7).to(memory_format=memory_format)
    (rows,), (channels_first,) = as_rows(1, x)
    y = rows_like(rows, 9, channels_first)
    y.copy_(rows[..., :9])
    image = as_channels(y, x, channels_first)
    assert image.is_contiguous(memory_format=memory_format)
    assert _storage(image) == _storage(y)
    assert torch.equal(image, x[:, :9])


def test_a_stride_of_a_single_image_does_not_count():
    odd = torch.randn(4, 1, 16).as_strided((4, 1, 16), (16, 999, 1))
    rows, _ = as_rows(-1, odd, torch.randn(4, 1, 32)[..., ::2])
    assert [tuple(tensor.shape) for tensor in rows] == [(1, 4, 16)] * 2
