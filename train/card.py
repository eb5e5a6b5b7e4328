"""A Hugging Face model card for a finished run, to publish RUN/policy with.

    python -m train.card RUN

Writes RUN/card.md, to be published as README.md beside the files of RUN/policy: metadata, what was trained from what,
the likelihood trend on held-out rows, the recipe, the manifest's hash and command, and limits. Every figure is read
from the run's manifest and trend, whose digests are checked. Absolute paths are cut to their last part: a card is
public.
"""

import argparse
import html
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from data_prep.files import InputError, read_json, read_jsonl, run_command, write_text
from data_prep.manifest import file_digest, read_manifest

PAPER = "https://arxiv.org/abs/2402.05369"
SHOWN = 12  # steps of the trend at most
SUMMED = "summed over the tokens of a response"
METRICS = {  # path in a trend record: (name, what it is)
    ("chosen", "r"): ("chosen r", f"beta (log pi - log mu) of the best response of each prompt, {SUMMED}"),
    ("rejected", "r"): ("rejected r", "the same of the worse responses, averaged within a prompt"),
    ("margin",): ("margin", "chosen r less rejected r"),
    ("accuracy",): (
        "accuracy",
        "how often a chosen response has a higher log-ratio than a rejected one; ties one half",
    ),
    ("chosen", "log_ratio"): ("chosen log-ratio", f"log pi - log mu in nats, {SUMMED}"),
    ("rejected", "log_ratio"): ("rejected log-ratio", "the same of the worse responses"),
    ("chosen", "log_ratio_per_token"): ("chosen log-ratio per token", "divided by each response's tokens first"),
    ("kl",): ("KL(pi, mu)", "nats a response, from one sample of pi for each prompt"),
}


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and held-out trend of a finished, undamaged run (no trend for SFT); InputError for another."""
    if not (run / "manifest.json").exists():
        what = "is not finished; run its command again" if (run / "plan.json").exists() else "holds no run; name one"
        raise InputError(f"{run}: {what} (no manifest.json)")
    manifest = read_manifest(run)
    outputs = manifest["identity"]["outputs"]
    if "policy" not in outputs or "method" not in manifest["identity"]["settings"]:
        raise InputError(f"{run}: made by {manifest['identity']['module']}, not a training run; name one")
    for name, digest in outputs.items():
        if not (run / name).exists() or file_digest(run / name) != digest:
            raise InputError(f"{run / name}: is not what the run left (see manifest.json); run its command again")
    path = run / "trend.jsonl"
    records = [record for _, record in read_jsonl(path) if record["split"] == "heldout"] if path.exists() else []
    return manifest, records


def value_at(record: dict[str, Any], path: tuple[str, ...]) -> float | None:
    """A number of a trend record, None where it was not measured."""
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def escape(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(flat, quote=False))


def block(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def public(command: str) -> str:
    """The command line with absolute paths cut to their last part."""
    return " ".join(re.sub(r"(^|=)/.*/(?=.)", r"\1.../", word) for word in command.split(" "))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def number(value: float | None) -> str:
    """Four decimals, - where there is none."""
    return "-" if value is None else f"{value:.4f}"


def base_of(run: Path) -> tuple[str | None, str | None, str]:
    """The base model's Hub id and revision (None for a local directory), and how it is said."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    name, revision = recipe.get("model") or "", recipe.get("model_revision") or ""
    if not name:
        return None, None, "a new model with random weights"
    if revision and not name.startswith(("/", ".")):
        return name, revision, f"{escape(name)} at revision {escape(revision)}"
    return None, None, f"a local model ({escape(Path(name).name)}), see `model` below for its digest"


