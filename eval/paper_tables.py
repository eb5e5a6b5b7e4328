"""Tables 2 and 3 and the tables of Figures 4 and 6, ours beside the paper's: Markdown, CSV and LaTeX (booktabs).

Called by eval.tables. One line for each method and benchmark: the paper's value with its status, ours with its 95 %
interval, n, and ours less the paper's. A line that nobody ran says `not run`. At the tiny scale no difference is
formed: other models, prompts and judges.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas

from data_prep.files import InputError, read_jsonl, write_text
from eval.grids import GRIDS
from eval.published import STATUSES, Published, read_table
from eval.records import METHODS, REGIMES, Estimate, Score, pool, read_scores

NOT_RUN = "not run"
NO_CALLS = "by nobody: all answers are equal"  # eval.win_rate's judge where every comparison is a tie
BASES = {"tiny": "Mistral-7B", "mistral-7b": "Mistral-7B", "mixtral-8x7b": "Mixtral-8x7B"}
TITLES = {
    "table2": "Table 2: instruction following",
    "table3": "Table 3: reasoning",
    "figure4": "Figure 4: number of responses",
    "figure6": "Figure 6: sensitivity to alpha and beta",
}
LABELS = {"mu": "SFT", "sft": "SFT", **METHODS, "dpo_x6": "DPO x 6 (all pairs)"}
# Of Table 2; NCA on pairs and SFT on the best response are this repository's additions.
ROWS2 = ("mu", "kto", "ipo", "dpo", "dpo_x3", "dpo_x6", "infonca", "nca", "nca_pair", "sft_best")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One benchmark of a table. factor: from a record's value to the table's. paper: its name in results/paper."""

    label: str
    benchmark: str
    metric: str
    factor: float
    digits: int
    paper: str | None
    decoding: str | None = None  # None: the only one there is


MT_BENCH = Quantity("MT-Bench", "mt_bench", "score", 1, 2, "mt_bench")
TABLE2 = [
    MT_BENCH,
    Quantity("AlpacaEval 1, %", "alpaca_eval_1", "win_rate", 100, 2, "alpaca_eval_1"),
    Quantity("wins against DPO, %", "vs_dpo", "win_rate", 100, 1, "vs_dpo"),
]
TABLE3 = [
    Quantity("BBH, %", "bbh", "substring", 100, 1, "bbh", "greedy"),
    Quantity("LeetCode, %", "leetcode", "pass@1", 100, 1, "leetcode", "greedy"),
    Quantity("HumanEval, %", "humaneval", "pass@1", 100, 1, "humaneval", "sampled"),
    Quantity("GSM-Plus, %", "gsm_plus", "math_verify", 100, 1, "gsm_plus", "greedy"),
    Quantity("MATH, %", "math", "math_verify", 100, 1, "math", "greedy"),
    Quantity("TheoremQA, %", "theoremqa", "answer", 100, 1, "theoremqa", "greedy"),
    Quantity("SVAMP, %", "svamp", "math_verify", 100, 1, "svamp", "greedy"),
    Quantity("ASDiv, %", "asdiv", "math_verify", 100, 1, "asdiv", "greedy"),
    Quantity("GSM8K, % (extension)", "gsm8k", "flexible-extract", 100, 1, None, "greedy"),
]
AVERAGE = Quantity("average of eight, %", "average", "", 100, 1, "average")
TINY3 = [  # the miniature's arithmetic has the answer form of GSM8K, its functions that of HumanEval
    Quantity("arithmetic, %", "arithmetic", "strict-match", 100, 1, None, "greedy"),
    Quantity("functions, % (paper: HumanEval)", "functions", "pass@1", 100, 1, "humaneval", "greedy"),
]
TRUTH = Quantity("true reward", "all", "reward", 1, 2, None, "sampled")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table, and of its CSV. difference: ours less the paper's."""

    section: str
    benchmark: str
    method: str
    policy: str
    published: Published | None
    ours: Estimate | None
    records: tuple[Score, ...]
    difference: Estimate | None
    digits: int
    more: dict[str, Any] = dataclasses.field(default_factory=dict)  # further columns: text or an Estimate
    itself: bool = False  # a policy's answers against themselves

    def shown(self, scale: str) -> dict[str, str]:
        """The cells of the table."""
        sizes = sorted({score.n for score in self.records})
        seeds = f" x {len(self.records)} seeds" if len(self.records) > 1 else ""
        grid = "K" in self.more  # one benchmark for all lines, and no value of the paper to compare with
        cells = {"method": self.method} if grid else {"benchmark": self.benchmark, "method": self.method}
        for name, value in self.more.items():
            cells[name] = value.show(2) if isinstance(value, Estimate) else NOT_RUN if value is None else str(value)
        cells["paper"] = self.published.show() if self.published else "-"
        cells[f"ours, {self.benchmark}" if grid else "ours"] = (
            "-" if self.itself else self.ours.show(self.digits) if self.ours else NOT_RUN
        )
        cells["n"] = (" to ".join(map(str, sizes[:: max(1, len(sizes) - 1)])) + seeds) if self.records else "-"
        if scale != "tiny" and not grid:
            cells["ours less paper's"] = self.difference.show(self.digits) if self.difference else "-"
        return cells

    def numbers(self) -> dict[str, Any]:
        """The line of the CSV, unrounded, with the hashes of the manifests behind it."""
        cells: dict[str, Any] = {name: getattr(self, name) for name in ("section", "benchmark", "method", "policy")}
        for name, value in self.more.items():
            cells |= _estimate(name, value) if value is None or isinstance(value, Estimate) else {name: value}
        published = self.published or Published("", "", "")
        cells |= {"paper": published.value, "paper_status": published.status, "paper_source": published.source}
        cells["status"] = "itself" if self.itself else "measured" if self.ours else NOT_RUN
        cells |= {**_estimate("ours", self.ours), "n": " ".join(str(score.n) for score in self.records)}
        cells |= {"seeds": str(len(self.records) or ""), **_estimate("difference", self.difference)}
        cells["judge"] = " ".join(sorted({score.judge for score in self.records}))
        cells["manifests"] = " ".join(score.manifest for score in self.records)
        return cells


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    numbers = (found.value, found.low, found.high) if found else (None, None, None)
    known = [None if number is None or math.isnan(number) else number for number in numbers]
    return dict(zip((name, f"{name}_low", f"{name}_high"), known, strict=True))


