"""A call that equals one before it: nothing is decided again, kernels start by a program, and nobody can tell."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from operator_cases import RawCalls, leaves_of, skips
from operators import OPERATORS, call, every_call, every_portable_call, every_variant, given, variant_of
from oracle import cotangent
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyfused
from pyfused.choice import measured

_needs_triton = pytest.mark.skipif(bool(skips("triton")), reason="needs backend triton")


def _step(function, tensors, dy=None) -> list[Tensor]:
    """y and all gradients; ``dy`` once more, in the place of another."""
    leaves = leaves_of(tensors)
    y = function(**leaves)
    return [y.detach(), *torch.autograd.grad(y, given(leaves), cotangent(y) if dy is None else dy)]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextlib.contextmanager
def _ran():
    """The programs that ran inside, by their number."""
    from pyfused.kernels import program

    seen, run = [], program.Program.__call__

    def counted(self, arguments):
        seen.append(self)
        return run(self, arguments)

    program.Program.__call__ = counted
    try:
        yield seen
    finally:
        program.Program.__call__ = run


def _on_triton(rows: pytest.MarkDecorator) -> list:
    """Those of a contract's calls; `make gpu` counts what says so in its name as a test of that backend's kernels."""
    found = [row for row in rows.args[1] if row.values[1] == "triton"]
    return [pytest.param(*row.values, marks=row.marks, id=row.id.replace("-triton", "")) for row in found]


@pytest.mark.parametrize(("operator", "backend", "plan", "variant"), _on_triton(every_variant))
def test_a_program_computes_the_same_bits(operator, backend, plan, variant):
    function, tensors = variant_of(operator, backend, plan, variant)
    if function.keywords.get("dropout_p") and "standard" in operator:
        pytest.skip("torch's attention draws its own mask")
    with _ran() as ran:
        first = _step(function, tensors)
        assert not ran
        assert _equal(first, _step(function, tensors))
        assert not ran, "the second call is the one that is watched"
        assert _equal(first, _step(function, tensors))
    assert len(ran) == 2, "forward and backward"


@pytest.mark.parametrize(("operator", "backend", "plan"), _on_triton(every_call))
def test_a_program_runs_on_the_tensors_that_it_is_given(operator, backend, plan):
    """Other values, and addresses that were other tensors' before."""
    function, tensors = call(operator, backend, plan)
    others = {name: None if value is None else torch.randn_like(value) for name, value in tensors.items()}
    expected = _step(function, others)
    for _ in range(3):
        _step(function, tensors)
    with _ran() as ran:
        assert _equal(expected, _step(function, others))
    assert ran


def _as(dtype):
    return lambda value: value.to(dtype)


def _by_columns(value):
    return value.t().contiguous().t() if value.dim() == 2 else value


@pytest.mark.parametrize(
    ("before", "change"),
    [(_as(torch.float16), _as(torch.bfloat16)), (_as(torch.float32), _by_columns)],
    ids=["dtype", "strides"],
)
@pytest.mark.parametrize(("operator", "backend", "plan"), _on_triton(every_call))
def test_another_dtype_or_layout_is_another_program(operator, backend, plan, before, change):
    """At the same shapes."""
    function, drawn = call(operator, backend, plan)
    tensors = {name: None if value is None else before(value) for name, value in drawn.items()}
    others = {name: None if value is None else change(value) for name, value in tensors.items()}
    expected = _step(function, others)
    measured.changed()
    for _ in range(3):
        _step(function, tensors)
    assert _equal(expected, _step(function, others))


@every_portable_call
def test_an_output_in_one_image_may_be_changed_in_place(operator, backend, plan):
    """It has the shape that its implementation gives it, by views."""
    function, _ = call(operator, backend, plan)
    row = OPERATORS[operator]
    tensors = {
        name: value[None] if name in ("x", "z", "o", "residual") and value is not None and value.dim() == 2 else value
        for name, value in row.rows(1 if "cross" in operator else 4, torch.float32).items()
    }
    if "mixed" in operator:
        tensors["x"] = tensors["x"][:1]
        function.keywords["adapter_index"] = torch.zeros(1, 1, dtype=torch.int64)
    leaves = leaves_of(tensors)
    y = function(**leaves).mul_(2)
    assert y._base is None
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), given(leaves)))


@_needs_triton
def test_tied_tensors_are_told_from_those_that_are_not():
    """Which tensor is which is known by the object, and one object may be two arguments."""
    tied, x = torch.randn(6, 6), torch.randn(3, 6)
    apart = {"weight": torch.randn(6, 6), "lora_a": tied.clone(), "lora_b": torch.randn(6, 6)}
    function = lambda **tensors: pyfused.lora_linear(x, **tensors, backend="triton")  # noqa: E731
    right = function(**apart)
    for _ in range(3):
        function(weight=apart["weight"], lora_a=tied, lora_b=tied)
    assert torch.equal(function(**apart), right)
    for _ in range(3):
        assert torch.equal(function(**apart), right)
    expected = x @ apart["weight"].t() + x @ tied.t() @ tied.t()
    torch.testing.assert_close(function(weight=apart["weight"], lora_a=tied, lora_b=tied), expected)


