"""AA-CLIP's second stage on open_clip's CLIP: the image tower with the prompts' tokens as its context."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyfused.bench import thirdparty
from pyfused.bench.measure import parity
from pyfused.bench.models import training
from pyfused.bench.models.training import reference_operators
from pyfused.models import AdaptedCLIP

_PROMPTS = 16


class SecondStage(nn.Module):
    """Images (B, 3, H, W) -> the mean of all projected patches, (B, text width).

    Args:
        model: its stage 1 and its projection for whole images, which take no part, are frozen.
        context: (1, T, text width), of the same kind for all images.
    """

    context: Tensor

    def __init__(self, model: AdaptedCLIP, context: Tensor) -> None:
        super().__init__()
        self.model = model
        model.set_stage(2)
        # Softmax does not see k_bias, whose gradient is zero but for rounding.
        k_bias = model.image_cross_attention.k_bias
        assert k_bias is not None
        for part in (model.detection_projection, k_bias):
            part.requires_grad_(False)
        self.register_buffer("context", context)

    def forward(self, images: Tensor) -> Tensor:
        levels = self.model.encode_image(images, self.context).levels
        return torch.stack(levels).mean((0, 2))


@torch.no_grad()
def second_stage(name: str, image_size: int, classes: int) -> training.Classifier:
    """open_clip's model of that name with AA-CLIP's modules, no dropout, and 16 random prompts as the images' context;
    random weights, float32 on the CPU, the same on every call.

    Raises:
        thirdparty.Unavailable: open_clip is missing.
    """
    open_clip = thirdparty.load("open_clip")
    torch.manual_seed(0)
    clip = open_clip.create_model(name, pretrained=None, force_image_size=image_size)
    model = AdaptedCLIP(clip, dropout=0.0)
    context = model.text_context(torch.randint(clip.vocab_size, (_PROMPTS, clip.context_length)))
    return training.Classifier(SecondStage(model, context), context.shape[-1], classes)


def deviations(model: training.Classifier, images: Tensor, labels: Tensor) -> list[parity.Deviation]:
    """Logits and every gradient of one step against the reference in float64.

    In the model's dtype, but float64 for a model of float32: there the few values on which rounding decides on which
    side of a LeakyReLU they fall would part the gradients of two right ways to compute them.
    """
    exact_model = copy.deepcopy(model).double()
    if images.dtype == torch.float32:
        model, images = exact_model, images.double()
    ours = training._logits_and_gradients(model, images, labels)
    with reference_operators():
        plain = training._logits_and_gradients(model, images, labels)
        exact = training._logits_and_gradients(exact_model, images.double(), labels)
    return parity.deviations(ours, plain, exact, images.dtype)