class Records:
    """The score records of one table and one scale; InputError for two of one cell, or two judges of a benchmark."""

    def __init__(self, path: Path, scale: str):
        """path: scores.jsonl; where it is absent nothing was run."""
        self.path = path
        self.scores = read_scores(path) if path.exists() else []
        other = {score.scale for score in self.scores} - {scale}
        if other:
            raise InputError(f"{path}: has records of scale {other.pop()}; a table of {scale} holds none of another")

    def find(self, policy: str, quantity: Quantity) -> tuple[Score, ...]:
        """One record for each seed, in their order."""
        found: dict[int, Score] = {}
        for score in self.scores:
            if (score.policy, score.benchmark, score.metric) != (policy, quantity.benchmark, quantity.metric):
                continue
            if quantity.decoding and score.decoding != quantity.decoding:
                continue
            if score.seed in found:
                raise InputError(f"{self.path}: two records of {policy}, {score.benchmark} {score.metric}, seed "
                                 f"{score.seed}; keep one")  # fmt: skip
            found[score.seed] = score
        return tuple(found[seed] for seed in sorted(found))

    def one_judge(self, quantities: list[Quantity], *, models: bool) -> None:
        """InputError unless each benchmark was judged alike for all policies. models: and by one model in all."""
        seen: dict[str, str] = {}
        for score in self.scores:
            wanted = (score.benchmark, score.metric) in {(q.benchmark, q.metric) for q in quantities}
            if not wanted or score.judge.endswith(NO_CALLS):
                continue
            # "alpaca_eval_gpt4 by MODEL" is AlpacaEval's prompt, answered by MODEL
            for of, judge in ((score.benchmark, score.judge), ("", score.judge.rpartition(" by ")[2])):
                if (of or models) and seen.setdefault(of, judge) != judge:
                    raise InputError(f"{self.path}: {of or 'the table'} is judged by {seen[of]} and by {judge}; a "
                                     "table has one judge: judge all policies alike")  # fmt: skip


