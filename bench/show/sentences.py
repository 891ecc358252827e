"""What a record says, in sentences: what is faster than what and by how much, what is slower, memory, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pyfused.bench.record.records import LOSS, Comparison, Record
from pyfused.bench.record.rows import Row
from pyfused.bench.show import figures, style, tables
from pyfused.bench.show.terminal import noise_text, time_text

# Kind of row -> the title of its part of a page, in order; an operator's rows have the operator's name.
KINDS = {"model": "Models", "training": "Training runs", "overhead": "Host overhead", "machine": "Machine",
         "traffic": "DRAM traffic"}  # fmt: skip
# Title -> why its numbers are what they are, on any device and then on a CPU. The reasons are those of
# docs/decisions.md; no GPU has been measured.
_WHY = {
    "lora_linear": (
        "",
        "On a CPU a float32 layer is bound by arithmetic. Time is gained mostly from the library behind the products: "
        "oneDNN, where MKL leaves AVX-512 unused. Memory is saved because the low-rank term is added to y in place.",
    ),
    "adapter_residual": (
        "",
        "What there is to gain on a CPU is fewer passes over memory. It is least for images as small as 7x7, where the "
        "products take most of the time. The scratch of each thread counts as memory, which shows where an image is "
        "small.",
    ),
    "cross_attention_residual": (
        "To a short context the mathematics saves work: the query projection is moved onto the keys, and the output "
        "projection onto the values. To a long one pyfused takes scaled_dot_product_attention, as projections + SDPA "
        "do.",
        "",
    ),
    "projection_residual": (
        "",
        "What follows the product is bound by passes over memory. On a CPU pyfused writes it block by block to memory "
        "that is there already; C++ kernels for it there are none.",
    ),
    "Models": (
        "In a model the operators are a part of a step. All else is the same PyTorch for every contender.",
        "On a CPU the adapters of fastvit_sa12 are so small a part that its row differs between runs by more than what "
        "it is to show.",
    ),
    "Training runs": ("These models are small: the runs are there for their losses.", ""),
    "Host overhead": (
        "A call checks its arguments and chooses a backend and a plan; what was decided is kept for equal calls. What "
        "is left is mostly Python, of an autograd function and of a launch. It shows where there is next to nothing to "
        "compute.",
        "",
    ),
}
_MEASURED = {"forward": "Forward alone", "forward+backward": "Forward and backward", "training step": "A training step"}

# Modes that are the only one there, or that the title says.
_OF_COURSE = ("wall clock", "host time")


@dataclass
class Finding:
    """What is found in the rows of one title.

    Attributes:
        title: of an operator, or of a kind of rows.
        said: sentences.
        lists: heading -> rows that lose to a baseline in time or in memory and by how much, the worst first.
        failed: rows that failed parity, and what broke.
        why: sentences that hold for every record.
    """

    title: str
    said: list[str] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by operator, then models, training runs, host overhead, the machine and DRAM traffic: title -> rows."""
    found: dict[str, list[Row]] = {}
    kinds: dict[str, list[Row]] = {title: [] for title in KINDS.values()}
    for row in rows:
        if row.kind in KINDS:
            kinds[KINDS[row.kind]].append(row)
        else:
            found.setdefault(row.name.partition(" ")[0], []).append(row)
    return found | {title: own for title, own in kinds.items() if own}


def lead(record: Record, comparisons: Sequence[Comparison]) -> list[str]:
    """What holds for the whole record, and against older ones."""
    said = []
    compared = [row for row in record.of("operator", "model") if style.baselines(row)]
    if compared:
        least = [round(min(style.baselines(row).values()), 2) for row in compared]
        counts = {
            "faster than every baseline": sum(ratio > 1 for ratio in least),
            "as fast as the fastest baseline": sum(ratio == 1 for ratio in least),
            "slower than a baseline": sum(ratio < 1 for ratio in least),
        }
        facts = record.provenance
        device = facts.get("device", "an unknown device")
        threads = f" with {_count(facts['threads'], 'thread')}" if "threads" in facts else ""
        of = _count(len(compared), "row")
        how = _listed([f"{what} in {count}" for what, count in counts.items() if count])
        said.append(f"On {device}{threads}, of {of} of operators and models pyfused is {how}.")
        said.append(
            "Where it is 1.20x as fast as a baseline, the baseline takes 1.20 times as long, in the median over rounds "
            "that take turns."
        )
    noise = noise_text(record.rows)
    if noise:
        said.append(noise)
    held = sum(row.passed and bool(row.parity) for row in record.rows)
    if held:
        said.append(f"Against float64 the errors of {_count(held, 'row')} are within their limits.")
    failed = sum(not row.passed for row in record.rows)
    if failed:
        said.append(f"The errors of {_count(failed, 'row')} are not; such a row has no times.")
    for comparison in comparisons:
        old = comparison.old.path.parent.name
        if comparison.differences:
            said.append(f"{old} is of another machine: nothing is judged against it.")
        else:
            worse, better = (len(tables.judged(comparison, verdict)) for verdict in ("worse", "better"))
            said.append(
                f"Against {old}, by {100 * LOSS:g} % or more: {_count(worse, 'figure')} worse, {better} better."
            )
    return said


