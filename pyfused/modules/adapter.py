"""``BottleneckAdapter``: a bottleneck with layer-scale, drop-path and residual in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfused.ops.adapter_residual import ACTIVATIONS, adapter_residual
from pyfused.ops.contract import checks
from pyfused.surgery.added import KeepsWide, draw, kaiming

if TYPE_CHECKING:
    from typing_extensions import Self

# The narrowest bottleneck that ``reduction`` gives.
MIN_HIDDEN = 8


def drop_path_scale(z: Tensor, drop_prob: float, training: bool, scale_by_keep: bool = True) -> Tensor | None:
    """The factor of each sample of z (B, ...) under drop-path: (B,), 0 or 1 / keep, in float32 or wider.

    Takes from torch's generator what timm's ``DropPath`` takes: B Bernoulli draws in z's dtype, and none in eval or at
    rate 0, where it is None. 1 / keep is not rounded to 16 bits. At ``drop_prob = 1`` every factor is 0.
    """
    if drop_prob == 0.0 or not training:
        return None
    keep = 1.0 - drop_prob
    scale = z.new_empty(z.shape[0]).bernoulli_(keep).to(torch.promote_types(z.dtype, torch.float32))
    return scale.div_(keep) if keep > 0.0 and scale_by_keep else scale


class BottleneckAdapter(KeepsWide):
    """``residual + k gamma (skip z + U drop(phi(D z + d)) + u)`` as one `pyfused.adapter_residual`.

    Parameters, float32 by default: ``down_weight`` D (h, C), ``down_bias`` d (h,), ``up_weight`` U (C, h), ``up_bias``
    u (C,), and with ``layer_scale`` ``gamma``, (C,) or (1,). float32 parameters serve z of any dtype. Casting the
    module to 16 bits leaves them in float32; ``dtype`` makes them narrower.

    Starts with D Kaiming-uniform (a = sqrt(5)) and d, U, u zero: the branch is ``skip * z`` until U has been trained.
    With ``skip=True`` on a frozen branch f, ``x + gamma f`` therefore starts as it was; ``skip=False`` starts from the
    residual alone.

    Args:
        channels: C.
        reduction: h = max(C // reduction, 8); a positive number. Default None: 2, unless ``hidden`` is given.
        hidden: h, the width of the bottleneck, in place of ``reduction``. The Triton kernels take up to 512.
        activation: phi, one of "identity", "relu", "leaky_relu", "gelu" (the default, by erf), "gelu_tanh",
            "quick_gelu", "silu".
        skip: factor of z inside the branch: True (the default) is 1, False 0, or any number.
        layer_scale: start value of a parameter ``gamma``, or None (the default) for no such parameter; a caller may
            then pass the gamma of a block it wraps.
        drop_path: probability of dropping a sample's branch in training, in [0, 1]; drawn as timm's ``DropPath`` does,
            kept branches divided by 1 - drop_path. Default 0.
        channel_dim: -1 (the default) for (..., C), 1 for (B, C, H, W).
        dropout: probability of zeroing an element of phi(h), in [0, 1), in training. Default 0.
        bias: whether there are d and u. Default True.
        per_channel: whether gamma is (C,) (the default) or one number, (1,).
        init_std: None (the default) for the start above; a number draws D and U from N(0, init_std^2) instead, biases
            zero. 1e-7 is how the adapters of FastViT blocks first started: with ``skip=False`` that erases the branch
            they wrap, and in float16 the product of two such factors is 0.
        device: of all parameters. Default torch's.
        dtype: of all parameters. Default float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the activation unknown, or ``reduction`` given beside ``hidden``.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019.
    """

    down_weight: nn.Parameter
    down_bias: nn.Parameter | None
    up_weight: nn.Parameter
    up_bias: nn.Parameter | None
    gamma: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        reduction: float | None = None,
        hidden: int | None = None,
        activation: str = "gelu",
        skip: bool | float = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        channel_dim: int = -1,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        per_channel: bool = True,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_adapter_settings(
            "BottleneckAdapter", reduction, hidden, activation, skip, dropout, init_std, dtype,
            bias=bias, per_channel=per_channel,
        )  # fmt: skip
        checks.integer("BottleneckAdapter", "channels", channels, 1)
        if layer_scale is not None:
            checks.finite("BottleneckAdapter", "layer_scale", layer_scale)
        checks.finite("BottleneckAdapter", "drop_path", drop_path)
        if not 0.0 <= drop_path <= 1.0:
            raise ValueError(f"BottleneckAdapter: drop_path must be in [0, 1], got {drop_path}")
        checks.one_of("BottleneckAdapter", "channel_dim", channel_dim, (-1, 1))
        self.channels = channels
        self.hidden = _hidden(channels, reduction, hidden, 2, MIN_HIDDEN)
        self.activation, self.skip, self.dropout = activation, float(skip), float(dropout)
        self.drop_path, self.channel_dim = float(drop_path), channel_dim
        self.init_std, self.layer_scale_init = init_std, layer_scale

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.down_weight, self.up_weight = parameter(self.hidden, channels), parameter(channels, self.hidden)
        self.register_parameter("down_bias", parameter(self.hidden) if bias else None)
        self.register_parameter("up_bias", parameter(channels) if bias else None)
        size = channels if per_channel else 1
        self.register_parameter("gamma", None if layer_scale is None else parameter(size))
        self.reset_parameters()

    @classmethod
    def pfeiffer(cls, channels: int, reduction: float | None = None, activation: str = "relu", **settings: Any) -> Self:
        """AdapterHub's "seq_bn" ("pfeiffer"): ReLU, reduction 16, weights N(0, 0.02^2), no scale, no dropout.

        One per layer, after the feed-forward part f of input x. The bottleneck reads the layer norm of the sum, which
        belongs to the host model, and the residual around it is f: ``h = adapter(norm(f + x), residual=f)``, and the
        host goes on with ``norm(h + x)``.

        Args:
            channels: C. reduction: h = max(C // reduction, 1), default 16. activation: default "relu".
            settings: further arguments of the class.

        Source: Pfeiffer et al., "AdapterFusion", 2021; adapter-hub/adapters, ``SeqBnConfig`` in
        src/adapters/configuration/adapter_config.py and ``Adapter`` in src/adapters/methods/modeling.py. Of the
        options there, the operator has no new layer norm inside the adapter, no gate, no PHM layer, and no dropout
        after U (``dropout`` here acts on phi(h)); all are off in that configuration.
        """
        return cls._preset(channels, reduction, 16, activation, {"init_std": 0.02, "skip": False} | settings)

    @classmethod
    def houlsby(cls, channels: int, reduction: float | None = None, activation: str = "silu", **settings: Any) -> Self:
        """AdapterHub's "double_seq_bn" ("houlsby"): swish, reduction 16, weights N(0, 0.02^2), no scale, no dropout.

        Two per layer, on the output f of the attention and of the feed-forward part, before the host adds its residual
        and applies its layer norm: ``h = adapter(f)``, then ``norm(h + x)``. The residual around the bottleneck is f.

        Args:
            channels: C. reduction: h = max(C // reduction, 1), default 16. activation: default "silu".
            settings: further arguments of the class.

        Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, which starts from a truncated
        N(0, 0.01^2); adapter-hub/adapters, ``DoubleSeqBnConfig``, as for `pfeiffer`.
        """
        return cls._preset(channels, reduction, 16, activation, {"init_std": 0.02, "skip": False} | settings)

    @classmethod
    def parallel(
        cls,
        channels: int,
        reduction: float | None = None,
        activation: str = "relu",
        scaling: float = 4.0,
        learned: bool = False,
        **settings: Any,
    ) -> Self:
        """AdapterHub's "par_bn": beside the feed-forward part, ReLU, reduction 2, scale 4, D Kaiming-uniform, U zero.

        The bottleneck reads x, the input of the part whose output is f, and adds to f:
        ``h = adapter(x, residual=f)``, then the host's ``norm(h + x)``.

        Args:
            channels: C. reduction: h = max(C // reduction, 1), default 2. activation: default "relu".
            scaling: one number, the start value of ``gamma`` (1,). Default 4.
            learned: whether gamma trains. Default False; "scaled_par_bn" is ``scaling=1.0, learned=True``.
            settings: further arguments of the class.

        Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022;
        adapter-hub/adapters, ``ParBnConfig`` and ``ParallelAdapter``, files as for `pfeiffer`.
        """
        adapter = cls._preset(
            channels, reduction, 2, activation, {"skip": False, "layer_scale": scaling, "per_channel": False} | settings
        )
        assert adapter.gamma is not None
        adapter.gamma.requires_grad_(learned)
        return adapter

    @classmethod
    def adaptformer(
        cls, channels: int, hidden: int = 64, scaling: float = 0.1, dropout: float = 0.1, **settings: Any
    ) -> Self:
        """AdaptFormer's: beside the MLP of a ViT block, ReLU, h = 64, constant scale 0.1, dropout 0.1 on phi(h).

        The bottleneck reads x, the input of the MLP's half of the block before its layer norm:
        ``y = adapter(x, residual=x + mlp(norm(x)))``. Starts with D Kaiming-uniform and d, U, u zero.

        Args:
            channels: C. hidden: h, default 64. scaling: ``gamma`` (1,), which does not train, default 0.1.
            dropout: default 0.1. settings: further arguments of the class.

        Source: Chen et al., "AdaptFormer", 2022; ShoufaChen/AdaptFormer, ``Adapter`` in models/adapter.py, with the
        settings of main_image.py and the place of models/custom_modules.py. Its code can also put a layer norm before
        or after the bottleneck, which the operator has not: those settings leave it out.
        """
        return cls.parallel(
            channels, activation="relu", scaling=scaling, **{"hidden": hidden, "dropout": dropout} | settings
        )

    @classmethod
    def _preset(
        cls, channels: int, reduction: float | None, default: float, activation: str, settings: dict[str, Any]
    ) -> Self:
        check_adapter_settings("BottleneckAdapter", reduction, settings.get("hidden"))
        checks.integer("BottleneckAdapter", "channels", channels, 1)
        hidden = _hidden(channels, reduction, settings.get("hidden"), default, 1)
        return cls(channels, **{"activation": activation} | settings | {"hidden": hidden})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw D (and with ``init_std`` U) anew, the rest as at the start.

        Drawn on the CPU in float32: one seed gives the same adapter on every device and in every dtype.
        """
        std = self.init_std
        for weight, start in ((self.down_weight, kaiming), (self.up_weight, nn.init.zeros_)):
            draw(weight, start if std is None else lambda drawn: nn.init.normal_(drawn, std=std))
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                bias.zero_()
        if self.gamma is not None:
            assert self.layer_scale_init is not None
            self.gamma.fill_(self.layer_scale_init)

    def forward(
        self,
        z: Tensor,
        residual: Tensor | None = None,
        layer_scale: Tensor | None = None,
        sample_scale: Tensor | None = None,
    ) -> Tensor:
        """z (..., C), or (B, C, H, W) with ``channel_dim=1`` -> the same shape, in the residual's dtype.

        Args:
            z: what the adapter reads.
            residual: z's shape; None (the default) means z itself.
            layer_scale: a caller's gamma, one element or (C,), for an adapter without one of its own.
            sample_scale: a caller's drop-path factors, (B,), in place of drawn ones. It acts in eval as well.

        Raises:
            ValueError: ``layer_scale`` was given to an adapter that has a gamma; and as `pyfused.adapter_residual`.
            TypeError: as `pyfused.adapter_residual`.
        """
        checks.tensor("BottleneckAdapter", "z", z)
        if layer_scale is not None and self.gamma is not None:
            raise ValueError(
                "BottleneckAdapter: layer_scale must be None for an adapter with a gamma of its own, got a tensor of "
                f"shape {tuple(layer_scale.shape)}"
            )
        if sample_scale is None and z.dim() > 0:
            sample_scale = drop_path_scale(z, self.drop_path, self.training)
        return adapter_residual(
            z,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            residual=residual,
            layer_scale=self.gamma if layer_scale is None else layer_scale,
            sample_scale=sample_scale,
            skip=self.skip,
            activation=self.activation,
            dropout_p=self.dropout,
            training=self.training,
            channel_dim=self.channel_dim,
        )

    def settings(self) -> dict[str, Any]:
        """What gives the parameters their meaning, by the names of the arguments."""
        names = ("activation", "skip", "drop_path", "channel_dim", "dropout")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        scale = "None" if self.gamma is None else str(tuple(self.gamma.shape))
        return (
            f"{self.channels}, hidden={self.hidden}, activation={self.activation!r}, skip={self.skip:g}, "
            f"layer_scale={scale}, drop_path={self.drop_path:g}, dropout={self.dropout:g}, "
            f"channel_dim={self.channel_dim}"
        )


def _hidden(channels: int, reduction: float | None, hidden: int | None, default: float, least: int) -> int:
    """h by checked settings."""
    return hidden or max(int(channels // (reduction or default)), least)


def check_adapter_settings(
    caller: str,
    reduction: float | None = None,
    hidden: int | None = None,
    activation: str = "gelu",
    skip: bool | float = True,
    dropout: float = 0.0,
    init_std: float | None = None,
    dtype: torch.dtype | None = None,
    **flags: bool,
) -> None:
    """Refuse adapter settings that are out of range, in the name of ``caller``.

    Raises:
        TypeError: a setting has the wrong type, ``dtype`` is no floating dtype, or one of ``flags`` no bool.
        ValueError: a setting is out of range, or both ``reduction`` and ``hidden`` are given.
    """
    if reduction is not None:
        checks.finite(caller, "reduction", reduction)
        if reduction <= 0:
            raise ValueError(f"{caller}: reduction must be positive, got {reduction}")
    if hidden is not None:
        checks.integer(caller, "hidden", hidden, 1)
        if reduction is not None:
            raise ValueError(
                f"{caller}: reduction must be None where hidden is given, got reduction = {reduction} and "
                f"hidden = {hidden}: each sets the width"
            )
    for name, value in flags.items():
        checks.flag(caller, name, value)
    checks.one_of(caller, "activation", activation, ACTIVATIONS)
    checks.finite(caller, "skip", skip)
    checks.probability(caller, "dropout", dropout)
    if init_std is not None:
        checks.finite(caller, "init_std", init_std)
        if init_std < 0:
            raise ValueError(f"{caller}: init_std must be at least 0, got {init_std}")
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"{caller}: dtype must be one of {checks.FLOATING}, got {dtype!r}")
