"""What the benchmarks know of each operator: the gate, the cases, the contenders, and the models built from them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import pyfused
from pyfused import observe
from pyfused.bench import check, memory, operators, parity, targets
from pyfused.bench.adapter_residual import AdapterCase, eager_adapter_residual
from pyfused.bench.lora_linear import LoRACase

CPU = torch.device("cpu")
SMALL = LoRACase(33, 40, 24, rank=3)
SMALL_ADAPTER = AdapterCase((3, 11, 24), 5)
SMALL_MAPS = AdapterCase((3, 24, 5, 7), 5, drop_path=0.34)


# ---- the gate


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        LoRACase(33, 40, 24, 3, torch.bfloat16, torch.float32, dropout_p=0.3),
        SMALL_ADAPTER,
        SMALL_MAPS,
        AdapterCase((3, 24, 5, 7), 5, torch.bfloat16, torch.float32, drop_path=0.34, dropout_p=0.3),
    ],
    ids=lambda case: case.name,
)
def test_the_gate_passes_the_operator(case):
    for plan in case.plans("portable"):
        assert all(item.passed for item in parity.check(case, CPU, plan=plan))


def _flipped(x, weight, lora_a, lora_b, bias, *, scaling, **rest):
    return pyfused.lora_linear(x, weight, lora_a, lora_b, bias, scaling=-scaling, **rest)


def _slightly_scaled(x, weight, lora_a, lora_b, bias, *, scaling, **rest):
    return pyfused.lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling * 1.00005, **rest)


def _one_nan(x, *arguments, **options):
    y = pyfused.lora_linear(x, *arguments, **options)
    return y + torch.zeros_like(y).index_fill(0, torch.tensor([5]), float("nan"))


def _other_mask(*arguments, seed=None, **options):
    return pyfused.lora_linear(*arguments, seed=None if seed is None else seed + 1, **options)


def _gamma_inside(z, *arguments, layer_scale, channel_dim, **options):
    gamma = layer_scale if channel_dim == -1 else layer_scale[:, None, None]
    return pyfused.adapter_residual(z * gamma, *arguments, channel_dim=channel_dim, **options)


def _tanh_gelu(*arguments, **options):
    return pyfused.adapter_residual(*arguments, activation="gelu_tanh", **options)


def _nothing_dropped(*arguments, sample_scale, **options):
    return pyfused.adapter_residual(*arguments, sample_scale=torch.full_like(sample_scale, 1 / 0.66), **options)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (SMALL, _flipped),
        (SMALL, _slightly_scaled),
        (SMALL, _one_nan),
        (SMALL_ADAPTER, _gamma_inside),
        (SMALL_MAPS, _gamma_inside),
        (SMALL_ADAPTER, _tanh_gelu),
        (SMALL_MAPS, _nothing_dropped),
    ],
)
def test_the_gate_rejects_a_wrong_result(case, wrong):
    assert not all(item.passed for item in parity.check(case, CPU, function=wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_rejects_another_dropout_mask(dtype):
    case = LoRACase(33, 40, 24, rank=3, dtype=dtype, dropout_p=0.1)
    assert not all(item.passed for item in parity.check(case, CPU, function=_other_mask))


@pytest.mark.parametrize(
    ("case", "lost"),
    [(case, f"d{name}") for case in (SMALL, SMALL_ADAPTER) for name in (*case.inputs, *case.trained)],
)
def test_the_gate_looks_at_every_gradient(case, lost):
    tensors = case.tensors(CPU)
    plainest = getattr(pyfused.reference, case.operator)
    exact = parity.results(case, plainest, tensors, double=True)
    plain = parity.results(case, plainest, tensors)
    assert all(item.passed for item in parity.deviations(plain, plain, exact, torch.float32))
    broken = plain | {lost: torch.zeros_like(plain[lost])}
    failed = {item.tensor for item in parity.deviations(broken, plain, exact, torch.float32) if not item.passed}
    assert failed == {lost}


def test_the_limit_is_twice_torchs_error_and_the_floor():
    exact = {"y": torch.tensor([4.0, 0.0], dtype=torch.float64)}
    plain = {"y": torch.tensor([4.0, 0.4])}
    (_, largest) = parity.deviations({"y": torch.tensor([4.0, 0.8])}, plain, exact, torch.float32)
    assert largest.plain == pytest.approx(0.1)
    assert largest.limit == pytest.approx(0.2 + parity.floor(torch.float32), abs=1e-7)
    assert largest.passed
    assert not parity.deviations({"y": torch.tensor([4.0, 0.81])}, plain, exact, torch.float32)[1].passed


def test_the_gate_refuses_results_that_do_not_match():
    exact = {"y": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"ours\['y'\] must have shape \(2, 3\), got \(3, 2\)"):
        parity.deviations({"y": torch.zeros(3, 2)}, exact, exact, torch.float32)
    with pytest.raises(ValueError, match=r"plain\['y'\] must have shape \(2, 3\), got nothing"):
        parity.deviations(exact, {}, exact, torch.float32)


def test_check_reports_a_wrong_backend(monkeypatch, capsys):
    assert check.run(CPU, cases=[SMALL]) == 0
    assert "1 of 1 as close" in capsys.readouterr().out
    right = parity.check
    monkeypatch.setattr(parity, "check", lambda *a, **k: right(*a, **k, function=_flipped))
    assert check.run(CPU, cases=[SMALL]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "0 of 1 as close" in printed


def test_the_gate_covers_the_contender_with_float32_adapters(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    from pyfused.bench import test_operators as operator_rows

    right = parity.check

    def wrong_with_float32_adapters(case, device):
        return right(case, device, function=_flipped if case.adapter_dtype else pyfused.lora_linear)

    case = LoRACase(33, 40, 24, rank=3, dtype=torch.bfloat16)
    assert all(item.passed for item in operator_rows._deviations(case, CPU))
    monkeypatch.setattr(parity, "check", wrong_with_float32_adapters)
    prepared = operator_rows.Prepared(case, CPU)
    assert "pyfused (float32 adapters)" in prepared.contenders.named
    for measured in ("forward", "forward+backward"):
        given = {}
        operator_rows._row(prepared, lambda *a, given=given, **options: given.update(options), False, measured)
        failed = {item.tensor for item in given["deviations"] if not item.passed}
        assert "y (float32 adapters)" in failed
        assert "y" not in failed
    monkeypatch.undo()
    for other in (SMALL, dataclasses.replace(SMALL_ADAPTER, dtype=torch.bfloat16)):
        assert not any("adapters" in item.tensor for item in operator_rows._deviations(other, CPU))


# ---- cases


@pytest.mark.parametrize("case", [SMALL, SMALL_ADAPTER, SMALL_MAPS], ids=lambda case: case.name)
def test_benchmark_inputs_give_nonzero_gradients(case):
    found = parity.results(case, getattr(pyfused, case.operator), case.tensors(CPU))
    assert found.keys() == {"y", *(f"d{name}" for name in (*case.inputs, *case.trained))}
    assert all(value.abs().max() > 0.1 for value in found.values())


def test_neither_term_hides_the_other():
    tensors = SMALL.tensors(CPU)
    full = SMALL.call(pyfused.lora_linear, tensors)
    without = SMALL.call(pyfused.lora_linear, tensors | {"lora_b": torch.zeros_like(tensors["lora_b"])})
    assert (full - without).norm() > 0.3 * without.norm()
    tensors = SMALL_ADAPTER.tensors(CPU)
    full = SMALL_ADAPTER.call(pyfused.adapter_residual, tensors)
    for name in ("up_weight", "z", "residual"):
        without = SMALL_ADAPTER.call(pyfused.adapter_residual, tensors | {name: torch.zeros_like(tensors[name])})
        assert (full - without).norm() > 0.3 * without.norm()


def test_drop_path_drops_some_samples():
    scale = SMALL_MAPS.tensors(CPU)["sample_scale"]
    assert scale.sort().values.tolist() == pytest.approx([0.0, 1 / 0.66, 1 / 0.66])
    assert "sample_scale" not in SMALL_ADAPTER.tensors(CPU)


@pytest.mark.parametrize("case", [SMALL_ADAPTER, SMALL_MAPS], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "options", [{}, {"skip": 0.0}, {"skip": 0.5, "activation": "relu"}, {"residual": None}, {"layer_scale": "scalar"}]
)
def test_the_eager_adapter_is_the_formula(case, options):
    tensors = case.tensors(CPU)

    def of(function):
        def changed(*arguments, **given):
            scale = torch.tensor(0.7) if "layer_scale" in options else given["layer_scale"]
            return function(*arguments, **given | options | {"layer_scale": scale})

        return case.call(changed, tensors)

    torch.testing.assert_close(of(eager_adapter_residual), of(pyfused.reference.adapter_residual))


def test_every_contender_computes_the_same(monkeypatch):
    monkeypatch.setattr("pyfused.bench.baselines.compile_refusal", lambda device: "left out here")
    for case in (SMALL, SMALL_ADAPTER, SMALL_MAPS):
        tensors = case.tensors(CPU)
        inputs = [tensors[name] for name in case.inputs]
        found = case.contenders(tensors)
        assert found.unavailable["torch.compile"] == "left out here"
        assert next(iter(found.named)) == "pyfused"
        wanted = parity.results(case, getattr(pyfused.reference, case.operator), tensors)
        for name, contender in found.named.items():
            if name == "base GEMM":
                continue
            torch.testing.assert_close(contender.call(inputs, tensors["dy"], backward=False)(), wanted["y"])
            gradients = contender.call(inputs, tensors["dy"], backward=True)()
            for gradient, of in zip(gradients, (*case.inputs, *case.trained), strict=True):
                torch.testing.assert_close(gradient, wanted[f"d{of}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (LoRACase(8192, 4096, 4096), 351, 353),
        (LoRACase(8192, 4096, 14336), 1224, 1230),
        (LoRACase(6304, 768, 3072), 38.6, 39.6),
        (LoRACase(2740, 1024, 1024), 7.5, 7.7),
        (AdapterCase((32, 197, 768), 64), 6.8, 6.8),
        (AdapterCase((32, 197, 768), 192), 6.9, 11.8),
        (AdapterCase((16, 1370, 1024), 256), 31.6, 72.7),
        (AdapterCase((64, 64, 64, 64), 32), 23.4, 23.4),
        (AdapterCase((64, 128, 32, 32), 64), 11.7, 11.7),
        (AdapterCase((64, 256, 16, 16), 128), 5.9, 6.8),
        (AdapterCase((64, 512, 8, 8), 256), 3.05, 6.8),
        # 48 of 64 samples live: (3 * 48 + 2 * 16) / (3 * 64) of the forward's bytes, (3 * 48 + 16) / (3 * 64).
        (AdapterCase((64, 64, 64, 64), 32, drop_path=0.25), 23.4 * 176 / 192, 23.4 * 160 / 192),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_floors_in_microseconds(case, forward, backward):
    floor = dataclasses.replace(case, dtype=torch.bfloat16).floor_seconds()
    assert floor["forward"] * 1e6 == pytest.approx(forward, rel=0.01)
    assert (floor["forward+backward"] - floor["forward"]) * 1e6 == pytest.approx(backward, rel=0.01)


def _shapes(found, *keys):
    return {tuple(case.facts()[key] for key in keys) for case in found}


def test_timed_cases_are_those_of_the_targets():
    on_cpu, on_gpu = (operators.timed_cases(torch.device(device)) for device in ("cpu", "cuda"))
    assert {case.dtype for case in on_cpu} == {torch.float32}
    assert {case.dtype for case in on_gpu} == {torch.bfloat16}
    assert {case.operator for case in on_cpu} == {case.operator for case in on_gpu} == operators.OPERATORS.keys()

    lora = [[case for case in found if isinstance(case, LoRACase)] for found in (on_cpu, on_gpu)]
    shapes = [_shapes(found, "rows", "in_features", "out_features") for found in lora]
    assert {(400, 768, 2304), (400, 768, 768), (400, 768, 3072), (400, 3072, 768)} < shapes[0]
    assert shapes[1] == set(targets.LORA_H200)
    assert {case.dropout_p for case in lora[1]} == {0.0, 0.1}

    adapter = [[case for case in found if isinstance(case, AdapterCase)] for found in (on_cpu, on_gpu)]
    shapes = [_shapes([c for c in found if not c.drop_path], "rows", "channels", "hidden") for found in adapter]
    assert set(targets.ADAPTER_CPU) < shapes[0]
    assert {(25088, 64, 32), (6272, 128, 64), (1568, 256, 128), (392, 512, 256)} < shapes[0]
    assert set(targets.ADAPTER_H200) | {(4096, 512, 256)} == shapes[1]
    assert all(sum(bool(case.drop_path) for case in found) == 1 for found in adapter)


def test_rows_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        for found in (operators.timed_cases(torch.device(device)), list(operators.parity_cases(torch.device(device)))):
            names = [case.name for case in found]
            assert len(set(names)) == len(names)
            assert all(case.name.split()[0] == case.operator for case in found)


def test_saved_bytes_of_lora_linear_is_the_narrow_product():
    tensors = SMALL.tensors(CPU)
    leaves = {name: tensors[name].requires_grad_() for name in ("x", "lora_a", "lora_b")}

    def forward(function):
        return function(leaves["x"], tensors["weight"], leaves["lora_a"], leaves["lora_b"], tensors["bias"])

    assert memory.saved_bytes(lambda: forward(pyfused.lora_linear), tensors.values()) == 4 * SMALL.rows * SMALL.rank
    wide = memory.saved_bytes(lambda: leaves["x"].exp().sin(), tensors.values())
    assert wide == 2 * 4 * SMALL.rows * SMALL.in_features - 4 * SMALL.rows * SMALL.in_features


def test_saved_bytes_of_adapter_residual_is_the_hidden_layer_or_nothing():
    tensors = SMALL_ADAPTER.tensors(CPU)
    for name in (*SMALL_ADAPTER.inputs, *SMALL_ADAPTER.trained):
        tensors[name].requires_grad_()
    for plan, wanted in (("save", 4 * SMALL_ADAPTER.rows * SMALL_ADAPTER.hidden), ("recompute", 0)):
        saved = memory.saved_bytes(
            lambda plan=plan: SMALL_ADAPTER.call(pyfused.adapter_residual, tensors, plan=plan), tensors.values()
        )
        assert saved == wanted


# ---- models


@pytest.mark.parametrize(
    ("operator", "module"),
    [
        ("lora_linear", lambda: pyfused.modules.LoRALinear(8, 4, rank=2)),
        ("adapter_residual", lambda: pyfused.modules.BottleneckAdapter(8, init_std=1.0)),
    ],
)
def test_the_reference_operators_replace_the_modules_own(operator, module):
    from pyfused.bench.training import reference_operators

    layer, x = module(), torch.randn(3, 8)
    calls = []
    observe.observers.append(lambda operator, **facts: calls.append(operator))
    try:
        with reference_operators():
            plain = layer(x)
        assert calls == []
        assert torch.allclose(layer(x), plain)
        assert calls == [operator]
    finally:
        observe.observers.pop()


def test_a_model_with_a_wrong_operator_is_rejected():
    pytest.importorskip("sklearn")
    from pyfused.bench import data, fastvit, thirdparty, training

    images, labels = (tensor[:8] for tensor in data.digits(32))
    try:
        model = fastvit.with_adapters(fastvit.fastvit("fastvit_t8", 10, images))
    except thirdparty.Unavailable as error:
        pytest.skip(str(error))
    found = training.deviations(model, images, labels)
    assert {item.tensor for item in found} == {"logits", *(f"d{name}" for name in model.trained())}
    assert len(model.trained()) == 10 * 4 + 2
    # The whole allowance and as much again: through a network, twice plain torch's error is a matter of luck.
    assert all(parity.strain(item) < 2 for item in found)
    reference = pyfused.reference.adapter_residual

    def swapped(z, *arguments, residual, **options):
        return reference(residual, *arguments, residual=z, **options)

    with training.replaced({"adapter_residual": swapped}):
        ours = training._logits_and_gradients(model, images, labels)
    with training.replaced({"adapter_residual": eager_adapter_residual}):
        eager = training._logits_and_gradients(model, images, labels)
    exact = training._logits_and_gradients(model, images, labels)
    assert all(gradient.abs().max() > 0 for gradient in exact.values())
    assert not all(item.passed for item in parity.deviations(ours, exact, exact, torch.float32))
    for name, value in exact.items():
        assert torch.allclose(eager[name], value, rtol=1e-3, atol=1e-3 * value.abs().max()), name


def test_a_step_under_torch_compile_is_the_same_step():
    from pyfused.bench.baselines import compile_refusal
    from pyfused.bench.training import Classifier, TrainingStep

    if compile_refusal(CPU) is not None:
        pytest.skip(compile_refusal(CPU))
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Flatten(), pyfused.modules.BottleneckAdapter(12, init_std=0.1))
    batch = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    model = Classifier(tower, 12, 2)
    steps = [TrainingStep(copy.deepcopy(model), [batch], learning_rate=0.1, compiled=flag) for flag in (False, True)]
    for _ in range(3):
        for step in steps:
            step()
    assert steps[1].losses == pytest.approx(steps[0].losses, rel=1e-5)
    assert steps[0].losses[-1] < steps[0].losses[0]