def finding(title: str, rows: Sequence[Row]) -> Finding:
    """The sentences on the rows of one title, which are not the machine's own."""
    found = Finding(title)
    found.failed = [
        f"{row.name}, {row.measured_how}: {'; '.join(tables.broken(row))}" for row in rows if not row.passed
    ]
    compared = [row for row in rows if style.baselines(row)]
    if not compared:
        found.said.append("No row has the times of pyfused and of a baseline.")
    # Forward with backward is what a training step does: it comes first.
    parts = sorted(style.panels(compared).values(), key=lambda own: "backward" not in own[0].measured)
    if title == KINDS["overhead"]:
        found.said += [
            f"{_measured(own, 'small call')}: pyfused takes the host {_times(own)}, {_ranges(own, _slowness, _TIME)}."
            for own in parts
        ]
        _list(found, "Longer than a baseline", compared, _slowness, _TIME)
    else:
        found.said += [f"{_measured(own)}: pyfused is {_ranges(own, style.baselines, _SPEED)}." for own in parts]
        _list(found, "Slower than a baseline", compared, _slowness, _SPEED)
    if compared and not found.lists:
        found.said.append("No row is slower than a baseline.")
    # Of one call, launched from Python or replayed, the memory is the same.
    held = list({(row.name, row.measured): row for row in reversed(rows) if _memory(row)}.values())[::-1]
    if held:
        found.said.append(f"At its peak pyfused holds {_ranges(held, _memory, _MEMORY)}.")
        _list(found, "More memory than a baseline", held, _memory, _MEMORY)
    found.said += [_losses(row) for row in rows if row.kind == "training" and row.loss]
    missing = Counter(pair for row in rows for pair in row.unavailable.items() if not pair[0].startswith("pyfused"))
    found.said += [
        f"{style.spoken(name)} was not measured in {count} of {_count(len(rows), 'row')}: {reason}."
        for (name, reason), count in missing.items()
    ]
    if compared:
        always, on_a_cpu = _WHY.get(title, ("", ""))
        found.why = [why for why in (always, on_a_cpu if _on_a_cpu(rows[0]) else "") if why]
    return found


# What is said of one number that stands against a baseline.
_SPEED, _TIME, _MEMORY = "{}x as fast as {}", "{}x the time of {}", "{}x the memory of {}"
_Costs = Callable[[Row], dict[str, float]]


def _slowness(row: Row) -> dict[str, float]:
    """Baseline -> pyfused's time over its own."""
    return {name: 1 / ratio for name, ratio in style.baselines(row).items()}


def _memory(row: Row) -> dict[str, float]:
    """Baseline -> pyfused's peak over its own."""
    peaks, own = row.peak_bytes, row.peak_bytes.get(row.subject)
    return {} if own is None else {name: own / peaks[name] for name in style.baselines(row) if peaks.get(name)}


def _ranges(rows: Sequence[Row], values: _Costs, words: str) -> str:
    """For each baseline the least and the greatest value, and in how many of the rows where that is not all."""
    found: dict[str, list[float]] = {}
    for name in style.contenders(rows, "ratios"):
        own = [value for row in rows for other, value in values(row).items() if other == name]
        found.setdefault(style.spoken(name), []).extend(own)
    said = []
    for name, own in found.items():
        if not own:
            continue
        ends = dict.fromkeys(f"{value:.2f}" for value in (min(own), max(own)))
        few = f" (in {len(own)} of {len(rows)})" if len(own) < len(rows) else ""
        said.append(words.format("x to ".join(ends), name) + few)
    return _listed(said)


def _list(found: Finding, heading: str, rows: Sequence[Row], costs: _Costs, words: str) -> None:
    """Adds the rows in which pyfused costs more than a baseline, to two digits."""
    lines = []
    for row in rows:
        worse = {name: cost for name, cost in costs(row).items() if round(1 / cost, 2) < 1}
        if worse:
            said = [
                words.format(f"{1 / cost if words == _SPEED else cost:.2f}", style.spoken(name))
                for name, cost in worse.items()
            ]
            lines.append((max(worse.values()), f"{style.short_name(row)}, {_how(row)}: {_listed(said)}"))
    if lines:
        ordered = [line for _, line in sorted(lines, key=lambda line: -line[0])]
        found.lists[f"{heading}, {len(lines)} of {_count(len(rows), 'row')}"] = ordered


def _measured(rows: Sequence[Row], unit: str = "row") -> str:
    first = rows[0]
    mode = "" if first.mode in _OF_COURSE else f", {first.mode}"
    return f"{_MEASURED.get(first.measured, first.measured)}{mode}, {_count(len(rows), unit)}"


def _times(rows: Sequence[Row]) -> str:
    own = [row.seconds[row.subject] for row in rows]
    return " to ".join(dict.fromkeys(time_text(value) for value in (min(own), max(own))))


def _losses(row: Row) -> str:
    gaps = [
        f"from that of {style.spoken(name)} by {f'at most {max(gaps):.1e}' if any(gaps) else 'nothing'}"
        for name, gaps in figures.loss_gaps(row).items()
    ]
    parts = f"; it parts {_listed(gaps)}" if gaps else ""
    own = row.loss[row.subject]
    return f"{row.name}: the loss goes from {own[0]:.3f} to {own[-1]:.3f}{parts}."


def _on_a_cpu(row: Row) -> bool:
    return "capability" not in row.provenance


def _how(row: Row) -> str:
    return row.measured if row.mode in _OF_COURSE else row.measured_how


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
