"""LatentWire in training: its objectives on a small Llama against the formulas, and examples/latent_wire.py."""

from __future__ import annotations

import copy
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tree import EXAMPLES

from pyfused.models import LatentWire, latent_wire_loss, left_padded_labels
from pyfused.models.latent_wire import OBJECTIVES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [3]]
ANSWERS = [[20, 1], [21, 22, 23, 1], [1], [24, 1]]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        # Logits that tell tokens apart.
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


def system(objective: str = "matched", fitted: bool = True, **settings) -> LatentWire:
    torch.manual_seed(1)
    made = LatentWire(llama(), 6, 20, objective, **({"dropout": 0.0} | settings))
    return made.fit_compressor([batch()[:2]]) if fitted else made


def batch(pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return left_padded_labels(PROMPTS, ANSWERS, pad)


def plain_losses(made: LatentWire) -> dict[str, Tensor]:
    """Of each objective, each sample for itself and without a pad."""
    table, pca = made.language_model.get_input_embeddings().weight, made.compressor
    similar, squares, entropy = [], [], []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        e = table[prompt]
        out = made.adapter((e - pca.mean_) @ pca.components_.t())
        similar.append(F.cosine_similarity(out, e))
        squares.append((out - e).square().mean(-1))
        logits = made.language_model(inputs_embeds=torch.cat([out, table[answer]])[None]).logits[0]
        chances = logits[len(prompt) - 1 : -1].log_softmax(-1)
        entropy.append(-chances[range(len(answer)), answer])
    reconstruction, entropy = (
        (1 - torch.cat(similar)).mean() + 0.1 * torch.cat(squares).mean(),
        torch.cat(entropy).mean(),
    )
    losses = reconstruction, reconstruction + made.answer_weight * entropy, entropy
    return dict(zip(OBJECTIVES, losses, strict=True))


def gradients(loss: Tensor, made: LatentWire) -> dict[str, Tensor]:
    parameters = dict(made.adapter.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


class TestObjectives:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_loss_and_every_gradient(self, objective):
        made = system(objective, answer_weight=0.7).double()
        loss, expected = made(*batch()), plain_losses(made)[objective]
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        wanted = gradients(expected, made)
        for name, gradient in gradients(loss, made).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-10, msg=name)
            assert gradient.abs().sum() > 0, name

    def test_weight_of_the_answers_by_default(self):
        made = system()
        assert made.answer_weight == 0.1
        torch.testing.assert_close(made(*batch()), plain_losses(made)["matched"], rtol=1e-5, atol=0)

    def test_the_language_model_is_frozen_and_does_not_run_for_a_reconstruction(self):
        made = system("reconstruction").train()
        calls = []
        made.language_model.model.register_forward_hook(lambda *_: calls.append(1))
        made(*batch()).backward()
        assert not calls
        assert made.training
        assert made.adapter.training
        assert not any(module.training for module in made.language_model.modules())
        trains = {name for name, p in made.named_parameters() if p.requires_grad}
        assert trains == {f"adapter.{name}" for name, _ in made.adapter.named_parameters()}
        assert {name for name, p in made.named_parameters() if p.grad is not None} == trains

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_pads_change_no_bit(self, objective):
        made = system(objective)
        loss = made(*batch())
        wanted = gradients(loss, made)
        # Of a token whose embedding is no number, too.
        with torch.no_grad():
            made.language_model.get_input_embeddings().weight[31] = (
                float("inf") if objective == "reconstruction" else 9.0
            )
        other = made(*batch(pad=31))
        assert torch.equal(other, loss)
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(other, made).items())

    def test_teacher_forcing_under_a_causal_mask(self):
        """The label of a position is not in what it reads; the answer's tokens before it are."""
        made = system("teacher_forced")
        ids, mask, labels = batch()
        loss = made(ids, mask, labels)
        last, first = ids.clone(), ids.clone()
        last[:, -1] = 30
        first[1, -4] = 30
        assert torch.equal(made(last, mask, labels), loss)
        assert not torch.isclose(made(first, mask, labels), loss, rtol=1e-3)

    def test_without_answers_there_is_no_entropy(self):
        ids, mask, labels = batch()
        none = torch.full_like(labels, -100)
        assert system("teacher_forced")(ids, mask, none) == 0
        assert system("matched")(ids, mask, none) == system("reconstruction")(ids, mask, none) > 0

    def test_fit_leaves_pads_out_and_starts_at_the_statistics(self):
        made, (ids, mask, _) = system(fitted=False), batch()
        halves = list(zip(ids.split(2), mask.split(2), strict=True))
        assert made.fit_compressor(halves) is made
        tokens = made.embed(ids)[mask == 1]
        assert made.compressor.n_samples_seen_.item() == len(tokens) == sum(map(len, PROMPTS + ANSWERS))
        torch.testing.assert_close(made.compressor.mean_, tokens.mean(0))
        torch.testing.assert_close(made.adapter.output_norm_bias.data, tokens.mean(0))
        torch.testing.assert_close(made.adapter.output_norm_weight.data, tokens.std(0, correction=0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_a_narrow_language_model(self, objective, dtype):
        made, exact = system(objective).to(dtype), system(objective)(*batch())
        assert made.language_model.dtype == dtype
        assert made.adapter.first_weight.dtype == made.compressor.components_.dtype == torch.float32
        loss = made(*batch())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
        assert all(gradient.isfinite().all() for gradient in gradients(loss, made).values())

    def test_generation_reads_the_adapter(self):
        made = system(dropout=0.5).train()
        ids, mask, _ = left_padded_labels(PROMPTS, [[0]] * 4, 0)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        said = made.generate(ids[:, :-1], mask[:, :-1], **settings)
        assert said.shape == (4, 6)
        assert made.training
        assert made.adapter.training
        made.eval()
        for prompt, tokens in zip(PROMPTS, said, strict=True):
            read = made.reconstruct(made.embed(torch.tensor([prompt])))
            for token in tokens:
                assert made.language_model(inputs_embeds=read).logits[0, -1].argmax() == token
                read = torch.cat([read, made.embed(token[None, None])], 1)
        as_text = made.language_model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], **settings)
        assert not torch.equal(as_text[:, -6:], said), "the adapter is random"

    def test_saved_and_loaded(self):
        made, file = system(), io.BytesIO()
        loss = made(*batch())
        torch.save(made.state_dict(), file)
        file.seek(0)
        other = system(fitted=False)
        with pytest.raises(RuntimeError, match="PCACompressor: call fit, partial_fit or load_state_dict"):
            other(*batch())
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(*batch()), loss)
        assert torch.equal(copy.deepcopy(other)(*batch()), loss)

    def test_loss_is_the_public_function(self):
        made, (ids, mask, labels) = system("reconstruction"), batch()
        prompt = mask.bool() & (labels == -100)
        e = made.embed(ids)
        assert torch.equal(made(ids, mask, labels), latent_wire_loss(made.reconstruct(e, prompt), e, prompt))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: system("teacher"), ValueError, r"LatentWire: objective must be one of \('reconstruction',"),
            (lambda: LatentWire(nn.Linear(2, 2)), TypeError, "language_model must be a causal .*, got Linear"),
            (lambda: system(answer_weight=float("nan")), ValueError, "LatentWire: answer_weight must be finite"),
            (lambda: system(dropout=-0.1), ValueError, r"LatentWireAdapter: dropout must be in \[0, 1\), got -0.1"),
            (lambda: system()(batch()[0], batch()[1][:1], batch()[2]), ValueError, "attention_mask must have shape as"),
            (lambda: system()(*batch()[:2], batch()[2][:, 1:]), ValueError, "labels must have shape as input_ids"),
        ],
    )  # fmt: skip
    def test_bad_input(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


# ---- the recipe


@pytest.fixture(scope="module")
def recipe():
    examples = str(EXAMPLES)
    sys.path.insert(0, examples)
    yield importlib.import_module("latent_wire")
    sys.path.remove(examples)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """The folder of a run with nothing but defaults, which reconstructs, and what it printed."""
    folder = tmp_path_factory.mktemp("latent_wire")
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        assert recipe.main(["--output", str(folder)]) == 0
    return folder, printed.getvalue()


def rows_of(printed: str) -> dict[str, list[float]]:
    """The table's: cosine, relative error, both F1."""
    found = re.findall(r"│ ([^│]+?) +│ +([-\d.]+) +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+) +│", printed)
    return {name: [float(value) for value in values] for name, *values in found}


def run(recipe, capsys, *options: str | Path) -> str:
    assert recipe.main([str(option) for option in options]) == 0
    return capsys.readouterr().out


def refusal(recipe, capsys, *options: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        recipe.main([str(option) for option in options])
    assert stopped.value.code == 2
    return capsys.readouterr().err


class TestRecipe:
    def test_reconstruction_rises_above_the_compressor(self, trained):
        folder, printed = trained
        rows = rows_of(printed)
        text, pca, start, end = (
            rows[name] for name in ("its own embeddings", "PCA and back", "adapter, at its start", "adapter, trained")
        )
        assert text[:2] == [1.0, 0.0]
        assert text[3] == 1.0
        assert text[2] > 0.8, "the language model knows its texts"
        assert start[0] < 0.3
        assert end[0] > 0.9
        assert end[0] > pca[0] + 0.1
        assert end[1] < pca[1]
        # What is said after the prompts: the compressor alone loses it, the adapter brings it back.
        assert end[2] > pca[2] + 0.2
        assert end[3] > pca[3] + 0.2
        assert (folder / "latent_wire.png").read_bytes().startswith(b"\x89PNG")
        state = torch.load(folder / "latent_wire.pt", weights_only=True)
        assert state["epoch"] == 40
        assert state["losses"][-1] < 0.3 * state["losses"][0]
        assert not any(name.startswith("language_model") and "weight" in name for name in state["model"])

    @pytest.mark.parametrize("objective", ["matched", "teacher_forced"])
    def test_the_other_objectives_learn_the_answers(self, recipe, trained, objective, tmp_path, capsys):
        options = ("--objective", objective, "--llm", trained[0] / "llm", "--epochs", "6", "--answer-weight", "0.1")
        rows = rows_of(run(recipe, capsys, "--output", tmp_path, *options))
        assert rows["its own embeddings"] == rows_of(trained[1])["its own embeddings"]
        state = torch.load(tmp_path / "latent_wire.pt", weights_only=True)
        assert state["epoch"] == 6
        assert sum(state["losses"][-10:]) < 0.8 * sum(state["losses"][:10])
        start, end = rows["adapter, at its start"], rows["adapter, trained"]
        # The cross-entropy alone does not hold the adapter to the embeddings.
        assert (end[0] > 0.5) == (objective == "matched")
        assert end[2] > start[2]

    def test_resumes_what_it_began_and_nothing_else(self, recipe, trained, tmp_path, capsys):
        shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
        before = torch.load(tmp_path / "latent_wire.pt", weights_only=True)
        # What is done is measured again, and not trained on.
        printed = run(recipe, capsys, "--output", tmp_path, "--resume")
        assert torch.load(tmp_path / "latent_wire.pt", weights_only=True)["losses"] == before["losses"]
        assert rows_of(printed) == rows_of(trained[1])
        written = (tmp_path / "latent_wire.pt").read_bytes()
        for option, value, own in (
            ("--objective", "matched", "objective 'reconstruction', this run has 'matched'"),
            ("--compressed", "8", "compressed 16, this run has 8"),
            ("--epochs", "41", "epochs 40, this run has 41"),
            ("--batch-size", "8", "batch_size 16, this run has 8"),
        ):
            assert own in refusal(recipe, capsys, "--output", tmp_path, "--resume", option, value)
            assert (tmp_path / "latent_wire.pt").read_bytes() == written
        assert "--resume must find" in refusal(recipe, capsys, "--output", tmp_path / "none", "--resume")
        # Another language model at the same place is another run.
        recipe.make_llm(tmp_path / "llm", recipe.pairs_of("descriptions", 16, 3), 0, 3, torch.device("cpu"))
        assert "llm '" in refusal(recipe, capsys, "--output", tmp_path, "--resume")

    def test_an_interrupted_run_goes_on_bit_for_bit(self, recipe, trained, tmp_path, monkeypatch):
        options = ["--llm", str(trained[0] / "llm"), "--epochs", "3", "--output"]
        assert recipe.main([*options, str(tmp_path / "whole")]) == 0
        save = recipe.recipe.Training.save

        def interrupted(training):
            save(training)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(recipe.recipe.Training, "save", interrupted)
            assert recipe.main([*options, str(tmp_path / "parts")]) == 130
        assert recipe.main([*options, str(tmp_path / "parts"), "--resume"]) == 0
        states = [torch.load(tmp_path / name / "latent_wire.pt", weights_only=True) for name in ("whole", "parts")]
        assert states[0]["losses"] == states[1]["losses"]
        assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())

    def test_a_random_language_model_and_data_of_ones_own(self, recipe, tmp_path, capsys):
        file = tmp_path / "pairs.jsonl"
        file.write_text(
            "".join(json.dumps({"prompt": f"what is {n}?", "answer": f" {n + 1}"}) + "\n" for n in range(16))
        )
        options = ("--data", file, "--llm-epochs", "0", "--epochs", "1", "--compressed", "8", "--precision", "bfloat16")
        printed = run(recipe, capsys, "--output", tmp_path, *options)
        assert "4 prompts held out" in " ".join(printed.split())
        rows = rows_of(printed)
        assert rows["its own embeddings"][3] == 1.0
        assert rows["adapter, trained"][0] > rows["adapter, at its start"][0]

    def test_a_bad_number_stops_it(self, recipe, trained, tmp_path, capsys):
        options = ("--llm", trained[0] / "llm", "--epochs", "1", "--lr", "1e30")
        assert recipe.main(["--output", str(tmp_path), *map(str, options)]) == 1
        assert re.search(r"stopped: the loss is nan at step \d+, learning rate .*bad tensor", capsys.readouterr().err)
        assert not (tmp_path / "latent_wire.pt").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--objective", "teacher"), "invalid choice: 'teacher'"),
            (
                ("--llm", "nowhere"),
                "--llm must be a folder that save_pretrained wrote, got 'nowhere', which is no folder",
            ),
            (("--llm", "."), "--llm must hold a causal language model and its tokenizer, got in ."),
            (("--data", "nowhere"), "--data must be descriptions or a file, got 'nowhere', which is no file"),
            (
                ("--data", "bad.jsonl"),
                'bad.jsonl, line 2, must be {"prompt": ..., "answer": ...}, neither of them empty',
            ),
            (("--samples", "7"), "--data and --samples must give 8 pairs or more, got 7"),
            (("--llm-epochs", "-1"), "--llm-epochs: expected a whole number of at least 0, got '-1'"),
            (("--lr", "inf"), "--lr: expected a positive number, got 'inf'"),
            (("--epochs", "0"), "expected a whole number of at least 1, got '0'"),
            (("--device", "cuda:99"), "--device must be a device of this machine, got 'cuda:99'"),
        ],
    )
    def test_bad_options(self, recipe, options, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": 3}\n')
        assert message in refusal(recipe, capsys, *options)

    def test_help_names_every_option(self, recipe, capsys):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(["--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        for action in recipe.options()._actions:
            assert action.help
            assert all(option in shown for option in action.option_strings)

    @pytest.mark.parametrize(
        ("said", "wanted", "f1"),
        [([1, 2], [2, 1], 1.0), ([1, 1, 2], [1, 3], 0.4), ([1], [2], 0.0), ([], [], 1.0), ([], [1], 0.0)],
    )
    def test_token_f1(self, recipe, said, wanted, f1):
        assert recipe.token_f1(said, wanted) == pytest.approx(f1)
