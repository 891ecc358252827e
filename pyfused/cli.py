"""The command ``pyfused``. Its ``info`` and a plain ``check`` need torch alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

import pyfused
from pyfused.choice import backends, cache, measured, order

# Distribution -> why somebody would want it.
_OPTIONAL = {
    "triton": "the triton backend",
    "peft": "a baseline of the benchmarks",
    "safetensors": "files of what was tuned",
    "open_clip_torch": "the models of the benchmarks",
    "timm": "models",
}
# Module -> distribution: without these `pyfused bench` does not start; every other package costs its own rows only.
_BENCH_NEEDS = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "rich": "rich"}
_REPORT_NEEDS = {"jinja2": "jinja2", "matplotlib": "matplotlib", "rich": "rich"}
_TUNE_NEEDS = {"triton": "triton", "rich": "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None (the default) takes the process's own.

    Returns:
        The exit status: 0 when all is well, 1 when a row failed, 2 for wrong arguments or an interruption.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except KeyboardInterrupt:
        return 2
    except OSError as error:
        # A full disk, a folder that may not be written to.
        print(f"pyfused {arguments.command}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyfused", description=pyfused.__doc__)
    parser.add_argument("--version", action="version", version=f"pyfused {pyfused.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    info = commands.add_parser("info", help="versions, devices, and each backend with the reason if it is missing")
    info.set_defaults(function=_info)

    check = commands.add_parser("check", help="compare every backend here with float64, at the benchmarks' shapes")
    check.set_defaults(function=_check)
    check.add_argument(
        "what", nargs="?", choices=("gradient-ratio",),
        help="instead: what cross-attention does to an adapter's gradient, on a small random AA-CLIP (needs open_clip)",
    )  # fmt: skip

    bench = commands.add_parser("bench", help="parity, time and memory against plain torch, torch.compile and PEFT")
    bench.set_defaults(function=_bench)
    bench.add_argument("paths", nargs="*", help="files or directories with rows of your own (pytest files)")
    bench.add_argument("-k", dest="select", metavar="EXPRESSION", help="only rows with these names, as pytest's -k")
    bench.add_argument("--output", type=Path, metavar="DIRECTORY", help="where <device>/<date>/ is made")
    bench.add_argument(
        "--record", type=Path, metavar="DIRECTORY",
        help="instead: the very directory for the results; a row that is there is not measured again, unless it failed",
    )  # fmt: skip
    bench.add_argument(
        "--seconds", type=_positive_seconds, default=4.0, help="how long each row is timed (default 4)"
    )  # fmt: skip
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

    report = commands.add_parser("report", help="an HTML page with figures on one record of `bench`, or on several")
    report.set_defaults(function=_report)
    report.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS",
        help="directories that `bench` made, or their rows.json; the last is shown, and compared with those before it",
    )  # fmt: skip
    report.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="where index.html goes (default: report/ in the last record)"
    )

    from pyfused.integrations import formats

    convert = commands.add_parser(
        "convert", help="write what was tuned in another package's format",
        epilog="; ".join(f"{name}: {what}" for name, what in formats.FORMATS.items()),
    )  # fmt: skip
    convert.set_defaults(function=_convert)
    convert.add_argument("source", metavar="SRC", help="what is read")
    convert.add_argument("target", metavar="DST", help="what is written, whole or not at all")
    convert.add_argument("--from", dest="from_format", choices=formats.FORMATS, required=True, help="the format of SRC")
    convert.add_argument("--to", dest="to_format", choices=formats.FORMATS, required=True, help="the format of DST")
    convert.add_argument(
        "--like", metavar="PATH",
        help=f"one in the format of DST, for {' and '.join(formats.LIKE)}: what was not tuned is taken from it",
    )  # fmt: skip
    convert.add_argument(
        "--order", choices=formats.ORDERS,
        help="of fastvit-fork, which its files do not say: adapter before the layer-scale (right) or behind (broken)",
    )  # fmt: skip

    for command in (check, bench):
        command.add_argument("--device", type=_device, default=_default_device(), help="cpu, cuda or cuda:N")
        command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own number)")
    return parser


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
    print("\n".join(f"{name:14s}{value}" for name, value in _facts()))
    print("\nbackends")
    for name, reason in pyfused.available_backends().items():
        print(f"  {name:10s}{'available' if reason is None else f'not available: {reason}'}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    yield "pyfused", f"{pyfused.__version__} ({Path(pyfused.__file__).parent})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    if not torch.cuda.is_available():
        yield "device", "cpu: torch sees no CUDA device"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{properties.name}, capability {properties.major}.{properties.minor}, {memory}"
    if "pyfused._C" in sys.modules:
        library = sys.modules["pyfused._C"]
        built = json.loads(library.build_info())
        kernels = f"{len(library.kernel_names())} kernels by nvcc {built['nvcc']} for {', '.join(built['targets'])}"
        yield "pyfused._C", f"{kernels}, beside torch {built['torch']}"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            yield f"  cuda:{index}", _how_kernels_run(torch.device("cuda", index), built["targets"])
    if backends.CPU_REFUSAL is None:
        built = backends.cpu_build_info()
        sets = f"{backends.cpu_instruction_set()} of {', '.join(built['sets'])}"
        yield "pyfused._cpu", f"{sets}, by {built['compiler']}, beside torch {built['torch']}"
    for distribution, purpose in _OPTIONAL.items():
        yield distribution.removesuffix("_torch"), _version(distribution) or f"not installed ({purpose})"


def _how_kernels_run(device: torch.device, targets: Sequence[str]) -> str:
    """Which of the library's ``targets`` a GPU runs, or why none."""
    reason = backends.refusal("cuda", device, torch.float16)
    if reason is not None:
        return f"does not run: {reason}"
    code = backends.code_for(torch.cuda.get_device_capability(device), targets)
    if code is not None and code.startswith("sm_"):
        return f"runs {code}"
    # docs/measured.md has what ptxas takes for each module.
    return (
        f"runs what its driver compiles from {code}: the first forward and the first backward of an operator wait for "
        "it, up to about a minute each, once for each user"
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _check(arguments: argparse.Namespace) -> int:
    if arguments.what is None:
        from pyfused.bench.run import check

        return check.run(arguments.device, arguments.threads)
    from pyfused.bench import thirdparty
    from pyfused.bench.models import gradient_ratio

    try:
        return gradient_ratio.run(arguments.device, arguments.threads)
    except thirdparty.Unavailable as error:
        print(f"pyfused check gradient-ratio: {error}", file=sys.stderr)
        return 2


def _convert(arguments: argparse.Namespace) -> int:
    from pyfused.integrations import formats

    try:
        notes = formats.convert(
            arguments.source, arguments.target, arguments.from_format, arguments.to_format, arguments.like,
            arguments.order,
        )  # fmt: skip
    except (ImportError, TypeError, ValueError) as error:
        print(f"pyfused {error}", file=sys.stderr)
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
        arguments.device, arguments.output, arguments.threads, arguments.seconds, arguments.commit, arguments.record
    )  # fmt: skip
    return run(settings, arguments.select, arguments.paths)


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list_kept()
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


def _list_kept() -> int:
    place = cache.path()
    try:
        sections = [] if place is None else cache.read(place)
    except ValueError as error:
        print(f"pyfused tune: {error}", file=sys.stderr)
        return 2
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
