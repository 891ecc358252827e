"""What `AdaptedCLIP` gives back: features of images and of prompts, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from pyfused.models.aa_clip_parts import AdapterBlend, SimpleProj
from pyfused.models.report import AdapterRow
from pyfused.modules.cross_attention import ScaledCrossAttention
from pyfused.surgery.report import Counts, count, elements, table


class ImageFeatures(NamedTuple):
    """What `AdaptedCLIP.encode_image` gives.

    Attributes:
        levels: the patches of each feature level, normalised by the tower's last norm, projected, and divided by their
            norms, each (B, patches, text width).
        detection: the mean over the last level's patches of their other projection, divided by its norms,
            (B, text width).
        pooled: the tower's own image features, (B, embedding), not normalised.
    """

    levels: list[Tensor]
    detection: Tensor
    pooled: Tensor


class TextFeatures(NamedTuple):
    """What `AdaptedCLIP.encode_text` gives.

    Attributes:
        pooled: the prompts' features, (P, text width), not normalised.
        tokens: the tokens' features after the tower's last norm, (P, L, text width).
    """

    pooled: Tensor
    tokens: Tensor


class AdaptedFeatures(NamedTuple):
    """What `AdaptedCLIP.feedback` gives.

    Attributes:
        levels, detection: as in `ImageFeatures`.
        text: the prompts' features, (P, text width), not normalised.
    """

    levels: list[Tensor]
    detection: Tensor
    text: Tensor


@dataclass(frozen=True, kw_only=True)
class AdaptedCLIPReport(Counts):
    """What an `AdaptedCLIP` trains.

    Attributes:
        rows: one `AdapterRow` per module; ``hidden`` is the output width of a blend and a projection, and H d of a
            cross-attention.
        trainable_parameters, total_parameters, notes: see `Counts`.
    """

    rows: tuple[AdapterRow, ...]

    @classmethod
    def of(cls, model: nn.Module) -> AdaptedCLIPReport:
        """Of an `AdaptedCLIP`."""
        rows = []
        for path, module in model.named_modules():
            if isinstance(module, AdapterBlend):
                channels = hidden = module.channels
            elif isinstance(module, SimpleProj):
                channels, hidden = module.in_features, module.out_features
            elif isinstance(module, ScaledCrossAttention):
                hidden, channels = module.q_weight.shape
            else:
                continue
            rows.append(AdapterRow(path, type(module).__name__, channels, hidden, elements(module.parameters())))
        return cls(rows=tuple(rows), **count(model))

    def _found(self) -> list[str]:
        rows = [("module", "kind", "C", "h", "parameters")]
        rows += [(row.path, row.kind, str(row.channels), str(row.hidden), f"{row.parameters:,}") for row in self.rows]
        return table(rows, "<<>>>")
