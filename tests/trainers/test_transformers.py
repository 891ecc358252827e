"""transformers' Trainer: it trains and resumes models with LoRA, and saves what docs/guides/language-models.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import trained
from tree import ROOT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file

import pyfused  # noqa: E402

STEPS = 4


def base(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def injected(seed: int = 0):
    model = base(seed)
    torch.manual_seed(1)
    pyfused.inject_lora(model, rank=4, alpha=8, train="score")
    return model


def peft_fused(seed: int = 0):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = peft.get_peft_model(base(seed), config)
    assert pyfused.fuse(model).total == 14
    return model


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (16, 6), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % 3} for row in ids]


def adapter_trainer():
    """The class that the guide shows."""
    page = ROOT / "docs" / "guides" / "language-models.md"
    shown = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in shown if "class AdapterTrainer" in block)
    names: dict = {}
    exec(compile(block, str(page), "exec"), names)
    return names["AdapterTrainer"]


def trainer_of(model, folder: Path, kind=None, **options):
    settings = {
        "max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.3, "optim": "sgd",
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings | options)
    return (kind or transformers.Trainer)(model=model, args=arguments, train_dataset=rows())


def by_hand(model):
    """What Trainer does in `STEPS` steps."""
    torch.manual_seed(3)
    trainer = trainer_of(model, Path("unused"))
    batches = list(trainer.get_train_dataloader())
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(STEPS, optimizer)
    model.train()
    for batch in batches[:STEPS]:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("made", [injected, peft_fused])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=lambda o: "".join(o))
def test_trains(made, options, tmp_path):
    model = made()
    trainer_of(model, tmp_path, **options).train()
    alone = by_hand(made())
    trained.assert_equal(
        trained.trainable(model), trained.trainable(alone), 5e-2 if "bf16" in options else trained.TOLERANCE
    )


@pytest.mark.parametrize("holds", ["all", "what trains", "adapter files"])
def test_resumes_from_its_checkpoint(holds, tmp_path):
    made = peft_fused if holds == "adapter files" else injected
    kind = adapter_trainer() if holds == "what trains" else None
    model = made()
    trainer_of(model, tmp_path, kind).train()
    again = made()
    trainer_of(again, tmp_path, kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained.assert_equal(trained.trainable(again), trained.trainable(model), 1e-6)
    # Two steps from the start would have come elsewhere.
    elsewhere = made()
    trainer_of(elsewhere, tmp_path / "elsewhere", max_steps=2).train()
    with pytest.raises(AssertionError, match="differs by"):
        trained.assert_equal(trained.trainable(elsewhere), trained.trainable(model), 1e-3)
    whole = tmp_path / "checkpoint-2" / "model.safetensors"
    if holds == "adapter files":
        assert not whole.exists()
    else:
        expected = model.state_dict() if holds == "all" else trained.trainable(model)
        assert load_file(whole).keys() == expected.keys()


def test_what_peft_reads_of_a_fused_model(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft_fused()
    trainer_of(model, tmp_path).train()
    plain = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4").eval()
    assert not any(isinstance(module, pyfused.integrations.peft.FusedLayer) for module in plain.modules())
    ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits)


def test_from_pretrained(tmp_path):
    """A checkpoint for other models with LoRA, and a merged model that needs nothing of this package."""
    model = injected()
    trainer_of(model, tmp_path / "run").train()
    model.eval()
    ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        expected = model(ids).logits
    base().save_pretrained(tmp_path / "base")
    torch.save(pyfused.lora_state_dict(model), tmp_path / "lora.pt")
    other = type(model).from_pretrained(tmp_path / "base").eval()
    pyfused.inject_lora(other, rank=4, alpha=8, train="score")
    pyfused.load_lora_state_dict(other, torch.load(tmp_path / "lora.pt"))
    other.score.load_state_dict(model.score.state_dict())
    pyfused.remove_lora(model)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    for each in (other, merged):
        with torch.no_grad():
            torch.testing.assert_close(each(ids).logits, expected, atol=1e-5, rtol=1e-4)