def metadata(run: Path, manifest: dict[str, Any], records: list[dict[str, Any]], name: str) -> str:
    """The YAML head."""
    settings = manifest["identity"]["settings"]
    base, _, _ = base_of(run)
    results = []
    for path, (label, _) in METRICS.items() if records else ():
        found = value_at(records[-1], path)
        if found is not None:
            results.append(EvalResult(
                task_type="text-generation", dataset_type="rewards", dataset_name="held-out rows of the run",
                metric_type=re.sub(r"\W+", "_", label).strip("_").lower(), metric_name=label,
                metric_value=round(found, 6),
            ))  # fmt: skip
    data = ModelCardData(
        base_model=base, library_name="peft" if (run / "policy" / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation", tags=["alignment", "noise-contrastive-alignment", str(settings["method"])],
        model_name=name, eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml(line_break="\n")


def trend_section(records: list[dict[str, Any]]) -> str:
    """The end of the trend with what each number is, and its course."""
    if not records:
        return "This run measured no likelihood trend."
    last = records[-1]
    rows = [[label, number(value_at(last, path)), meaning] for path, (label, meaning) in METRICS.items()
            if value_at(last, path) is not None]  # fmt: skip
    if "kl_standard_error" in last:
        rows[-1][1] += f" (standard error {last['kl_standard_error']:.4f})"
    step = -(-len(records) // SHOWN)
    kept = [record for i, record in enumerate(records) if i % step == 0 or record is last]
    paths = [("chosen", "r"), ("rejected", "r"), ("accuracy",), ("kl",)]
    course = [[str(record["step"]), *(number(value_at(record, path)) for path in paths)] for record in kept]
    head = ["step", *(METRICS[path][0] for path in paths)]
    return "\n\n".join([
        f"On {last['prompts']} held-out prompts after {last['step']} steps, by the run itself (pi: this policy, mu: "
        f"what it was trained from; {last['excluded']} prompts with equal rewards left out; beta {last['beta']:g}):",
        table(["metric", "value", "what it is"], rows), "Over training:", table(head, course),
    ])  # fmt: skip


def limits(run: Path, manifest: dict[str, Any]) -> list[str]:
    """What the figures do not say."""
    facts, circumstances = manifest["identity"]["facts"], manifest["circumstances"]
    said = [
        "Likelihoods of held-out responses are not the quality of answers: judge answers before you rely on them. "
        "Safety, bias and factuality were not measured.",
        "One run, one seed: the figures have no interval over seeds.",
        "Whoever publishes this adds the licence and what the data's and the base model's licences ask for.",
    ]  # fmt: skip
    cut = facts.get("rows", {}).get("responses_cut")
    if cut:
        said.append(f"{cut} of {facts['rows']['responses']} training responses were cut to the recipe's length.")
    if circumstances.get("commit") is None or circumstances.get("dirty"):
        said.append("The commit does not name the code exactly (no checkout, or changed files): see the code's digest.")
    if (run / "policy" / "base.json").exists() and read_json(run / "policy" / "base.json").get("quantized"):
        said.append("An adapter trained on a quantized base; merged unquantized (`python -m train.merge`) it is "
                    "another model.")  # fmt: skip
    return said


def card(run: Path) -> str:
    """The card of a finished run; InputError for another."""
    manifest, records = read_run(run)
    identity, circumstances = manifest["identity"], manifest["circumstances"]
    settings, facts = identity["settings"], identity["facts"]
    name = run.resolve().name
    options = ", ".join(f"{key} = {value:g}" for key, value in settings.get("objective", {}).items())
    objective = f" ({options})" if options else ""
    model = facts["model"]
    provenance = {
        "manifest": manifest["hash"], "commit": circumstances.get("commit") or "unknown", "code": identity["code"],
        "model": settings.get("model", "-"), **identity["inputs"], "policy": identity["outputs"]["policy"],
    }  # fmt: skip
    work = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in facts.get("work", {}).items())
    cost = f"{circumstances['wall_s']:.0f} s and {circumstances['peak_mb']:.0f} MB of host memory for the last process"
    parts = [
        f"---\n{metadata(run, manifest, records, name).strip()}\n---",
        f"# {escape(name)}",
        f"Trained with {escape(settings['method'])}{objective}, from {base_of(run)[2]}, by a replication of "
        f"*Noise Contrastive Alignment of Language Models with Explicit Rewards* ([arXiv 2402.05369]"
        f"({PAPER})). {escape(model['architecture'])}, {model['parameters']:,} parameters, of which "
        f"{model['trainable']:,} were trained.",
        "## Likelihood trend", trend_section(records),
        "## Training",
        f"{facts['rows']['prompts']:,} prompts with {facts['rows']['responses']:,} responses; "
        f"{work or 'work unknown'}; {facts['processes']} process(es) with a global batch of {facts['global_batch']} "
        f"prompts on {escape(circumstances.get('device', 'an unknown device'))}; {cost}.",
        block(yaml.safe_dump(settings["recipe"], sort_keys=False, allow_unicode=True), "yaml"),
        "## Provenance", block(public(manifest["command"]), "bash"),
        table(["what", "SHA-256 or commit"], [[escape(key), f"`{value}`"] for key, value in provenance.items()]),
        "Versions: " + ", ".join(f"{escape(key)} {escape(value)}" for key, value in identity["versions"].items()) + ".",
        "## Limits", "\n".join(f"- {sentence}" for sentence in limits(run, manifest)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(prog="python -m train.card", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    run = parser.parse_args().run
    write_text(run / "card.md", card(run))
    print(f"{run / 'card.md'}: written; add the licence, and publish it as the policy's README.md")


if __name__ == "__main__":
    run_command(main)
