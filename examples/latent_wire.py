"""LatentWire, stage 1: a language model reads its own embeddings, compressed by PCA and made again by an adapter.

    python examples/latent_wire.py --objective matched
    python examples/latent_wire.py --llm PATH --data questions.jsonl --compressed 512 --hidden 2048

Without --llm the program makes a small Llama and lets it learn the texts first, as a language model knows some; with
--llm-epochs 0 it stays random. The table holds prompts that the adapter has not seen in training: how near it comes to
their embeddings, and what the language model says after them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import recipe
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused.bench import thirdparty
from pyfused.models import LatentWire, left_padded_labels
from pyfused.models.latent_wire import OBJECTIVES

# Words of a prompt and of its answer, from scikit-learn's descriptions.
_PROMPT, _ANSWER = 8, 2
_HELD_OUT = 0.25
# Of the Llama that is made: as much as learns these texts by heart in seconds.
_VOCABULARY, _WIDTH, _LAYERS, _LLM_RATE = 512, 64, 2, 3e-3

Pairs = list[tuple[str, str]]
Tokens = Sequence[Sequence[int]]
Batch = tuple[Tensor, Tensor, Tensor]
# Embeddings and attention mask -> the embeddings that the language model reads in their place.
Way = Callable[[Tensor, Tensor], Tensor]


class Samples(NamedTuple):
    """Prompts and answers as tokens, in the same order, what ends an answer, and what a pad holds: nothing reads it."""

    prompts: Tokens
    answers: Tokens
    end: list[int]
    pad: int
    device: torch.device

    def batch(self, numbers: Sequence[int]) -> Batch:
        """input_ids, attention_mask and labels of these samples, their answers ended."""
        prompts = [self.prompts[number] for number in numbers]
        return left_padded_labels(
            prompts, [[*self.answers[number], *self.end] for number in numbers], self.pad, self.device
        )

    def asked(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask of their prompts alone."""
        # The last column stands for an answer.
        ids, mask, _ = left_padded_labels(
            [self.prompts[n] for n in numbers], [[0]] * len(numbers), self.pad, self.device
        )
        return ids[:, :-1], mask[:, :-1]


class Measured(NamedTuple):
    """Mean cosine of embeddings with the true ones, relative error of all together, and what was said after them."""

    cosine: float
    error: float
    said: Tokens


def options() -> argparse.ArgumentParser:
    made = recipe.parser(__doc__, epochs=40, batch_size=16, output=Path("runs/latent_wire"))
    made.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="what the adapter is trained on")
    made.add_argument(
        "--llm", type=Path, help="folder of a causal language model with its tokenizer; %(default)s: make one"
    )
    made.add_argument(
        "--llm-epochs", type=recipe.natural, default=24, help="in which a made language model learns the texts"
    )
    made.add_argument(
        "--data",
        default="descriptions",
        help='file with one {"prompt": ..., "answer": ...} a line; descriptions: of scikit-learn\'s data sets',
    )
    made.add_argument("--samples", type=recipe.positive, default=240, help="pairs of prompt and answer that are used")
    made.add_argument("--compressed", type=recipe.positive, default=16, help="components kept; 512 for a width of 4096")
    made.add_argument("--hidden", type=recipe.positive, default=256, help="the adapter's; 2048 for a width of 4096")
    made.add_argument("--dropout", type=recipe.share, default=0.1, help="the adapter's")
    made.add_argument("--answer-weight", type=recipe.amount, default=0.1, help="factor of the cross-entropy in matched")
    made.add_argument("--lr", type=recipe.rate, default=2e-3, help="highest learning rate")
    return made


# ---- texts and language model


def pairs_of(name: str, count: int, seed: int) -> Pairs:
    """``count`` pairs of prompt and answer, or as many as there are, in an order that the seed decides.

    Raises:
        ValueError: there is no such file, a line is no pair, or they are fewer than 8.
    """
    pairs = list(_descriptions() if name == "descriptions" else _lines(Path(name)))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    if len(order) < 8:
        raise ValueError(f"--data and --samples must give 8 pairs or more, got {len(order)}, of {len(pairs)} in {name}")
    return [pairs[number] for number in order.tolist()]


