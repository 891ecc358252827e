"""LatentWire, stage 1: a frozen language model reads its own embeddings, compressed and made again by an adapter.

    c = (e - mu) P                                            `PCACompressor`
    n = LN(c);  g = drop(GELU(W2 GELU(W1 n)));  o = W3 g + Wskip n
    o = o * sigmoid(Wf c) + Ws c;  out = LN(o) * scale        `LatentWireAdapter`

Source: https://github.com/SujeethJinesh/LatentWire, 2025; systems and objectives of its first stage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfused.models.pca import PCACompressor
from pyfused.ops.contract import checks
from pyfused.ops.decision import LeftToTorch, notify
from pyfused.ops.projection_residual import projection_residual
from pyfused.surgery.added import KeepsWide, draw

if TYPE_CHECKING:
    from typing_extensions import Self

OBJECTIVES = ("reconstruction", "matched", "teacher_forced")
_LEFT_TO_TORCH = (
    LeftToTorch("W1, W2 and their GELUs", why="they have no residual to add to"),
    LeftToTorch("o * sigmoid(Wf c)", why="an operator's gate is a parameter, not a tensor"),
)
# The label that `torch.nn.functional.cross_entropy` and transformers leave out.
IGNORED = -100


class LatentWireAdapter(KeepsWide):
    """Embeddings from compressed ones, by the formula at the top of this file.

    19,952,641 parameters for widths 512, 2048, 4096, float32 by default, which serve c of any dtype and stay float32
    under ``half()`` and the like: ``<layer>_weight`` (N, K) and ``<layer>_bias`` (N,) of the layers ``first`` W1,
    ``second`` W2, ``third`` W3, ``skip`` Wskip, ``gate`` Wf and ``shift`` Ws, of the norms ``norm`` and
    ``output_norm``, and ``scale``, one number. GELU by erf, norms with eps = 1e-5 and in float32 or wider.

    W3 g + Wskip n and the sum with Ws c are one `pyfused.projection_residual` each. The rest stays torch's, and
    `pyfused.explain` says so: W1 and W2 have no residual, and sigmoid(Wf c) is a gate for each element.

    Layers start as ``nn.Linear``, norms and scale at the identity. Unlike an embedding's, the rows of the output then
    have the norm sqrt(embedding): 120 times that of Llama's. `match_statistics` starts it at the embeddings'.

    Args:
        compressed: width of c. Default 512.
        hidden: width of g. Default 2048.
        embedding: width of the output. Default 4096.
        dropout: probability of zeroing an element of g, in [0, 1), in training. Default 0.1.
        device: of all parameters. Default torch's.
        dtype: of all parameters. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a width is less than 1, or ``dropout`` out of range.
    """

    def __init__(
        self,
        compressed: int = 512,
        hidden: int = 2048,
        embedding: int = 4096,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        caller = "LatentWireAdapter"
        for name, width in (("compressed", compressed), ("hidden", hidden), ("embedding", embedding)):
            checks.integer(caller, name, width, 1)
        checks.probability(caller, "dropout", dropout)
        if dtype not in checks.FLOATING:
            raise TypeError(f"{caller}: dtype must be one of {checks.FLOATING}, got {dtype!r}")
        self.compressed, self.hidden, self.embedding, self.dropout = compressed, hidden, embedding, float(dropout)
        shapes: dict[str, tuple[int, ...]] = {
            "norm": (compressed,),
            "first": (hidden, compressed),
            "second": (hidden, hidden),
            "third": (embedding, hidden),
            "skip": (embedding, compressed),
            "gate": (embedding, compressed),
            "shift": (embedding, compressed),
            "output_norm": (embedding,),
        }
        for name, shape in shapes.items():
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                self.register_parameter(f"{name}_{kind}", nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start that the class describes, drawn on the CPU in float32."""
        for name, weight in self.named_parameters():
            if name == "scale" or name.endswith("norm_weight"):
                weight.fill_(1.0)
            elif name.endswith("norm_bias"):
                weight.zero_()
            elif name.endswith("_weight"):
                bound = weight.shape[1] ** -0.5
                for parameter in (weight, self.get_parameter(name.replace("_weight", "_bias"))):
                    draw(parameter, functools.partial(nn.init.uniform_, a=-bound, b=bound))

    @torch.no_grad()
    def match_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Start the output at what it shall imitate: mean and standard deviation (embedding,) of each channel.

        They become bias and weight of the last norm, and the scale 1. From there on they are learned; nothing of a
        target's norm, which is unknown where the adapter is used, is put into the output.
        """
        for name, given in (("mean", mean), ("std", std)):
            checks.tensor("LatentWireAdapter", name, given)
            checks.shape("LatentWireAdapter", name, given, (self.embedding,), "(embedding,)")
        self.get_parameter("output_norm_bias").copy_(mean)
        self.get_parameter("output_norm_weight").copy_(std)
        self.scale.fill_(1.0)

    def forward(self, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """c (..., compressed) -> (..., embedding) in c's dtype; autocast's products are in its dtype.

        Args:
            c: float32, float16, bfloat16 or float64.
            mask: (...), bool or whole numbers: where it is 0, a pad, c counts as zeros, whatever it holds (NaN too),
                and gets gradient 0. Default None: no pads.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype or shape, or ``mask`` is on another device.
        """
        caller = "LatentWireAdapter"
        checks.tensor(caller, "c", c)
        checks.dtype(caller, "c", c, checks.FLOATING)
        checks.shape(caller, "c", c, (*c.shape[:-1], self.compressed), "(..., compressed)")
        if mask is not None:
            c = torch.where(_valid(caller, "mask", mask, c)[..., None], c, 0)
        n = self._normed("norm", c).to(c.dtype)
        for part in _LEFT_TO_TORCH:
            notify(part)
        g = F.gelu(F.linear(F.gelu(F.linear(n, *self._layer("first", c))), *self._layer("second", c)))
        g = F.dropout(g, self.dropout, self.training)
        # W3 g + Wskip n, then o * sigmoid(Wf c) + Ws c.
        skip, gate = F.linear(n, *self._layer("skip", c)), F.linear(c, *self._layer("gate", c)).sigmoid()
        o = projection_residual(g, *self._layer("third", c), residual=skip, gate=1.0)
        o = projection_residual(c, *self._layer("shift", c), residual=o * gate, gate=1.0)
        return (self._normed("output_norm", o) * self.scale).to(c.dtype)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """The layer norm ``name`` of x, in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(x, x.shape[-1:], *self._layer(name, x))

    def _layer(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in x's dtype."""
        return getattr(self, f"{name}_weight").to(x.dtype), getattr(self, f"{name}_bias").to(x.dtype)

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning, by the names of the arguments."""
        return {"dropout": self.dropout}

    def extra_repr(self) -> str:
        return f"{self.compressed}, {self.hidden}, {self.embedding}, dropout={self.dropout:g}"


class LatentWire(nn.Module):
    """Stage 1 in training: a frozen language model, its embeddings' compressor, the adapter, and an objective.

    The prompt's tokens go through compressor and adapter. What the language model reads at an answer are its own
    embeddings, as `generate` gives it those of the tokens that it has made: under its causal mask no position sees the
    token that it shall predict, so that teacher forcing gives nothing away.

    Objectives:
        - "reconstruction": `latent_wire_loss` of the prompts' embeddings; the language model does not run.
        - "matched": the same, and ``answer_weight`` times the cross-entropy of the answers after the prompts as the
          adapter makes them, so that what is trained is what generation reads.
        - "teacher_forced": that cross-entropy alone. Nothing holds the adapter to the embeddings: it learns whatever
          prompt brings the answers, and its cosine is not expected to rise.

    The language model's parameters stop requiring gradients and it stays in eval mode. Before training call
    `fit_compressor`, in all three: without it the language model reads rows 120 times too large.

    Args:
        language_model: a causal language model with transformers' ``get_input_embeddings`` and ``generate``, which
            takes ``inputs_embeds``, ``attention_mask`` and ``position_ids`` and gives ``.logits``.
        compressed: width of c. Default 512.
        hidden: width of the adapter's hidden layers. Default 2048.
        objective: "reconstruction" (the default), "matched" or "teacher_forced".
        dropout: the adapter's. Default 0.1.
        answer_weight: factor of the cross-entropy in "matched". Default 0.1: the source's 1 drowns the reconstruction,
            whose loss is the smaller by far.

    Raises:
        TypeError: ``language_model`` has no ``get_input_embeddings``, or an argument has the wrong type.
        ValueError: an argument is out of range, or the objective unknown.

    Source: the three training options of LatentWire's analysis of its first stage: reconstruction alone, training that
    matches evaluation, and teacher-forced answers. There labels cover prompts and pads; here answers alone.
    """

    def __init__(
        self,
        language_model: nn.Module,
        compressed: int = 512,
        hidden: int = 2048,
        objective: str = "reconstruction",
        dropout: float = 0.1,
        answer_weight: float = 0.1,
    ) -> None:
        super().__init__()
        embeddings = getattr(language_model, "get_input_embeddings", None)
        if not callable(embeddings):
            raise TypeError(
                "LatentWire: language_model must be a causal language model of transformers, with "
                f"get_input_embeddings, got {type(language_model).__name__}"
            )
        checks.one_of("LatentWire", "objective", objective, OBJECTIVES)
        checks.finite("LatentWire", "answer_weight", answer_weight)
        self.language_model: Any = language_model.requires_grad_(False).eval()
        weight = embeddings().weight
        self.compressor = PCACompressor(compressed)
        self.adapter = LatentWireAdapter(compressed, hidden, weight.shape[1], dropout, device=weight.device)
        self.objective, self.answer_weight = objective, float(answer_weight)

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; the language model stays in eval mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    @torch.no_grad()
    def fit_compressor(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """Fit the compressor, and start the adapter's output at their statistics, on the embeddings of ``batches``.

        Args:
            batches: input_ids (B, L) and attention_mask (B, L), 0 at pads, of each batch.
        """
        self.compressor.fit(self.embed(ids)[mask.bool()] for ids, mask in batches)
        assert self.compressor.mean_ is not None
        assert self.compressor.var_ is not None
        self.adapter.match_statistics(self.compressor.mean_, self.compressor.var_.sqrt())
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """The language model's embeddings of tokens, (B, L) -> (B, L, embedding)."""
        return self.language_model.get_input_embeddings()(input_ids)

    def reconstruct(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (..., embedding) by way of compressor and adapter; at pads, mask 0, a constant."""
        return self.adapter(self.compressor.transform(embeddings), mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The objective, a scalar in float32 or wider, of a batch as `left_padded_labels` makes it, each (B, L).

        Valid tokens (attention_mask 1) without a label (-100) are prompt.
        """
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            checks.shape("LatentWire", name, given, tuple(input_ids.shape), "as input_ids")
        prompt = attention_mask.bool() & (labels == IGNORED)
        target = self.embed(input_ids)
        made = self.reconstruct(target, prompt)
        if self.objective == "reconstruction":
            return latent_wire_loss(made, target, prompt)
        read = torch.where(prompt[..., None], made, target)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.language_model(inputs_embeds=read, attention_mask=attention_mask, position_ids=positions)
        # A label is predicted from the position before.
        logits, wanted = output.logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        answer = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        answer = answer / (wanted != IGNORED).sum().clamp(min=1)
        if self.objective == "teacher_forced":
            return answer
        return latent_wire_loss(made, target, prompt) + self.answer_weight * answer

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """What the language model says after prompts (B, L), padded on the left, that it reads from the adapter.

        Args:
            input_ids: (B, L). attention_mask: (B, L), 0 at pads.
            **settings: those of transformers' ``generate``.

        Returns:
            The new tokens alone, (B, new).
        """
        training = self.training
        try:
            made = self.eval().reconstruct(self.embed(input_ids), attention_mask)
            return self.language_model.generate(inputs_embeds=made, attention_mask=attention_mask, **settings)
        finally:
            self.train(training)

    def extra_repr(self) -> str:
        return f"objective={self.objective!r}"


def latent_wire_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The mean over valid tokens of ``(1 - cos(pred, target)) + 0.1 MSE``, in float32 or wider.

    What pads hold, NaN included, changes neither the loss nor a bit of a gradient; theirs is exactly 0. Without a valid
    token the loss is 0.

    Args:
        pred: (..., C), of any floating dtype.
        target: (..., C), any floating dtype.
        mask: (...), bool or whole numbers, as a tokenizer's ``attention_mask``: 0 at pads.

    Returns:
        A scalar. The cosine's norms are at least 1e-8; MSE is the mean over C of a token's squared differences.

    Raises:
        TypeError: a dtype is wrong. A floating mask is refused: where such are in use, 0 stands for a valid token.
        ValueError: a shape or device is wrong.
    """
    checks.tensor("latent_wire_loss", "pred", pred)
    checks.dtype("latent_wire_loss", "pred", pred, checks.FLOATING)
    if pred.dim() < 1:
        raise ValueError("latent_wire_loss: pred must have shape (..., C), got ()")
    checks.argument(
        "latent_wire_loss", "target", target, tuple(pred.shape), "(..., C)", checks.FLOATING, pred.device, "pred"
    )
    valid = _valid("latent_wire_loss", "mask", mask, pred)
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    # Zeros at pads before anything is computed: what is computed of NaN has gradients of NaN.
    pred, target = (torch.where(valid[..., None], x, 0).to(wide) for x in (pred, target))
    tokens = 1.0 - F.cosine_similarity(pred, target, dim=-1) + 0.1 * (pred - target).square().mean(-1)
    return torch.where(valid, tokens, 0).sum() / valid.sum().clamp(min=1)


def left_padded_labels(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of prompts with their answers, padded on the left, labelled at the answers alone.

    Padded so, each answer ends where the batch ends, and generation starts at the same place in each row.

    Args:
        prompts: tokens of each prompt, at least one each.
        answers: tokens of each answer, at least one each; end it with the end-of-sequence token for the language model
            to learn where to stop.
        pad_token_id: what pads hold; nothing reads it.
        device: of the result. Default torch's.

    Returns:
        ``input_ids``, ``attention_mask`` (1 at prompt and answer, 0 at pads) and ``labels`` (-100 at pads and prompt),
        each (B, L) int64, with L the longest prompt and answer together; what `LatentWire` takes.

    Raises:
        ValueError: there is no prompt, a prompt or an answer is empty, or there are not as many answers as prompts.
    """
    if not len(prompts) or len(prompts) != len(answers):
        raise ValueError(
            "left_padded_labels: prompts and answers must be as many, at least one, "
            f"got {len(prompts)} prompts and {len(answers)} answers"
        )
    for name, samples in (("prompts", prompts), ("answers", answers)):
        empty = next((place for place, tokens in enumerate(samples) if not len(tokens)), None)
        if empty is not None:
            raise ValueError(f"left_padded_labels: {name}[{empty}] must have at least one token, got none")
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        pads = length - len(prompt) - len(answer)
        rows.append(
            (
                [pad_token_id] * pads + [*prompt, *answer],
                [0] * pads + [1] * (length - pads),
                [IGNORED] * (length - len(answer)) + [*answer],
            )
        )
    input_ids, mask, labels = torch.tensor(rows, device=device).unbind(1)
    return input_ids, mask, labels


def _valid(caller: str, name: str, mask: Tensor, like: Tensor) -> Tensor:
    """The mask of ``like``'s tokens as bool, checked."""
    checks.tensor(caller, name, mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{caller}: {name} must be bool or of whole numbers, 0 at pads, got {mask.dtype}")
    checks.shape(caller, name, mask, tuple(like.shape[:-1]), "(...)")
    checks.same_device(caller, name, mask, like.device)
    return mask.bool()
