"""layer_scale_report: what it finds, that its norms are torch's, its table and its plot."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from models_setup import fastvit, fastvit_block
from torch import nn

from pyfused.diagnostics import LayerScaleReport, layer_scale_report
from pyfused.modules import BottleneckAdapter


def norm(parameters) -> float:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double().norm().item()


class TestFastViT:
    def adapted(self, **settings) -> nn.Module:
        from pyfused.models import add_adapters

        model = fastvit("fastvit_t8", layer_scale_init_value=1e-2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gamma"):
                    parameter.uniform_(-1e-2, 1e-2)
        add_adapters(model, **settings)
        return model

    def test_before_a_backward(self):
        model = self.adapted()
        rows = layer_scale_report(model).rows
        # One gamma in each of the 10 blocks, and one in each RepMixer.
        assert len(rows) == 20
        assert [row.path for row in rows if row.adapted] == [
            f"stages.{i}.blocks.{j}.layer_scale" for i, depth in enumerate((2, 2, 4, 2)) for j in range(depth)
        ]
        for row in rows:
            gamma = model.get_submodule(row.path).gamma
            assert row.channels == gamma.numel()
            assert row.gamma_mean == pytest.approx(gamma.abs().mean().item(), rel=1e-5)
            assert row.gamma_max == pytest.approx(gamma.abs().max().item(), rel=1e-6)
            assert row.block == ("RepMixerBlockAdapter" if row.adapted else "RepMixer")
            assert row.gamma_grad is row.adapter_grad is row.backbone_grad is None

    def test_after_a_backward(self):
        model = self.adapted(freeze=False)
        model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
        for row in layer_scale_report(model).rows:
            block = model.get_submodule(row.path.rpartition(".")[0])
            gamma = model.get_submodule(row.path).gamma
            assert row.gamma_grad == pytest.approx(gamma.grad.norm().item(), rel=1e-5)
            backbone = [p for name, p in block.named_parameters() if not name.startswith("adapter")]
            assert row.backbone_grad == pytest.approx(norm(backbone), rel=1e-5)
            if row.adapted:
                assert row.adapter_grad == pytest.approx(norm(block.adapter.parameters()), rel=1e-5)
            else:
                assert row.adapter_grad is None

    def test_a_frozen_backbone_has_no_gradient(self):
        model = self.adapted()
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        rows = [row for row in layer_scale_report(model).rows if row.adapted]
        assert all(row.adapter_grad > 0 for row in rows)
        assert all(row.gamma_grad is None and row.backbone_grad is None for row in rows)

    def test_both_adapters_of_an_attention_block(self):
        from pyfused.models import AttentionBlockAdapter

        block = AttentionBlockAdapter.from_block(fastvit_block("AttentionBlock"))
        block(torch.randn(2, 32, 5, 5)).square().sum().backward()
        rows = layer_scale_report(block).rows
        assert [row.path for row in rows] == ["layer_scale_1", "layer_scale_2"]
        for row, adapter in zip(rows, (block.adapter_1, block.adapter_2), strict=True):
            assert row.adapter_grad == pytest.approx(norm(adapter.parameters()), rel=1e-5)

    def test_plain_models_and_blocks_without_layer_scale(self):
        from pyfused.models import RepMixerBlockAdapter

        rows = layer_scale_report(fastvit("fastvit_t8")).rows
        assert len(rows) == 20
        assert not any(row.adapted for row in rows)
        block = fastvit_block("RepMixerBlock", layer_scale_init_value=None)
        with pytest.raises(ValueError, match="must contain a layer-scale or an adapter, got a RepMixerBlock with none"):
            layer_scale_report(block)
        (row,) = layer_scale_report(RepMixerBlockAdapter.from_block(block)).rows
        assert (row.path, row.channels, row.gamma_mean, row.adapted) == ("adapter", 32, None, True)

    def test_table_and_plot(self, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        model = self.adapted(train_layer_scale=True)
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        report = layer_scale_report(model)
        lines = str(report).splitlines()
        assert len(lines) == 22
        assert len({len(line) for line in lines}) == 1
        assert sum("no adapter" in line for line in lines) == 10
        (line,) = (line for line in lines if line.startswith("stages.2.blocks.3.layer_scale "))
        row = next(row for row in report.rows if row.path == "stages.2.blocks.3.layer_scale")
        values = (row.gamma_mean, row.gamma_max, row.gamma_grad, row.adapter_grad, row.backbone_grad)
        assert line.split()[2:] == ["64", *(f"{value:.2e}" for value in values)]
        figure = report.plot(tmp_path / "scales.png")
        assert (tmp_path / "scales.png").stat().st_size > 5000
        above, below = figure.axes
        assert [text.get_text() for text in above.get_legend().get_texts()] == ["mean |gamma|", "max |gamma|"]
        drawn = {line.get_label(): line for line in below.lines}
        assert drawn.keys() == {"gamma", "adapter", "backbone"}
        adapters = [(place, row.adapter_grad) for place, row in enumerate(report.rows) if row.adapted]
        assert [*zip(*drawn["adapter"].get_data(), strict=True)] == adapters
        assert below.get_yscale() == "log"


def test_other_layer_scales_and_adapters_of_their_own():
    model = nn.Module()
    model.block = pytest.importorskip("timm.models.vision_transformer").Block(16, 2, init_values=1e-4)
    model.adapter = BottleneckAdapter(8, layer_scale=-0.5)
    model.plain = BottleneckAdapter(8)
    rows = {row.path: row for row in layer_scale_report(model).rows}
    assert rows.keys() == {"block.ls1", "block.ls2", "adapter", "plain"}
    assert rows["block.ls1"].gamma_max == pytest.approx(1e-4)
    assert (rows["adapter"].gamma_mean, rows["adapter"].adapted) == (0.5, True)
    assert rows["plain"].gamma_mean is None


def test_zero_gradients_are_numbers_and_left_out_of_the_plot():
    adapter = BottleneckAdapter(8, layer_scale=0.0)
    adapter(torch.randn(3, 8)).sum().backward()
    report = layer_scale_report(adapter)
    (row,) = report.rows
    assert row.gamma_max == 0.0
    assert row.adapter_grad == pytest.approx(norm([adapter.gamma]))
    assert math.isfinite(row.adapter_grad)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert not report.plot().axes[0].lines


def test_refusals(monkeypatch):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        layer_scale_report({})
    with pytest.raises(ValueError, match="got a Linear with none"):
        layer_scale_report(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot needs matplotlib"):
        LayerScaleReport(()).plot()
