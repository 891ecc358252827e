"""What a model's adapters are doing: a checklist before training, and numbers read from a model."""

from pyfused.diagnostics.checklist import CheckReport, CheckRow, check
from pyfused.diagnostics.ratio import GradientRatio, GradientRatioTable, gradient_ratio
from pyfused.diagnostics.scales import LayerScaleReport, LayerScaleRow, layer_scale_report

__all__ = [
    "CheckReport",
    "CheckRow",
    "GradientRatio",
    "GradientRatioTable",
    "LayerScaleReport",
    "LayerScaleRow",
    "check",
    "gradient_ratio",
    "layer_scale_report",
]
