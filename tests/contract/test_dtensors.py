"""DTensors among the arguments: each operator names the one that it does not take, before any process waits."""

from __future__ import annotations

import pytest
import torch
from operators import OPERATORS, call
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)


@pytest.fixture
def replicate():
    """Makes a DTensor of a tensor, as one of two processes of which the other is not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    yield lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_dtensor_is_refused_by_name(operator, replicate):
    function, tensors = call(operator, "portable", "")
    given = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    name = OPERATORS[operator].name
    for argument, tensor in given.items():
        expected = rf"^{name}: {argument} must be a whole tensor, got a DTensor placed by \(Replicate\(\),\); gather it"
        if (name, argument) == ("lora_linear", "weight"):
            expected = r"^lora_linear: x must be a DTensor like weight, got a Tensor; put LoRA into the model first"
            if operator == "lora_linear mixed":
                expected = r"^lora_linear: adapter_index must be None over DTensors, got a Tensor$"
        with pytest.raises((TypeError, ValueError), match=expected):
            function(**{**tensors, argument: replicate(tensor)})
