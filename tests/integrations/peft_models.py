"""Models with LoRA layers of PEFT's, and what the tests of `fuse` ask of them."""

from __future__ import annotations

import copy

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as made
from torch import nn

from pyfused import fuse, unfuse
from pyfused.ops import decision


class Net(nn.Module):
    """Linear layers, a 1x1 convolution and a wider one, an embedding and an attention, none of which PEFT's bases."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 1)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.table, self.attention = nn.Embedding(7, 12), nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images, words):
        x = self.point(torch.relu(self.wide(self.stem(images)))).flatten(2).transpose(1, 2)
        x = x + self.second(torch.tanh(self.first(x))) + self.table(words).mean(1, keepdim=True)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def config(*names, **settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(names), **settings})


def fill(model, scale=0.3):
    """Every LoRA parameter that starts at zero, or at one, holds numbers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


class Pair(nn.Sequential):
    def __init__(self, width=24, bias=True):
        super().__init__(nn.Linear(16, width, bias=bias), nn.GELU(), nn.Linear(width, 8))


def pair(**settings):
    torch.manual_seed(0)
    return fill(get_peft_model(Pair(), config("0", "2", **settings)))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def layers(model):
    return [module for module in model.modules() if isinstance(module, made.LoraLayer)]


def told(model, *inputs, **kwargs):
    """How many calls of operators, and the reasons of what was left to PEFT."""
    seen: list = []
    with decision.observed(seen.append), torch.no_grad():
        model(*inputs, **kwargs)
    left = [one.why for one in seen if isinstance(one, decision.LeftToTorch)]
    return len(seen) - len(left), left


def results(model, *inputs, **kwargs):
    """The output and the gradient of everything that trains, the first input among it."""
    first = inputs[0].clone()
    if first.is_floating_point():
        first.requires_grad_()
    model.zero_grad()
    output = model(first, *inputs[1:], **kwargs)
    output = getattr(output, "logits", output)
    output.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return {"output": output.detach(), "input": first.grad, **found}


def assert_same(ours, theirs, tolerance=3e-6):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is not None:
            error = (ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
            assert error <= tolerance, (name, float(error))


def check_parity(model, *inputs, served, tolerance=3e-6, attention=False, **kwargs):
    """Fused equals PEFT, where ``served`` operators are called; unfused is PEFT again, bit for bit."""
    theirs = results(model, *inputs, **kwargs)
    assert told(model, *inputs, **kwargs) == (0, [])
    fuse(model, attention=attention)
    assert told(model, *inputs, **kwargs)[0] == served
    assert_same(results(model, *inputs, **kwargs), theirs, tolerance)
    unfuse(model)
    again = results(model, *inputs, **kwargs)
    assert all(value is None or torch.equal(again[name], value) for name, value in theirs.items())


def check_16_bits(model):
    """Of a bfloat16 `pair`: fused it is at most twice as far from float64 as PEFT is, or near it."""
    exact = results(copy.deepcopy(model).double(), X.bfloat16().double())
    theirs = results(model, X.bfloat16())
    fuse(model)
    ours = results(model, X.bfloat16())
    assert told(model, X.bfloat16()) == (2, [])
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        scale = value.abs().max()
        error, limit = (((found[name].double() - value).abs().max() / scale) for found in (ours, theirs))
        assert error <= max(2 * limit, 0.012), name


def gpt2(**settings):
    torch.manual_seed(0)
    shape = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    names = ("c_attn", "c_proj", "c_fc")
    chosen = config(*names, fan_in_fan_out=True, **settings)
    return fill(get_peft_model(transformers.GPT2LMHeadModel(shape), chosen))


def llama(**settings):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    return fill(get_peft_model(transformers.LlamaForCausalLM(shape), config(**settings)))


ALL = {"target_modules": "all-linear"}
WORDS = torch.arange(12).reshape(2, 6)


def two_adapters(**settings):
    model = pair(**settings)
    model.add_adapter("other", config("0", "2", r=3, lora_alpha=1, **settings))
    fill(model)
    model.base_model.set_adapter(["default", "other"])
    return model
