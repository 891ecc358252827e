"""The command ``pyfused``. Its ``info`` and a plain ``check`` need torch alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pyfused
from pyfused import installation
from pyfused.choice import backends, cache, measured, order

# Module -> distribution: without these `pyfused bench` does not start; every other package costs its own rows only.
_BENCH_NEEDS = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "rich": "rich"}
_REPORT_NEEDS = {"jinja2": "jinja2", "matplotlib": "matplotlib", "rich": "rich"}
_TUNE_NEEDS = {"triton": "triton", "rich": "rich"}
_COMPLETION_NEEDS = {"shtab": "shtab"}
# Argument of `formats.convert` -> of the command.
_CONVERT_ARGUMENTS = {
    "source": "SRC", "target": "DST", "from_format": "--from", "to_format": "--to", "like": "--like",
    "order": "--order",
}  # fmt: skip
_SHELLS = ("bash", "zsh", "fish", "tcsh")
# Exit status -> what every command says by it; then what one command says by others.
STATUSES = {0: "all is well", 2: "a wrong argument, a missing package or file, or an interruption"}
OWN_STATUSES = {
    "check": {1: "a result is further from float64 than its limit"},
    "bench": {
        1: "a row failed parity, or a contender raised an error",
        6: "this process can measure no more; the same --record goes on",
    },
    "doctor": {1: "something is wrong; the lines before the verdict say what"},
}
# Command -> how long it takes.
_TAKES = {
    "info": "seconds",
    "doctor": "seconds; longer on a GPU, where Triton compiles",
    "check": "minutes; each line is printed when it is known",
    "bench": "an hour or so for all rows, minutes for a few",
    "tune": "at most --seconds; --show minutes for each case",
    "report": "seconds",
    "convert": "seconds, by the size of the files",
    "completion": "seconds; a completion itself starts no Python",
}
# Command -> what a user types.
EXAMPLES = {
    "info": ("pyfused info", "pyfused info --json"),
    "doctor": ("pyfused doctor", "pyfused doctor --json > doctor.json"),
    "check": (
        "pyfused check",
        "pyfused check -k lora_linear -k T2",
        "pyfused check --device cpu --json > check.json",
        "pyfused check gradient-ratio",
    ),
    "bench": ("pyfused bench", "pyfused bench --list", "pyfused bench -k '400x768->768 r16' --seconds 1"),
    "tune": ("pyfused tune -k lora_linear --seconds 600", "pyfused tune --show 9.0 -k adapter", "pyfused tune --list"),
    "report": ("pyfused report RECORD", "pyfused report RECORD_BEFORE RECORD --output page"),
    "convert": (
        "pyfused convert adapter tuned --from peft --to pyfused",
        "pyfused convert tuned new.pth --from pyfused --to fastvit-fork --like old.pth",
    ),
    "completion": (
        "pyfused completion bash > ~/.local/share/bash-completion/completions/pyfused",
        "pyfused completion fish > ~/.config/fish/completions/pyfused.fish",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None (the default) takes the process's own.

    Returns:
        The exit status, as `STATUSES` and `OWN_STATUSES` have it.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.function(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 2
    except BrokenPipeError:
        # Who read it has gone, `head` say; what Python would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        # A full disk, a folder that may not be written to.
        print(f"pyfused {arguments.command}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from pyfused.integrations import formats

    parser = argparse.ArgumentParser(prog="pyfused", description=pyfused.__doc__)
    parser.add_argument("--version", action="version", version=f"pyfused {pyfused.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    info = commands.add_parser("info", help="versions, devices, and each backend with the reason if it is missing")
    info.set_defaults(function=_info)

    doctor = commands.add_parser(
        "doctor", help="info, a short check, the environment and what was tuned: what belongs in the report of a fault"
    )
    doctor.set_defaults(function=_doctor)

    check = commands.add_parser("check", help="compare every backend here with float64, at the benchmarks' shapes")
    check.set_defaults(function=_check)
    check.add_argument(
        "what", nargs="?", choices=("gradient-ratio",), metavar="gradient-ratio",
        help="instead: what cross-attention does to an adapter's gradient, on a small random AA-CLIP (needs open_clip)",
    )  # fmt: skip

    bench = commands.add_parser("bench", help="parity, time and memory against plain torch, torch.compile and PEFT")
    bench.set_defaults(function=_bench)
    bench.add_argument("paths", nargs="*", help="files or directories with rows of your own (pytest files)")
    bench.add_argument(
        "--targets", action="store_true", help="print also which of the project's own numbers to reach are met"
    )
    bench.add_argument("--output", type=Path, metavar="DIRECTORY", help="where <device>/<date>/ is made")
    bench.add_argument(
        "--record", type=Path, metavar="DIRECTORY",
        help="instead: the very directory for the results; a row that is there is not measured again, unless it failed",
    )  # fmt: skip
    bench.add_argument(
        "--seconds", type=_positive_seconds, default=4.0, help="how long each row is timed (default 4)"
    )  # fmt: skip
    bench.add_argument(
        "--attempts", type=_positive, default=2, metavar="N", help="how often a noisy row is timed at most (default 2)"
    )
    bench.add_argument("--commit", metavar="HASH", help="the commit to record where the checkout has no .git")

    tune = commands.add_parser("tune", help="time launch configurations and backends on this GPU, and keep the fastest")
    tune.set_defaults(function=_tune)
    tune.add_argument("-k", dest="select", metavar="TEXT", default="", help="only cases whose names contain this")
    tune.add_argument("--seconds", type=_positive_seconds, default=900.0, help="time for all of it (default 900)")
    tune.add_argument(
        "--output", type=Path, metavar="FILE", default=measured.PATH, help="default: what the kernels read"
    )
    tune.add_argument("--commit", metavar="HASH", help="the commit to record where the checkout has no .git")
    tune.add_argument("--device", type=_device, default=_default_device(), help="cuda or cuda:N")
    tune.add_argument(
        "--show", type=_capability, metavar="CAPABILITY",
        help="compile what would be tried on a GPU of this compute capability, such as 9.0; no GPU is needed",
    )  # fmt: skip
    own = tune.add_mutually_exclusive_group()
    own.add_argument("--list", action="store_true", help="instead: show what pyfused.tune has kept for you")
    own.add_argument("--clear", action="store_true", help="instead: remove what pyfused.tune has kept for you")
    tune.add_argument("--json", action="store_true", help="with --list: as JSON, alone on stdout")

    report = commands.add_parser("report", help="an HTML page with figures on one record of `bench`, or on several")
    report.set_defaults(function=_report)
    report.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS",
        help="directories that `bench` made, or their rows.json; the last is shown, and compared with those before it",
    )  # fmt: skip
    report.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="where index.html goes (default: report/ in the last record)"
    )

    convert = commands.add_parser("convert", help="write what was tuned in another package's format")
    convert.set_defaults(function=_convert)
    convert.add_argument("source", type=Path, metavar="SRC", help="what is read")
    convert.add_argument("target", type=Path, metavar="DST", help="what is written, whole or not at all")
    convert.add_argument("--from", dest="from_format", choices=formats.FORMATS, required=True, help="the format of SRC")
    convert.add_argument("--to", dest="to_format", choices=formats.FORMATS, required=True, help="the format of DST")
    convert.add_argument(
        "--like", type=Path, metavar="PATH",
        help=f"one in the format of DST, for {' and '.join(formats.LIKE)}: what was not tuned is taken from it",
    )  # fmt: skip
    convert.add_argument(
        "--order", choices=formats.ORDERS,
        help="of fastvit-fork, which its files do not say: adapter before the layer-scale (right) or behind (broken)",
    )  # fmt: skip

    completion = commands.add_parser("completion", help="a script by which a shell completes this command")
    completion.set_defaults(function=_completion)
    completion.add_argument("shell", choices=_SHELLS)

    for command in (info, doctor, check):
        command.add_argument("--json", action="store_true", help="as JSON, alone on stdout")
    for command in (check, bench):
        command.add_argument(
            "-k", dest="select", metavar="TEXT", action="append", default=[],
            help="only what has this text in a name that --list prints, capitals aside; several: any of them",
        )  # fmt: skip
        command.add_argument("--list", action="store_true", help="instead: print the names, and compute nothing")
        command.add_argument("--device", type=_device, default=_default_device(), help="cpu, cuda or cuda:N")
        command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own number)")

    notes = {
        "bench": "The rows are JSON: rows.json in the directory that the last line names.",
        "tune": "--output is JSON. For a model of yours, on a CPU too: pyfused.tune(model, ...).",
        "convert": "\n".join(["formats:", *(f"  {name:14s}{what}" for name, what in formats.FORMATS.items())]),
    }
    for name, command in commands.choices.items():
        examples = "\n".join(["examples:", *(f"  {example}" for example in EXAMPLES[name])])
        statuses = _statuses((STATUSES | OWN_STATUSES.get(name, {})).items())
        _end_help(command, notes.get(name), examples, f"takes: {_TAKES[name]}", statuses)
    more = [(status, f"{name}: {what}") for name, own in OWN_STATUSES.items() for status, what in own.items()]
    _end_help(parser, "pyfused COMMAND --help has examples.", _statuses([*STATUSES.items(), *more]))
    return parser


def _end_help(parser: argparse.ArgumentParser, *paragraphs: str | None) -> None:
    """Puts paragraphs below a parser's help, in the lines that they have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = textwrap.fill(parser.description or "", 78)
    parser.epilog = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _statuses(pairs: Iterable[tuple[int, str]]) -> str:
    by_number = sorted(pairs, key=lambda pair: pair[0])
    return "\n".join(["exit status:", *(f"  {status}  {what}" for status, what in by_number)])


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not major.isdecimal() or not minor.isdecimal():
        raise argparse.ArgumentTypeError(f"expected major.minor, such as 9.0, got {text!r}")
    return int(major), int(minor)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def _info(arguments: argparse.Namespace) -> int:
    found = installation.facts()
    print(_as_json(found) if arguments.json else "\n".join(installation.told(found)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    found = installation.without_home(installation.examined())
    print(_as_json(found) if arguments.json else "\n".join(installation.diagnosis(found)))
    return 1 if found["problems"] else 0


def _as_json(value: object) -> str:
    # JSON has no NaN and no infinity.
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=1)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.what is None:
        from pyfused.bench.run import check

        return _with_rows(
            arguments.json,
            lambda rows: check.run(
                arguments.device, arguments.threads, arguments.select, arguments.list, on_row=rows.append
            ),
        )
    if arguments.select or arguments.list:
        print("pyfused check: -k and --list are about the cases; gradient-ratio has none", file=sys.stderr)
        return 2
    from pyfused.bench import thirdparty
    from pyfused.bench.models import gradient_ratio

    def ratios(rows: list[dict[str, Any]]) -> int:
        def on_row(name: str, row: pyfused.diagnostics.GradientRatio) -> None:
            rows.append({"of": name} | asdict(row) | {"ratio": row.ratio, "verdict": row.verdict})

        return gradient_ratio.run(arguments.device, arguments.threads, on_row)

    try:
        return _with_rows(arguments.json, ratios)
    except thirdparty.Unavailable as error:
        print(f"pyfused check gradient-ratio: {error}", file=sys.stderr)
        return 2


def _with_rows(as_json: bool, run: Callable[[list[dict[str, Any]]], int]) -> int:
    """``run``, which is given a list for its rows. ``as_json``: what it prints goes to stderr, the rows to stdout."""
    rows: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        status = run(rows)
    if as_json and status != 2:
        print(_as_json({"rows": rows}))
    return status


def _completion(arguments: argparse.Namespace) -> int:
    if _lacks("completion", _COMPLETION_NEEDS, extras="cli"):
        return 2
    import shtab

    parser = _parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.type is Path:
                # shtab reads it from here.
                action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from pyfused.integrations import formats

    try:
        notes = formats.convert(
            arguments.source, arguments.target, arguments.from_format, arguments.to_format, arguments.like,
            arguments.order,
        )  # fmt: skip
    except (ImportError, TypeError, ValueError) as error:
        # Its arguments as they are typed here.
        told = re.sub(r"(?<=^convert: )\w+", lambda found: _CONVERT_ARGUMENTS.get(found[0], found[0]), str(error))
        print(f"pyfused {told}", file=sys.stderr)
        return 2
    print(f"written: {arguments.target}", *(f"         {note}" for note in notes), sep="\n")
    return 0


def _lacks(command: str, needs: dict[str, str], extras: str = "bench") -> bool:
    """Whether a package is missing without which ``command`` does not start; says which."""
    missing = [name for module, name in needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f'pyfused {command} needs {", ".join(missing)}; pip install "pyfused[{extras}]" brings all it uses',
            file=sys.stderr,
        )
    return bool(missing)


def _report(arguments: argparse.Namespace) -> int:
    if _lacks("report", _REPORT_NEEDS):
        return 2
    from pyfused.bench.record import records
    from pyfused.bench.show import page

    try:
        found = [records.load(path) for path in arguments.results]
    except records.Unreadable as error:
        print(f"pyfused report: {error}", file=sys.stderr)
        return 2
    directory = found[-1].path.parent / "report" if arguments.output is None else arguments.output
    if directory.exists() and not directory.is_dir():
        print(f"pyfused report: --output must be a directory, got {str(directory)!r}", file=sys.stderr)
        return 2
    from rich.console import Console

    # On a terminal alone.
    with Console(stderr=True).status("drawing the figures"):
        written = page.write(found, directory)
    print(f"written: {written[0]}", f"         and {len(written) - 1} figures beside it", sep="\n")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    if _lacks("bench", _BENCH_NEEDS):
        return 2
    for path in arguments.paths:
        if not Path(path.partition("::")[0]).exists():
            print(f"pyfused bench: paths must exist, got {path!r}", file=sys.stderr)
            return 2
    from pyfused.bench.run.command import run
    from pyfused.bench.run.session import Settings

    settings = Settings(
        device=arguments.device, output=arguments.output, threads=arguments.threads, seconds_per_row=arguments.seconds,
        commit=arguments.commit, record=arguments.record, attempts=arguments.attempts, targets=arguments.targets,
    )  # fmt: skip
    return run(settings, arguments.select, arguments.paths, arguments.list)


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.list:
        print("pyfused tune: --json must come with --list, got it alone", file=sys.stderr)
        return 2
    if arguments.list:
        return _list_kept(arguments.json)
    if arguments.clear:
        removed = cache.clear()
        print(f"nothing is kept in {cache.path()}" if removed is None else f"removed: {removed}")
        return 0
    if _lacks("tune", _TUNE_NEEDS, extras="triton,bench"):
        return 2
    if arguments.show is None and arguments.device.type != "cuda":
        print("pyfused tune: torch sees no CUDA device to measure on; --show 9.0 compiles without one", file=sys.stderr)
        return 2
    from pyfused.bench.tune import command as tune

    if arguments.show is not None:
        from pyfused.kernels.recording import SHARED_MEMORY

        if arguments.show not in SHARED_MEMORY:
            known, given = (", ".join(f"{a}.{b}" for a, b in some) for some in (SHARED_MEMORY, [arguments.show]))
            print(f"pyfused tune: --show must be one of {known}, got {given}", file=sys.stderr)
            return 2
        return tune.show(arguments.show, arguments.select)
    return tune.run(arguments.device, arguments.seconds, arguments.select, arguments.output, arguments.commit)


def _list_kept(as_json: bool) -> int:
    place = cache.path()
    try:
        sections = [] if place is None else cache.read(place)
    except ValueError as error:
        print(f"pyfused tune: {error}", file=sys.stderr)
        return 2
    if as_json:
        kept = [
            {"key": asdict(each.key), "read": each.key == cache.key(), "rows": [*map(measured.as_item, each.rows)]}
            for each in sections
        ]
        print(_as_json({"path": None if place is None else str(place), "sections": kept}))
        return 0
    if not sections:
        print(f"nothing is kept in {place}")
        return 0
    print(place)
    for section in sections:
        print(f"\n{section.key}{'' if section.key == cache.key() else ': not read by what is installed here'}")
        for row in section.rows:
            sizes = ", ".join(f"{name} = {size}" for name, size in ({"M": row.rows} | row.sizes).items())
            print(f"  {row.gpu}: {row.subject}, {row.dtype}, {sizes}")
            # A kernel's row has its configuration where an operator's has times.
            found = order.told_row(row) if set(row.found) <= set(backends.BACKENDS) else f"launched with {row.found}"
            gain, own = row.source.get("gain", 1.0), row.source.get("untuned", "the configuration that ships")
            print(f"    {found}; {own} takes {gain} times as long" if gain != 1.0 else f"    {found}; as without it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