@_needs_triton
def test_the_stream_is_the_input():
    """As in AA-CLIP's adapters, which add to what they read."""
    x, weight = torch.randn(1, 4, 6), torch.randn(6, 6)
    with _ran() as ran:
        for residual in (x, x, x, x.clone(), x.clone(), x.clone(), x):
            y = pyfused.projection_residual(x, weight, residual=residual, gate=0.5, backend="triton")
            torch.testing.assert_close(y, x + 0.5 * x @ weight.t())
    assert len(ran) == 3


@_needs_triton
def test_a_program_that_was_watched_in_inference_mode_trains():
    function, tensors = call("lora_linear", "triton", "one_launch")
    expected = _step(function, tensors)
    measured.changed()
    with torch.inference_mode():
        for _ in range(3):
            # As backward wants it.
            torch.ops.pyfused_triton.lora_linear_fwd(
                tensors["x"].view(1, -1, 6), tensors["weight"], tensors["lora_a"], tensors["lora_b"], tensors["bias"],
                None, 0.5, 0.0, False, "one_launch", True,
            )  # fmt: skip
    with _ran() as ran:
        assert _equal(expected, _step(function, tensors))
    assert len(ran) == 1


@_needs_triton
@pytest.mark.parametrize("offset", [0, 1])
def test_parts_of_one_tensor(offset):
    """Arguments that share memory are each their own."""
    memory = torch.randn(2 * 36 + offset)[offset:]
    parts = memory[:36].view(6, 6), memory[36:].view(6, 6)
    x, b = torch.randn(3, 6), torch.randn(6, 6)
    for _ in range(4):
        for weight, a in (parts, parts[::-1]):
            y = pyfused.lora_linear(x, weight, a, b, backend="triton")
            torch.testing.assert_close(y, x @ weight.t() + x @ a.t() @ b.t())


@_needs_triton
def test_a_program_keeps_no_tensor_alive():
    function, tensors = call("lora_linear", "triton", "one_launch")
    for _ in range(3):
        _step(function, tensors)
    kept = [weakref.ref(value) for value in given(tensors)]
    y = function(**leaves_of(tensors))
    kept.append(weakref.ref(y))
    del function, tensors, y
    gc.collect()
    assert not any(reference() is not None for reference in kept)


@_needs_triton
def test_what_decides_has_changed(monkeypatch):
    """A program lives no longer than the choice of its configurations."""
    from pyfused.kernels import lora_linear

    function, tensors = call("lora_linear", "triton", "one_launch")
    right = _step(function, tensors)
    for _ in range(2):
        _step(function, tensors)
    asked, config = [], lora_linear.gemm_config

    def other(*sizes, **settings):
        asked.append(sizes)
        return config(*sizes, **settings)

    monkeypatch.setattr(lora_linear, "gemm_config", other)
    with _ran() as ran:
        _step(function, tensors)
    assert ran
    assert not asked
    measured.changed()
    with _ran() as ran:
        assert _equal(right, _step(function, tensors))
    assert asked
    assert not ran


@_needs_triton
def test_recorded_launches_run_no_program():
    """The audit and tune see launches, however often a call was made."""
    from pyfused.kernels import recording

    function, tensors = call("lora_linear", "triton", "one_launch")
    for _ in range(3):
        function(**tensors)
    with recording.forced({}) as found:
        function(**tensors)
    assert found


@every_portable_call
def test_an_equal_call_is_decided_once(operator, backend, plan, monkeypatch):
    import pyfused.ops.contract.known as known

    function, tensors = call(operator, backend, plan)
    right = _step(function, tensors)
    kept = []
    monkeypatch.setattr(known.Known, "keep", lambda self, key, decided: kept.append(key))
    assert _equal(right, _step(function, tensors))
    assert not kept
    function(**tensors)
    assert kept, "without a gradient it is another call"


def _wrong(operator: str) -> dict:
    return {
        "lora_linear": {"training": 1, "plan": ["auto"], "channel_dim": -1.0, "backend": "gpu"},
        "adapter_residual": {"training": 1, "activation": ["gelu"], "dropout_p": float("nan"), "channel_dim": True},
        "cross_attention_residual": {"norm_match": 0, "num_heads": 2.0, "plan": {}, "training": 1},
        "projection_residual": {"norm_match": 0, "activation": {}, "eps": -1.0, "backend": 1},
    }[OPERATORS[operator].name]


