"""Tables and figure of the benchmark, from its measures."""

import csv
import io
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from data_prep.files import atomic_path, write_text
from data_prep.manifest import command_line, versions

Measures = dict[str, Any]
COLUMNS = ("part", "what", "quantity", "value", "unit")


def cpu_model() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def total(part: Measures, name: str, clock: str = "cpu_s") -> float:
    """Seconds of all steps of one kind."""
    return sum(part[clock][name])


def trl_best(part: Measures, name: str, clock: str = "cpu_s") -> str:
    """TRL's faster micro-batch."""
    return min((n for n in part[clock] if n.startswith(f"{name}, ")), key=lambda n: total(part, n, clock))


def ratios(part: Measures, name: str, clock: str = "cpu_s", cached: str | None = None) -> tuple[float, float]:
    """How many times as many prompts a second: in one run, and with the references cached (there against `cached`,
    if the other has a cache of its own)."""
    training, reference = total(part, "training", clock), total(part, "reference", clock)
    return total(part, name, clock) / (training + reference), total(part, cached or name, clock) / training


def spread(part: Measures, name: str, with_reference: bool) -> tuple[float, float]:
    """Least and greatest ratio of CPU time of a single row."""
    ours = part["cpu_s"]["training"]
    if with_reference:
        ours = [a + b for a, b in zip(ours, part["cpu_s"]["reference"], strict=True)]
    single = [a / b for a, b in zip(part["cpu_s"][name], ours, strict=True)]
    return min(single), max(single)


