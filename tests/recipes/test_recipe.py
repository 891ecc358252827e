"""examples/recipe.py: steps, the first bad number, checkpoints that are whole, and going on from one bit for bit."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tree import EXAMPLES, TESTS

for package in ("rich", "tqdm", "matplotlib"):
    pytest.importorskip(package)
sys.path.insert(0, str(EXAMPLES))
import recipe  # noqa: E402


def training(checkpoint: Path | None = None, **settings) -> recipe.Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    made = {"identity": {"method": "toy", "rank": 2}, "scheduler": recipe.warm_cosine(optimizer, 2, 12)} | settings
    return recipe.Training(
        model,
        lambda batch: F.cross_entropy(model(batch[0]).float(), batch[1]),
        optimizer,
        checkpoint=checkpoint,
        **made,
    )


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    return [(torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)) for _ in range(4)]


def run(made: recipe.Training, epochs: int, batches_of=batches) -> recipe.Training:
    torch.manual_seed(1)
    made.run(batches_of, epochs, "toy", 6)
    return made


class TestTraining:
    def test_every_batch_is_one_step_of_the_plain_loop(self):
        made, plain = run(training(), 2), training()
        torch.manual_seed(1)
        losses, norms = [], []
        for epoch in range(2):
            for batch in batches(epoch):
                plain.model.train()
                loss = plain.loss_of(batch)
                loss.backward()
                trained = [p for p in plain.model.parameters() if p.requires_grad]
                norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
                plain.optimizer.step()
                plain.scheduler.step()
                plain.optimizer.zero_grad()
                losses.append(loss.item())
        assert made.losses == losses
        assert made.norms == norms
        assert len(made.seconds) == 8 - 2
        assert made.peak_bytes > 0
        assert made.step_ms > 0

    def test_one_batch_an_epoch(self):
        made = run(training(), 2, lambda epoch: batches(epoch)[:1])
        assert len(made.losses) == 2
        assert math.isnan(training().step_ms)

    def test_the_clip_and_the_mode(self):
        made, whole = (training(scheduler=None, clip=clip) for clip in (1e-2, 1e6))
        for one in (made, whole):
            one.optimizer = torch.optim.SGD(one.optimizer.param_groups[0]["params"], lr=1.0)
            run(one, 1, lambda epoch: batches(epoch)[:1])
        moved, free = (one.model[3].weight - training().model[3].weight for one in (made, whole))
        assert made.norms == whole.norms
        torch.testing.assert_close(moved.detach(), free.detach() * (1e-2 / whole.norms[0]), rtol=1e-3, atol=1e-7)
        still = run(training(mode=False), 1)
        assert torch.equal(still.model[1].running_mean, torch.zeros(8))

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_precision_is_autocasts(self, precision):
        made = training(precision=precision)
        seen = []
        made.model[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
        run(made, 1)
        assert set(seen) == {getattr(torch, precision)}
        assert made.model[3].weight.dtype == torch.float32
        # What is clipped and told is the gradient itself, also where the loss was scaled.
        whole = run(training(), 1)
        assert made.losses == pytest.approx(whole.losses, rel=0.05)
        assert made.norms == pytest.approx(whole.norms, rel=0.05)

    def test_float16_steps_over_an_overflow_and_goes_on(self):
        made = training(precision="float16")
        made.loss_of = lambda batch: made.model(batch[0]).float().square().sum() * 1e3
        run(made, 6)
        assert not all(map(math.isfinite, made.norms))
        assert made._scaler.get_scale() < 4096
        done = sum(map(math.isfinite, made.norms))
        # The schedule counts the steps that were taken.
        assert made.scheduler.last_epoch == done > 0
        assert all(p.isfinite().all() for p in made.model.parameters())

    def test_float16_that_overflows_at_every_step_stops(self):
        made = training(precision="float16")
        made.loss_of = lambda batch: (made.model[3].weight[0, 0] * 0).sqrt() + made.model(batch[0]).float().sum()
        with pytest.raises(recipe.NotFinite, match=r"norm of the gradients is nan .* the gradient of 3\.weight"):
            run(made, 9)
        assert len(made.losses) == 12

    def test_a_gradient_that_grows_is_told(self, capsys):
        made = training()
        made.loss_of = lambda batch: made.model(batch[0]).sum() * (1e5 if len(made.losses) == 5 else 1.0)
        run(made, 2)
        (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert told.startswith("warning: toy 2/2: the gradient's norm rose to ")


class TestNotFinite:
    def bad(self, kind: str, made: recipe.Training):
        def of(epoch: int):
            given = batches(epoch)
            if epoch == 1 and kind == "input":
                given[2][0][0, 0] = math.nan
            if epoch == 1 and kind == "parameter":
                with torch.no_grad():
                    made.model[3].bias[0] = math.inf
            return given

        return of

    @pytest.mark.parametrize(
        ("kind", "step", "first"),
        [("input", 7, "input 0 of the batch"), ("parameter", 5, "the parameter 3.bias")],
    )
    def test_says_where_and_keeps_the_last_checkpoint(self, kind, step, first, tmp_path):
        made = training(tmp_path / "toy.pt")
        with pytest.raises(recipe.NotFinite) as raised:
            run(made, 3, self.bad(kind, made))
        told = str(raised.value)
        assert f"the loss is nan at step {step}, learning rate " in told
        assert f"the first bad tensor is {first}; {tmp_path / 'toy.pt'} holds epoch 1" in told
        again = training(tmp_path / "toy.pt")
        again.resume()
        assert again.epoch == 1
        assert len(again.losses) == 4

    def test_the_first_bad_output_is_found(self):
        made = training()
        made.model[2].register_forward_hook(lambda module, given, output: output / 0)
        with pytest.raises(recipe.NotFinite, match=r"at step 1, learning rate 0\.00333; .* is the output of 2$"):
            run(made, 1)

    def test_a_loss_of_its_own_and_a_gradient(self):
        made = training()
        made.loss_of = lambda batch: made.model(batch[0]).sum() * math.nan
        with pytest.raises(recipe.NotFinite, match="the loss itself"):
            run(made, 1)
        made = training()
        made.loss_of = lambda batch: (made.model[3].weight[0, 0] * 0).sqrt() + made.model(batch[0]).sum() * 0
        with pytest.raises(recipe.NotFinite, match=r"norm of the gradients is nan .* the gradient of 3\.weight"):
            run(made, 1)


class TestCheckpoint:
    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_goes_on_bit_for_bit(self, precision, tmp_path):
        whole = run(training(precision=precision), 3)
        run(training(tmp_path / "a" / "toy.pt", precision=precision), 1)
        later = training(tmp_path / "a" / "toy.pt", precision=precision)
        nn.init.zeros_(later.model[3].weight)
        later.resume()
        # The generator too is where it was.
        later.run(batches, 3, "toy", 6)
        assert later.losses == whole.losses
        assert later.norms == whole.norms
        for one, other in zip(later.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
            assert torch.equal(one, other)

    def test_holds_what_trains_and_buffers_alone(self, tmp_path):
        run(training(tmp_path / "toy.pt"), 1)
        state = torch.load(tmp_path / "toy.pt", weights_only=True)
        assert {name for name in state["model"] if name.startswith("0.")} == set()
        assert {"1.running_mean", "3.weight"} <= state["model"].keys()
        assert [path.name for path in tmp_path.iterdir()] == ["toy.pt"]

    def test_another_run_is_refused(self, tmp_path):
        run(training(tmp_path / "toy.pt"), 1)
        other = training(tmp_path / "toy.pt", identity={"method": "lora", "rank": 2, "alpha": 4})
        before = other.model[3].weight.clone()
        with pytest.raises(ValueError, match="alpha None, this run has 4; method 'toy', this run has 'lora'"):
            other.resume()
        assert torch.equal(other.model[3].weight, before)
        torch.save({"weight": torch.ones(2)}, tmp_path / "toy.pt")
        with pytest.raises(ValueError, match="must be a checkpoint that a recipe wrote"):
            other.resume()
        for damaged in (b"half", b"", (tmp_path / "toy.pt").read_bytes()[:-100]):
            (tmp_path / "toy.pt").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"--resume: .*toy.pt' must be tensors that torch.save wrote"):
                other.resume()

    def test_killed_while_it_writes_the_one_before_survives(self, tmp_path):
        script = textwrap.dedent(f"""
            import os, signal, sys
            sys.path[:0] = [{str(EXAMPLES)!r}, {str(TESTS)!r}, {str(Path(__file__).parent)!r}]
            import torch, test_recipe
            made = test_recipe.training(test_recipe.Path(sys.argv[1]))
            save, calls = torch.save, []
            def killed(state, path):
                calls.append(path)
                if len(calls) == 2:
                    open(path, "wb").write(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                save(state, path)
            torch.save = killed
            test_recipe.run(made, 3)
        """)
        child = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "toy.pt")], capture_output=True, text=True, check=False
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        again = training(tmp_path / "toy.pt")
        again.resume()
        assert again.epoch == 1
        again.run(batches, 3, "toy", 6)
        # Another process may add in another order.
        assert again.losses == pytest.approx(run(training(), 3).losses, rel=1e-5)


class TestRates:
    def test_warm_cosine(self):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        scheduler = recipe.warm_cosine(optimizer, 4, 12)
        rates = []
        for _ in range(13):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
        assert rates[8] == pytest.approx(1.0)
        assert rates[12] == pytest.approx(0.0)
        assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]

    def test_shuffled(self):
        order = recipe.shuffled(10, 4, 3)
        assert [len(part) for part in order] == [4, 4]
        assert len(set(torch.cat(order).tolist())) == 8
        assert torch.equal(torch.cat(order), torch.cat(recipe.shuffled(10, 4, 3)))
        orders = {
            tuple(torch.cat(recipe.shuffled(100, 100, *seeds)).tolist()) for seeds in ((3,), (4,), (3, 1), (1, 3))
        }
        assert len(orders) == 4
        # Fewer than a batch are one.
        assert [len(part) for part in recipe.shuffled(3, 4, 0)] == [3]


class TestCommand:
    def test_devices(self, capsys):
        parser = recipe.parser("A toy.", epochs=7)
        assert parser.parse_args([]).epochs == 7
        assert recipe.device_of(parser, "cpu") == torch.device("cpu")
        for name in ("nonsense", *(() if torch.cuda.is_available() else ("cuda",))):
            with pytest.raises(SystemExit):
                recipe.device_of(parser, name)
            assert f"--device must be a device of this machine, got {name!r}: " in capsys.readouterr().err

    @pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
    def test_counts(self, given, capsys):
        with pytest.raises(SystemExit):
            recipe.parser("A toy.").parse_args(["--epochs", given])
        assert "expected a whole number of at least 1" in capsys.readouterr().err

    def test_seeds(self, capsys):
        assert recipe.parser("A toy.").parse_args(["--seed", "0"]).seed == 0
        with pytest.raises(SystemExit):
            recipe.parser("A toy.").parse_args(["--seed=-1"])
        assert "expected a whole number of at least 0, got '-1'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("kind", "good", "bad"),
        [
            ("rate", ("1e-4", "3"), ("0", "-1", "nan", "inf", "x")),
            ("amount", ("0", "0.5"), ("-1", "nan", "inf", "x")),
            ("share", ("0", "0.99"), ("1", "-0.1", "nan", "x")),
        ],
    )
    def test_numbers(self, kind, good, bad):
        for text in good:
            assert getattr(recipe, kind)(text) == float(text)
        for text in bad:
            with pytest.raises(recipe.argparse.ArgumentTypeError, match=f"expected .* got '{text}'"):
                getattr(recipe, kind)(text)

    def test_begin(self, tmp_path):
        args = recipe.parser("A toy.", output=tmp_path / "new").parse_args([])
        recipe.begin(args, ["*.pt"])
        (args.output / "a.pt").touch()
        (args.output / "b.txt").touch()
        args.resume = True
        recipe.begin(args, ["a.pt"])
        assert (args.output / "a.pt").exists()
        with pytest.raises(ValueError, match="--resume must find a checkpoint in --output"):
            recipe.begin(args, ["c.pt"])
        args.resume = False
        recipe.begin(args, ["*.pt"])
        assert os.listdir(args.output) == ["b.txt"]
        args.output = tmp_path / "new" / "b.txt"
        with pytest.raises(OSError, match=r"b\.txt"):
            recipe.begin(args, ["*.pt"])

    def test_statuses(self, capsys):
        parser = recipe.parser("A toy.")

        def raising(error):
            raise error

        assert recipe.command(parser, lambda: None) == 0
        assert recipe.command(parser, lambda: raising(recipe.NotFinite("nan"))) == 1
        assert "stopped: nan" in capsys.readouterr().err
        assert recipe.command(parser, lambda: raising(KeyboardInterrupt())) == 130
        assert "--resume goes on" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            recipe.command(parser, lambda: raising(ValueError("--data must be there")))
        assert "error: --data must be there" in capsys.readouterr().err

    def test_table_and_curves(self, tmp_path, capsys):
        recipe.show("Title", ("method", "value"), [("lora", "1"), ("full", "22")])
        printed = capsys.readouterr().out
        assert "Title" in printed
        assert "│ lora   │     1 │" in printed
        recipe.curves(tmp_path / "new" / "losses.png", {"lora": [2.0, 1.0], "full": [3.0]}, "loss")
        assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
        assert os.listdir(tmp_path / "new") == ["losses.png"]