@every_portable_call
def test_bad_settings_are_refused_after_equal_good_ones(operator, backend, plan):
    """1 equals True, and 2.0 equals 2: not here."""
    function, tensors = call(operator, backend, plan)
    for setting, wrong in _wrong(operator).items():
        messages = []
        for _ in range(2):
            measured.changed()
            for _ in range(len(messages) * 3):
                function(**tensors)
            try:
                function(**tensors, **{setting: wrong})
            except (TypeError, ValueError) as error:
                messages.append((type(error), str(error)))
            else:
                messages.append(None)
        assert messages[0] == messages[1], setting


class _Marked(Tensor):
    """A subclass without behaviour of its own."""


def _compiled(function, tensors):
    return _step(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)


def _flops(function, tensors):
    with FlopCounterMode(display=False) as counter:
        step = _step(function, tensors)
    return [*step, torch.tensor(counter.get_total_flops())]


def _fake(function, tensors):
    with FakeTensorMode() as mode:
        made = {name: None if value is None else mode.from_tensor(value) for name, value in tensors.items()}
        y = function(**made)
    return [torch.tensor(y.shape), torch.tensor(y.stride())]


class _Functions(TorchFunctionMode):
    """Collects the raw operators that go through torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, called, types, args=(), kwargs=None):
        if "pyfused" in str(called):
            self.names.append(str(called))
        return called(*args, **(kwargs or {}))


def _function_mode(function, tensors):
    with _Functions() as seen:
        y = function(**tensors)
    if len(seen.names) != 1:
        pytest.fail(f"a mode of torch's functions sees the raw operator, not {seen.names}")
    return [y]


def _profiled(function, tensors):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step = _step(function, tensors)
    names = {event.key for event in profile.key_averages() if event.key.startswith("pyfused_")}
    if len(names) != 2:
        pytest.fail(f"forward and backward are in a trace by their names, not {names}")
    return [*step, torch.tensor([len(name) for name in sorted(names)])]


def _vmapped(function, tensors):
    name = next(iter(tensors))
    rest = {key: value for key, value in tensors.items() if key != name}
    batched = torch.stack([tensors[name], tensors[name] * 2])
    with torch.no_grad():
        return [torch.vmap(lambda x: function(**{name: x}, **rest), randomness="same")(batched)]


def _batched_gradients(function, tensors):
    leaves = leaves_of(tensors)
    y = function(**leaves)
    dy = torch.stack([cotangent(y), cotangent(y) * 2])
    return list(torch.autograd.grad(y, given(leaves), dy, is_grads_batched=True))


def _forward_mode(function, tensors):
    name = next(iter(tensors))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(RuntimeError, match="there is no forward-mode derivative"):
            function(**tensors | {name: dual})
    return []


def _func_grad(function, tensors):
    name = next(iter(tensors))
    return [torch.func.grad(lambda x: function(**tensors | {name: x}).sum())(tensors[name])]


def _twice(function, tensors):
    leaves = leaves_of(tensors)
    y = function(**leaves)
    gradients = torch.autograd.grad(y, given(leaves), cotangent(y), create_graph=True)
    return list(torch.autograd.grad(sum(gradient.sum() for gradient in gradients), given(leaves)))


def _checkpointed(function, tensors):
    names = list(tensors)
    return _step(
        lambda **leaves: checkpoint(
            lambda *values: function(**dict(zip(names, values, strict=True))), *leaves.values(), use_reentrant=False
        ),
        tensors,
    )


def _with_hooks(function, tensors):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return _step(function, tensors)


def _mode_in_backward(function, tensors):
    leaves = leaves_of(tensors)
    y = function(**leaves)
    with RawCalls() as recorded:
        gradients = torch.autograd.grad(y, given(leaves), cotangent(y))
    if len(recorded.raw) != 1:
        pytest.fail(f"a mode around backward sees the raw operator, not {recorded.raw}")
    return gradients


def _changed_in_place(function, tensors):
    leaves = leaves_of({name: None if value is None else value.clone() for name, value in tensors.items()})
    y = function(**leaves)
    with torch.no_grad():
        for leaf in given(leaves):
            leaf.mul_(2)
    return list(torch.autograd.grad(y, given(leaves), cotangent(y)))


def _output_changed_in_place(function, tensors):
    leaves = leaves_of(tensors)
    y = function(**leaves).mul_(2)
    return list(torch.autograd.grad(y, given(leaves), cotangent(y)))


def _inference(function, tensors):
    with torch.inference_mode():
        return [function(**{name: None if value is None else value.clone() for name, value in tensors.items()})]


def _without_gradient(function, tensors):
    with torch.no_grad():
        y = function(**leaves_of(tensors))
    return [y, torch.tensor(y.requires_grad)]


def _autocast(function, tensors):
    with torch.autocast(next(iter(tensors.values())).device.type, torch.bfloat16):
        return _step(function, tensors)


def _subclass(function, tensors):
    name = next(iter(tensors))
    y = function(**tensors | {name: tensors[name].as_subclass(_Marked)})
    return [torch.tensor(isinstance(y, _Marked)), y.as_subclass(Tensor)]


def _parameters(function, tensors):
    return _step(function, {name: None if value is None else nn.Parameter(value) for name, value in tensors.items()})


def _device_context(function, tensors):
    with torch.device("meta"):
        y = function(**tensors)
    return [y, torch.tensor(y.device.type == "meta")]


def _meta(function, tensors):
    y = function(**{name: None if value is None else value.to("meta") for name, value in tensors.items()})
    return [torch.tensor(y.shape)]


def _one_frozen(function, tensors):
    name = next(iter(tensors))
    leaves = leaves_of(tensors)
    leaves[name] = tensors[name]
    y = function(**leaves)
    return list(torch.autograd.grad(y, [leaf for key, leaf in leaves.items() if leaf is not None and key != name],
                                    cotangent(y)))  # fmt: skip


def _strided(function, tensors):
    name = next(iter(tensors))
    wide = torch.empty(*tensors[name].shape[:-1], 2 * tensors[name].shape[-1], dtype=tensors[name].dtype,
                       device=tensors[name].device)  # fmt: skip
    wide[..., ::2] = tensors[name]
    return _step(function, tensors | {name: wide[..., ::2]})


def _unaligned(function, tensors):
    def moved(value):
        memory = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)
        return memory[1:].view(value.shape).copy_(value)

    return _step(function, {name: None if value is None else moved(value) for name, value in tensors.items()})


def _strided_cotangent(function, tensors):
    y = function(**tensors)
    dy = cotangent(y)
    return _step(function, tensors, dy.mT.contiguous().mT if dy.dim() > 1 else dy)


def _traced(function, tensors):
    names = list(tensors)
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *values: function(**dict(zip(names, values, strict=True)))
    )(*tensors.values())
    return [torch.tensor([str(node.target).startswith("pyfused_") for node in traced.graph.nodes])]


_FEATURES = [
    _compiled, _flops, _fake, _function_mode, _profiled, _vmapped, _batched_gradients, _forward_mode, _func_grad,
    _twice, _checkpointed, _with_hooks, _mode_in_backward, _changed_in_place, _output_changed_in_place, _inference,
    _without_gradient, _autocast, _subclass, _parameters, _device_context, _meta, _one_frozen, _strided, _unaligned,
    _strided_cotangent, _traced,
]  # fmt: skip


def _outcome(feature, function, tensors) -> tuple[str, list[Tensor]]:
    """What is raised, in words, and what comes back."""
    try:
        return "", feature(function, tensors)
    except Exception as error:
        return f"{type(error).__name__}: {error}", []


@pytest.mark.parametrize("feature", _FEATURES, ids=lambda feature: feature.__name__.strip("_"))
@every_portable_call
def test_a_known_call_does_what_an_unknown_one_does(operator, backend, plan, feature):
    _assert_unnoticed(feature, *call(operator, backend, plan))


@_needs_triton
@pytest.mark.parametrize("feature", [f for f in _FEATURES if f is not _meta], ids=lambda f: f.__name__.strip("_"))
def test_a_program_does_what_its_implementation_does(feature):
    _assert_unnoticed(feature, *call("lora_linear", "triton", "shrink_expand"))


def _assert_unnoticed(feature, function, tensors):
    words, expected = _outcome(feature, function, tensors)
    measured.changed()
    for _ in range(3):
        _step(function, tensors)
        with torch.no_grad():
            function(**tensors)
    for _ in range(3):
        again, found = _outcome(feature, function, tensors)
        assert again.splitlines()[:1] == words.splitlines()[:1]
        assert _equal(expected, found)


@_needs_triton
def test_what_is_known_is_bounded(monkeypatch):
    import pyfused.ops.contract.known as known
    from pyfused.kernels import program

    monkeypatch.setattr(known, "_MOST", 4)
    monkeypatch.setattr(program, "_MOST", 4)
    monkeypatch.setattr(program, "_programs", {})
    function, _ = call("lora_linear", "triton", "one_launch")
    tensors = OPERATORS["lora_linear"]
    held = known.Known()
    for rows in (*range(1, 9), 1, 1, 1):
        drawn = tensors.rows(rows, torch.float32)
        torch.testing.assert_close(function(**drawn), tensors.reference(**drawn))
        held.keep((rows,), rows)
    assert len(program._programs) <= 4
    assert held.get((1,)) == 1
    assert held.get((2,)) is None
    assert len(held._found) <= 4
