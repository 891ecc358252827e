"""Training whole models: one model on pyfused's operators, on the reference's or on another's; its steps and parity."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused import reference
from pyfused.bench.cases.operators import OPERATORS
from pyfused.bench.measure import parity


class Classifier(nn.Module):
    """An image tower (B, 3, H, W) -> (B, width) and a linear head (B, width) -> (B, classes), both trained."""

    def __init__(self, visual: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.visual, self.head = visual, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.visual(images))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def replaced(operators: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, pyfused's modules call these functions, by the operators' names, instead of the operators."""
    places = [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.startswith(("pyfused.lora.", "pyfused.modules.", "pyfused.models."))
        for name in operators
        if hasattr(module, name)
    ]
    kept = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, operators[name])
    try:
        yield
    finally:
        for (module, name), operator in zip(places, kept, strict=True):
            setattr(module, name, operator)


def reference_operators() -> contextlib.AbstractContextManager[None]:
    """Inside, pyfused's modules call the plain formulas."""
    return replaced({name: getattr(reference, name) for name in OPERATORS})


class TrainingStep:
    """One AdamW step on the next batch; ``losses`` grows by one with each call.

    Args:
        model: trained in place.
        batches: (images, labels) pairs, used in turn, again and again.
        context: what each step runs inside, such as `reference_operators`.
        learning_rate: AdamW's.
        compiled: whether the model's forward and backward run under torch.compile.
    """

    def __init__(
        self,
        model: Classifier,
        batches: Sequence[tuple[Tensor, Tensor]],
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        learning_rate: float = 2e-4,
        compiled: bool = False,
    ) -> None:
        self.model, self.batches, self.context = model.train(), batches, context
        self._run = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = torch.optim.AdamW(model.trained().values(), lr=learning_rate)
        self._losses: list[Tensor] = []

    def forward(self) -> Tensor:
        images, labels = self.batches[len(self._losses) % len(self.batches)]
        with self.context():
            return F.cross_entropy(self._run(images).float(), labels)

    def __call__(self) -> None:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss.detach())

    @property
    def losses(self) -> list[float]:
        return [loss.item() for loss in self._losses]

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of ``images`` that the model in eval mode puts into the right class."""
        self.model.eval()
        with self.context():
            right = (self.model(images).argmax(dim=1) == labels).float().mean().item()
        self.model.train()
        return right


def deviations(model: Classifier, images: Tensor, labels: Tensor) -> list[parity.Deviation]:
    """Logits and every gradient of one step, against the reference in float64 and in the model's dtype."""
    exact_model = copy.deepcopy(model).double()
    ours = _logits_and_gradients(model, images, labels)
    with reference_operators():
        plain = _logits_and_gradients(model, images, labels)
        exact = _logits_and_gradients(exact_model, images.double(), labels)
    dtype = next(parameter.dtype for parameter in model.visual.parameters() if not parameter.requires_grad)
    return parity.deviations(ours, plain, exact, dtype)


def _logits_and_gradients(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    parameters = model.trained()
    logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"logits": logits.detach()} | {f"d{name}": g for name, g in zip(parameters, gradients, strict=True)}