def estimate(records: tuple[Score, ...], factor: float) -> Estimate | None:
    """The mean over seeds, in the table's unit."""
    if not records:
        return None
    return pool([factor * s.value for s in records], (factor * records[0].low, factor * records[0].high))


def less(ours: Estimate | None, published: Published | None, scale: str) -> Estimate | None:
    """Ours less the paper's, of which no interval is known; none at the tiny scale, which is another experiment."""
    if scale == "tiny" or ours is None or published is None or published.value is None:
        return None
    numbers = (number - published.value for number in (ours.value, ours.low, ours.high))
    return Estimate(*numbers, tuple(number - published.value for number in ours.seeds))


def benchmark_lines(table: str, scale: str, records: Records) -> list[Line]:
    """Tables 2 and 3."""
    published, tiny = read_table(table), scale == "tiny"
    quantities = TABLE2 if table == "table2" else TINY3 if tiny else TABLE3
    records.one_judge(quantities, models=table == "table2")
    lines = []
    for regime in REGIMES if tiny else ("",):
        names = ("mu", *METHODS) if tiny else ROWS2 if table == "table2" else ("sft", "dpo", "nca")
        if tiny and table == "table2":
            names = ROWS2
        for quantity in quantities:
            for name in names:
                # Table 3 trains on pairs: its NCA is the miniature's NCA on pairs
                known = {"mu": "sft", "dpo": "dpo", "nca_pair": "nca"}.get(name) if tiny and table == "table3" else name
                policy = name if name == "mu" or not tiny else f"{name}-{regime}"
                policy = policy if tiny else policy.replace("_", "-")
                found = records.find(policy, quantity)
                value, ours = published.get((BASES[scale], known, quantity.paper)), estimate(found, quantity.factor)
                itself = (quantity.benchmark, name) == ("vs_dpo", "dpo")
                itself |= tiny and (quantity.benchmark, name) == ("alpaca_eval_1", "mu")  # the answers to win against
                lines.append(
                    Line(regime and f"{regime.capitalize()} regime", quantity.label, LABELS[name], policy, value, ours,
                         found, less(ours, value, scale), quantity.digits, {}, itself)
                )  # fmt: skip
    if table == "table3" and not tiny:
        lines += [average(lines, policy, published, scale) for policy in ("sft", "dpo", "nca")]
    return lines


def average(lines: list[Line], policy: str, published: dict[Any, Published], scale: str) -> Line:
    """The mean of the paper's eight tasks, without an interval; not run where one of them is not."""
    own = [line.ours for line in lines if line.policy == policy and "extension" not in line.benchmark]
    values = [found.value for found in own if found]
    mean = math.fsum(values) / len(values) if values else math.nan
    ours = Estimate(mean, math.nan, math.nan, (mean,)) if len(values) == len(own) else None
    value = published.get((BASES[scale], policy, AVERAGE.paper))
    return Line("", AVERAGE.label, LABELS[policy], policy, value, ours, (), less(ours, value, scale), 1)


def ablation_lines(figure: str, scale: str, records: Records, trend: Path) -> list[Line]:
    """Figures 4 and 6: score and likelihoods at the end of training."""
    quantity = TRUTH if scale == "tiny" else MT_BENCH
    records.one_judge([quantity], models=True)
    ends: dict[str, dict[int, dict[str, Any]]] = {}
    for _, record in read_jsonl(trend) if trend.exists() else ():
        if record["split"] == "heldout":
            ends.setdefault(record["policy"], {})[record["seed"]] = record  # steps come in order
    unknown, lines = Published("", "unknown", "the figure's points are in no source at hand"), []
    for point in GRIDS[figure](scale):
        found = records.find(point.policy, quantity)
        own = ends.get(point.policy, {})
        more: dict[str, Any] = {
            "data": point.data,
            "K": point.k,
            "alpha": f"{point.alpha:g}",
            "beta": f"{point.beta:g}",
        }
        for name, path in (("KL(pi, mu)", ("kl",)), ("chosen", ("chosen", "log_ratio")),
                           ("rejected", ("rejected", "log_ratio"))):  # fmt: skip
            values = [own[seed][path[0]] if len(path) == 1 else own[seed][path[0]][path[1]] for seed in sorted(own)]
            more[name] = pool(values) if values else None
        lines.append(Line("", quantity.label, LABELS[point.method], point.policy, unknown,
                          estimate(found, quantity.factor), found, None, quantity.digits, more))  # fmt: skip
    return lines


