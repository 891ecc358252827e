"""timm's FastViT with adapters in every block."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyfused import models
from pyfused.bench import thirdparty
from pyfused.bench.models.training import Classifier
from pyfused.modules import BottleneckAdapter

# timm starts at 1e-5, where 16 bits of float32 would separate the adapters from what they are added to.
_LAYER_SCALE = 0.1
# 2 x 4,192 + 2 x 16,576 + 6 x 65,920 + 4 x 262,912 for C = 64, 128, 256, 512.
SA12_ADAPTER_PARAMETERS = 1_488_704
COMPILE_REFUSAL = "on a CPU inductor compiles its kernels for minutes (225 s seen on 2 cores)"


@torch.no_grad()
def classifier(name: str, classes: int, images: Tensor) -> Classifier:
    """timm's model of that name without adapters yet, float32 on the CPU, the same on every call.

    Weights are random, layer-scales 0.1; the BatchNorms hold the statistics of ``images``, (B, 3, H, W), without which
    the random features would hardly tell one image from another.

    Raises:
        thirdparty.Unavailable: timm is missing.
    """
    timm = thirdparty.load("timm")
    torch.manual_seed(0)
    visual = timm.create_model(name, num_classes=0, layer_scale_init_value=_LAYER_SCALE)
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    visual.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return Classifier(visual, visual.num_features, classes)


def with_adapters(model: Classifier, zero_up: bool = False) -> Classifier:
    """A copy of ``model`` with adapters in the model's dtype by `pyfused.models.add_adapters`, the backbone frozen.

    Args:
        model: as `fastvit` makes it, on any device, in any dtype.
        zero_up: U is zero, as in use; False (the default) draws it, so that no gradient is zero.
    """
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    models.add_adapters(model.visual, adapter_dtype=model.head.weight.dtype)
    if not zero_up:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, BottleneckAdapter):
                    module.up_weight.normal_(std=module.hidden**-0.5)
    return model