def targets(parts: Measures) -> list[tuple[str, float, float, str]]:
    """What issue 4 asks for: claim, measured, target, relation."""
    rows = []
    wanted = {"UltraFeedback-like": (1.8, 2.7), "long prompts (512)": (3.6, 5.0)}
    for regime, (one, cached) in wanted.items():
        found = ratios(parts[f"released / {regime} / float32"], "released")
        rows.append((f"released computation, {regime}, one run", found[0], one, ">="))
        rows.append((f"released computation, {regime}, references cached", found[1], cached, ">="))
    trl = parts["trl"]
    found = ratios(trl, trl_best(trl, "TRL"))
    rows.append(("TRL, one run", found[0], 2.0, ">="))
    rows.append(("TRL without its cache, ours with references cached", found[1], 3.0, ">="))
    part = parts["released / UltraFeedback-like / float32"]
    rows.append(("utilisation of the GEMM peak, references cached",
                 part["flops"] / total(part, "training") / part["gemm_flops"], 0.70, ">="))  # fmt: skip
    memory = {(m["kind"], m["vocabulary"]): m["peak_mb"] for m in parts["vocabulary"]}
    sizes = sorted({v for _, v in memory})
    middle = sizes[len(sizes) // 2]
    rows.append(("peak memory over the weights, share of the released computation's",
                 memory["ours", middle] / memory["released", middle], 0.5, "<="))  # fmt: skip
    return rows


def flat(parts: Measures) -> list[tuple[str, str, str, float, str]]:
    """Everything measured, one value a row."""
    rows = []
    for name, part in parts.items():
        if isinstance(part, dict):
            for what in part["cpu_s"]:
                rows.append((name, what, "CPU time", total(part, what), "s"))
                rows.append((name, what, "wall time", total(part, what, "wall_s"), "s"))
                rows.append((name, what, "prompts", part["prompts"] / total(part, what), "1/s of CPU time"))
                rows.append((name, what, "prompts", part["prompts"] / total(part, what, "wall_s"), "1/s of wall time"))
                if "tokens" in part:
                    rows.append((name, what, "unique tokens", part["tokens"] / total(part, what), "1/s of CPU time"))
                    if what != "reference":
                        used = part["flops"] / total(part, what) / part["gemm_flops"]
                        rows.append((name, what, "utilisation", used, "of the GEMM peak"))
            rows.append((name, "rows", "padded / unique tokens", part["padded_over_unique"], ""))
            if "gemm_flops" in part:
                rows.append((name, "best GEMM", "rate", part["gemm_flops"] / 1e9, "GFLOP/s"))
        elif name != "gpu":
            for m in part:
                what = (
                    f"{m['kind']}, K {m['k']}, V {m['vocabulary']}, prompt {m['prompt']:g}, response {m['response']:g}"
                )
                rows.append((name, what, "CPU time", m["cpu_s"], "s"))
                rows.append((name, what, "peak over the weights", m["peak_mb"], "MiB"))
        else:
            for m in part:
                what = ", ".join(str(m[key]) for key in ("case", "way", "k", "phase", "device") if key in m)
                for key, quantity, unit in (("samples_per_s", "samples", "1/s"), ("mfu", "utilisation", "of GEMM peak"),
                                            ("peak_gb", "peak over the weights", "GB")):  # fmt: skip
                    if key in m:
                        rows.append((name, what, quantity, m[key], unit))
    return rows


def markdown(parts: Measures, settings: Measures) -> str:
    """benchmark.md."""
    lines = [
        "# Speed and memory", "",
        f"`{command_line()}` on {settings['cpu']}, {settings['threads']} thread(s); "
        + ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "transformers", "peft"))
        + f", trl {settings['trl']}. "
        "Mistral's proportions, 8 layers of width 512, vocabulary 32,000, LoRA r 16 on all projections, NCA, "
        "one prompt a micro-batch; forward and backward pass without the optimizer's update. Steps alternate in one "
        "process; ratios are of summed CPU time (of wall time in brackets), with the least and greatest of a single "
        "row. Losses and gradients of each float32 row were compared, and agreed.", "",
    ]  # fmt: skip
    if settings["tiny"]:
        lines += ["**Tiny models: this shows that the benchmark runs, and measures nothing.**", ""]
    elif settings["quick"]:
        lines += ["**`--quick`: few rows, so ratios are rough.**", ""]
    lines += ["## Targets", "", "| against | measured | target | met |", "|---|---|---|---|"]
    for claim, value, target, relation in targets(parts):
        met = value >= target if relation == ">=" else value <= target
        lines.append(f"| {claim} | {value:.2f} | {relation} {target:g} | {'yes' if met else 'no'} |")
    lines += ["", "## Against the released code's computation (K = 4)", "",
              "| lengths, dtype | padded / unique | one run | references cached "
              "| utilisation: released, one run, cached | prompts/s of CPU: released, one run, cached "
              "| GEMM peak, GFLOP/s | greatest difference: loss, gradients |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, part in parts.items():
        if name.startswith("released / "):
            lines.append(_released_row(name, part))
    trl = parts["trl"]
    plain, cached = trl_best(trl, "TRL"), trl_best(trl, "TRL with its cache")
    one, sweep = ratios(trl, plain), ratios(trl, plain, cached=cached)
    wall = ratios(trl, plain, "wall_s"), ratios(trl, plain, "wall_s", cached=cached)
    lines += ["", "## Against TRL's DPOTrainer (`nca_pair`, K = 2, float32, its faster micro-batch)", "",
              "| ours | TRL | prompts/s, times TRL's |", "|---|---|---|",
              f"| reference and training pass | {plain} | {one[0]:.2f} ({wall[0][0]:.2f}) |",
              f"| references cached | {plain} | {one[1]:.2f} ({wall[0][1]:.2f}) |",
              f"| references cached | {cached} | {sweep[1]:.2f} ({wall[1][1]:.2f}) |", "",
              "Seconds of CPU a prompt: " + ", ".join(
                  f"{name} {total(trl, name) / trl['prompts']:.2f}" for name in trl["cpu_s"]) + ".", ""]  # fmt: skip
    for title, name, key in (
        ("vocabulary", "vocabulary", "vocabulary"),
        ("K", "k", "k"),
        ("length", "length", "prompt"),
    ):
        lines += [f"## Peak memory and time against {title}", "",
                  f"| {'prompt + response' if name == 'length' else title} | released, MiB | ours, MiB | share "
                  "| released, s of CPU | ours (cached), s of CPU |", "|---|---|---|---|---|---|"]  # fmt: skip
        found = {(m["kind"], m[key]): m for m in parts[name]}
        for value in sorted({v for _, v in found}):
            theirs, ours = found["released", value], found["ours", value]
            label = f"{theirs['prompt']:g} + {theirs['response']:g}" if name == "length" else f"{value:,g}"
            share = ours["peak_mb"] / theirs["peak_mb"]
            lines.append(
                f"| {label} | {theirs['peak_mb']:.0f} | {ours['peak_mb']:.0f} | {share:.2f} "
                f"| {theirs['cpu_s']:.2f} | {ours['cpu_s']:.2f} |"
            )
        lines.append("")
    lines += ["Each in a fresh process, over what it holds with weights and libraries in place. `scaling.png` "
              "shows the last two.", "", "## On a GPU: 7B and 8x7B geometry", ""]  # fmt: skip
    if not parts["gpu"]:
        return "\n".join([*lines, "not run: no CUDA device here (`bash scripts/benchmark.sh --device cuda`)", ""])
    lines += ["| case | attention | K | phase | samples/s | utilisation | peak over the weights, GB |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for m in parts["gpu"]:
        if "not_run" in m:
            lines.append(f"| {m['case']} | {m.get('way', '')} | | | not run: {m['not_run']} | | |")
        else:
            lines.append(f"| {m['case']} | {m['way']} | {m['k']} | {m['phase']} | {m['samples_per_s']:.2f} "
                         f"| {m['mfu']:.2f} | {m['peak_gb']:.1f} |")  # fmt: skip
    return "\n".join([*lines, "", f"Device: {parts['gpu'][0]['device']}.", ""])


def _released_row(name: str, part: Measures) -> str:
    one, cached = ratios(part, "released")
    wall = ratios(part, "released", "wall_s")
    low, high = zip(spread(part, "released", True), spread(part, "released", False), strict=True)
    training, reference = total(part, "training"), total(part, "reference")
    times = (total(part, "released"), training + reference, training)
    used = ", ".join(f"{part['flops'] / t / part['gemm_flops']:.2f}" for t in times)
    speed = ", ".join(f"{part['prompts'] / t:.2f}" for t in times)
    difference = part["differences"]
    equal = f"{difference['loss']:.0e}, {difference['gradients']:.0e}" if difference else "not compared"
    return (
        f"| {name.removeprefix('released / ').replace(' / ', ', ')} | {part['padded_over_unique']:.2f} "
        f"| {one:.2f} ({wall[0]:.2f}); {low[0]:.2f} to {high[0]:.2f} "
        f"| {cached:.2f} ({wall[1]:.2f}); {low[1]:.2f} to {high[1]:.2f} "
        f"| {used} | {speed} | {part['gemm_flops'] / 1e9:.0f} | {equal} |"
    )


def figure(parts: Measures) -> pyplot.Figure:
    """Time and memory against K and against length."""
    matplotlib.rcParams.update({"svg.hashsalt": "benchmark", "font.size": 9})
    drawn, axes = pyplot.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
    swept = (("k", "K (prompt 120, responses 230)"), ("length", "prompt + response, tokens (1 : 2), K = 4"))
    for column, (name, label) in enumerate(swept):
        for row, (key, unit) in enumerate((("cpu_s", "CPU time of a step, s"), ("peak_mb", "peak memory, MiB"))):
            axis = axes[row, column]
            for kind, shown in (("released", "released computation"), ("ours", "ours, references cached")):
                points = [m for m in parts[name] if m["kind"] == kind]
                x = [m["k"] if name == "k" else m["prompt"] + m["response"] for m in points]
                axis.plot(x, [m[key] for m in points], marker="o", label=shown)
            axis.set(xlabel=label, ylabel=unit, ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    return drawn


def write(directory: Path, parts: Measures, settings: Measures) -> None:
    """benchmark.md, benchmark.csv, scaling.png and scaling.svg."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*row[:3], f"{row[3]:.6g}", row[4]) for row in flat(parts))
    write_text(directory / "benchmark.csv", text.getvalue())
    drawn = figure(parts)
    for suffix in ("png", "svg"):
        with atomic_path(directory / f"scaling.{suffix}") as temporary:
            drawn.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    pyplot.close(drawn)
    write_text(directory / "benchmark.md", markdown(parts, settings))