def _descriptions() -> Iterator[tuple[str, str]]:
    folder = resources.files(thirdparty.load("sklearn.datasets.descr"))
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        words = re.findall("[a-z]+", file.read_text(encoding="utf-8").lower()) if file.name.endswith(".rst") else []
        step = _PROMPT + _ANSWER
        for start in range(0, len(words) - step, step):
            window = words[start : start + step]
            yield " ".join(window[:_PROMPT]), " " + " ".join(window[_PROMPT:])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"--data must be descriptions or a file, got {str(path)!r}, which is no file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            pair = json.loads(line)
            prompt, answer = pair["prompt"], pair["answer"]
        except (ValueError, KeyError, TypeError) as error:
            pair = f"{type(error).__name__}: {error}"
            prompt = answer = None
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt and answer):
            raise ValueError(
                f'{path}, line {number}, must be {{"prompt": ..., "answer": ...}}, neither of them empty, got {pair}'
            )
        yield prompt, answer


def _transformers() -> Any:
    transformers = thirdparty.load("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def make_llm(folder: Path, pairs: Pairs, epochs: int, seed: int, device: torch.device) -> None:
    """A byte-level tokenizer of 512 tokens and a Llama of 2 layers that learned the answers, written to ``folder``."""
    transformers, tokenizers = _transformers(), thirdparty.load("tokenizers")
    bytes_of = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = bytes_of(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=bytes_of.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["".join(pair) for pair in pairs], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    llm = transformers.LlamaForCausalLM(config).to(device)
    samples = tokens_of(pairs, tokenizer, device)
    training = recipe.Training(
        llm,
        lambda batch: llm(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss,
        torch.optim.AdamW(llm.parameters(), _LLM_RATE),
        identity={},
    )
    training.run(lambda epoch: batches(samples, range(len(pairs)), 32, seed, epoch), epochs, "language model", 32)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_llm(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(language model, tokenizer) of a folder, in the dtype in which they are stored; nothing is fetched.

    Raises:
        ValueError: the folder is missing, or holds no causal language model with its tokenizer.
    """
    if not folder.is_dir():
        raise ValueError(f"--llm must be a folder that save_pretrained wrote, got {str(folder)!r}, which is no folder")
    transformers = _transformers()
    try:
        llm = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--llm must hold a causal language model and its tokenizer, got in {folder}: {error}"
        ) from error
    return llm.to(device), tokenizer


def tokens_of(pairs: Pairs, tokenizer: Any, device: torch.device) -> Samples:
    """Prompts with the tokens that the tokenizer begins a text with, answers without."""
    prompts, answers = zip(*pairs, strict=True)
    return Samples(
        tokenizer(list(prompts))["input_ids"],
        tokenizer(list(answers), add_special_tokens=False)["input_ids"],
        [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        tokenizer.pad_token_id or 0,
        device,
    )


def batches(samples: Samples, numbers: Sequence[int], size: int, seed: int, epoch: int) -> list[Batch]:
    """The batches of an epoch; a smaller rest is left."""
    order = recipe.shuffled(len(numbers), size, seed, epoch)
    return [samples.batch([numbers[place] for place in places.tolist()]) for places in order]


# ---- what is reported


def token_f1(said: Sequence[int], wanted: Sequence[int]) -> float:
    """SQuAD's F1 on tokens: the harmonic mean of precision and recall of what both hold, repeats counted."""
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else float(not said and not wanted)


@torch.no_grad()
def measured(system: LatentWire, samples: Samples, numbers: Sequence[int], size: int, way: Way) -> Measured:
    """What a ``way`` of making the embeddings of these prompts comes to."""
    llm = system.eval().language_model
    ends = llm.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    longest = 1 + max(len(samples.answers[number]) for number in numbers)
    cosines, errors, norms, said = [], 0.0, 0.0, []
    for start in range(0, len(numbers), size):
        ids, mask = samples.asked(numbers[start : start + size])
        embeddings = system.embed(ids)
        made = way(embeddings, mask).to(embeddings.dtype)
        own, others = embeddings[mask.bool()].float(), made[mask.bool()].float()
        cosines.append(F.cosine_similarity(others, own))
        errors += (others - own).square().sum().item()
        norms += own.square().sum().item()
        tokens = llm.generate(
            inputs_embeds=made, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=samples.pad
        )
        said += [list(itertools.takewhile(lambda token: token not in ends, row)) for row in tokens.tolist()]
    return Measured(torch.cat(cosines).mean().item(), (errors / norms) ** 0.5, said)


def report(title: str, results: Mapping[str, Measured], answers: Tokens) -> None:
    """The table of all ways, the first of which is the language model's own embeddings."""
    as_text = next(iter(results.values())).said
    rows = []
    for name, (cosine, error, said) in results.items():
        agreed = (statistics.mean(map(token_f1, said, wanted)) for wanted in (answers, as_text))
        rows.append((name, f"{cosine:.4f}", f"{error:.4f}", *(f"{f1:.3f}" for f1 in agreed)))
    recipe.show(title, ("what it reads", "cosine", "relative error", "F1, answers", "F1, what text gives"), rows)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Everything that the options ask for.

    Raises:
        ValueError: the data, the language model or the checkpoint is not what the options say.
        recipe.NotFinite: a number of the training is NaN or infinite.
    """
    checkpoint = args.output / "latent_wire.pt"
    recipe.begin(args, [checkpoint.name])
    pairs = pairs_of(args.data, args.samples, args.seed)
    folder = args.llm or args.output / "llm"
    if args.llm is None and not args.resume:
        make_llm(folder, pairs, args.llm_epochs, args.seed, device)
    llm, tokenizer = load_llm(folder, device)
    samples = tokens_of(pairs, tokenizer, device)
    held = round(_HELD_OUT * len(pairs))
    held_out, seen = range(held), range(held, len(pairs))
    torch.manual_seed(args.seed)
    system = LatentWire(llm, args.compressed, args.hidden, args.objective, args.dropout, args.answer_weight)
    system.fit_compressor(samples.asked(seen[start : start + 64]) for start in range(0, len(seen), 64))
    optimizer = torch.optim.AdamW(system.adapter.parameters(), args.lr)
    steps = args.epochs * len(recipe.shuffled(len(seen), args.batch_size, args.seed))
    # Which language model it is say its embeddings, wherever it lies.
    weight = llm.get_input_embeddings().weight.detach().float().cpu()
    training = recipe.Training(
        system,
        lambda batch: system(*batch),
        optimizer,
        {"recipe": "latent_wire", "llm": hashlib.sha256(weight.numpy().tobytes()).hexdigest()}
        | recipe.settings(args, "llm"),
        recipe.warm_cosine(optimizer, steps // 10, steps),
        precision=args.precision,
        checkpoint=checkpoint,
    )
    pca, ask = system.compressor, functools.partial(measured, system, samples, held_out, args.batch_size)
    results = {
        "its own embeddings": ask(lambda e, mask: e),
        "PCA and back": ask(lambda e, mask: pca.inverse_transform(pca.transform(e))),
        "adapter, at its start": ask(system.reconstruct),
    }
    if args.resume:
        training.resume()
    training.run(
        lambda epoch: batches(samples, seen, args.batch_size, args.seed, epoch),
        args.epochs,
        args.objective,
        args.batch_size,
    )
    results["adapter, trained"] = ask(system.reconstruct)
    report(
        f"LatentWire, {args.objective}: {args.compressed} of {system.adapter.embedding} components, "
        f"{pca.explained_variance_ratio_.sum():.1%} of the variance; "
        f"{sum(p.numel() for p in system.adapter.parameters()):,} parameters; "
        + (f"{training.step_ms:.1f} ms a step; " if training.seconds else "")
        + f"{len(held_out)} prompts held out",
        results,
        [samples.answers[number] for number in held_out],
    )
    recipe.curves(args.output / "latent_wire.png", {args.objective: training.losses}, "loss")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these options; 0, or 1 where the training stopped."""
    parser = options()
    args = parser.parse_args(argv)
    device = recipe.device_of(parser, args.device)
    return recipe.command(parser, lambda: train(args, device))


if __name__ == "__main__":
    raise SystemExit(main())