def notes(table: str, scale: str, lines: list[Line]) -> list[str]:
    """What a reader must know of the numbers, one sentence or two a line."""
    seeds = max((len(line.records) for line in lines), default=0)
    judges = sorted({s.judge for line in lines for s in line.records if not s.judge.endswith(NO_CALLS)})
    said = [
        "Nothing was run." if not seeds else f"Judged by: {'; '.join(judges)}. 95 % intervals: "
        + ("Student's t over the seeds' means." if seeds > 1 else "over the items of one seed."),
        "A paper's value has its status: "
        + "; ".join(f"{status}: {meaning}" for status, meaning in STATUSES.items()
                    if any(line.published and line.published.status == status for line in lines)) + ".",
    ]  # fmt: skip
    if scale == "tiny" and table not in GRIDS:
        said.append("The paper's values are those of Mistral-7B, beside ours for orientation only: another model, "
                    "other prompts, another judge. No difference is formed between scales.")  # fmt: skip
    if table == "table2" and scale == "tiny":
        said.append("The miniature's prompts, in the forms of MT-Bench (two turns) and AlpacaEval 1 (here against the "
                    "SFT model's answers), judged by their truth through the same programs.")  # fmt: skip
    if table == "table2":
        said.append("NCA on pairs and SFT on the best of 4 are additions; the paper has no such rows.")
    if table == "table3" and scale == "tiny":
        said.append("Table 3 trains on pairs: the paper's NCA stands beside ours on pairs.")
    if table == "figure6":
        said.append("The paper's grid is not known; the rows of `reward` are the points of Figure 4, right, too. On "
                    "pairs alpha is 0, the limit.")  # fmt: skip
    if table in GRIDS:
        said.append("KL, and chosen and rejected (log pi - log mu of the best response and of the others), are in nats "
                    "a response, on held-out rows at the end of training.")  # fmt: skip
    return said


def write(table: str, scale: str, folder: Path) -> list[Line]:
    """Write TABLE.md, TABLE.csv and TABLE.tex in `folder` from its scores.jsonl and trend.jsonl, and return the lines.

    table: of TITLES. scale: tiny, mistral-7b or mixtral-8x7b. Records that are absent are `not run`.
    """
    if scale == "mixtral-8x7b" and table != "table3":
        raise InputError(f"{table} at {scale}: the paper has it on Mistral-7B alone; take --scale mistral-7b or tiny")
    records = Records(folder / "scores.jsonl", scale)
    if table in GRIDS:
        lines = ablation_lines(table, scale, records, folder / "trend.jsonl")
    else:
        lines = benchmark_lines(table, scale, records)
    title, said = f"{TITLES[table]}, {scale}", notes(table, scale, lines)
    command = f"python -m eval.tables --table {table} --scale {scale}"
    text, latex = [f"# {title}"], [f"% {title}. Made by {command}; needs booktabs."]
    for section in dict.fromkeys(line.section for line in lines):
        cells = pandas.DataFrame([line.shown(scale) for line in lines if line.section == section])
        text += [f"## {section}"] * bool(section) + [cells.to_markdown(index=False, disable_numparse=True)]
        caption = ", ".join(filter(None, (title, section.lower())))
        label = "-".join(filter(None, (f"tab:{table}-{scale}", section.lower().partition(" ")[0])))
        latex.append(cells.to_latex(index=False, escape=True, caption=caption, label=label))
    text += ["\n".join(f"- {sentence}" for sentence in said)]
    text.append(f"Made by `{command}` from the records beside it; `{table}.csv` has the numbers unrounded, with the "
                "hash of the manifest behind each.")  # fmt: skip
    write_text(folder / f"{table}.md", "\n\n".join(text) + "\n")
    write_text(folder / f"{table}.tex", "\n".join(latex) + "".join(f"% {sentence}\n" for sentence in said))
    numbers = pandas.DataFrame([line.numbers() for line in lines])
    write_text(folder / f"{table}.csv", numbers.to_csv(index=False, lineterminator="\n", float_format="%.6f"))
    return lines
