"""SFT: makes the reference policy mu of the miniature, a small MistralForCausalLM trained on demonstrations.

    L = - log pi(y|x), summed over the tokens of the demonstrated response y (EOS included).

At the paper's scale mu is a released SFT model (HuggingFaceH4/mistral-7b-sft-beta) and this file is not needed.

    python -m train.sft --recipe train/recipes/tiny/sft.yaml --demonstrations FILE --out RUN
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.files import InputError, read_jsonl, run_command
from data_prep.manifest import plan
from data_prep.rows import check_messages
from train.engine.batches import EpochSampler
from train.engine.models import new_mistral, new_tokenizer
from train.engine.recipe import SftRecipe
from train.engine.run import model_facts, train, training_arguments
from train.engine.rundir import RunDirectory
from train.engine.tokens import EncodedRow, Encoder
from train.engine.trainer import RowTrainer


def sft_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The SFT loss of each prompt, [B], in nats: log_ratios [B, 1] are log pi(y|x) here, log mu being 0."""
    return -(log_ratios * mask).sum(-1)


def read_demonstrations(path: str) -> list[dict[str, Any]]:
    """Lines of {id, prompt: chat messages, response, source}; InputError with file, line and reason."""
    found = []
    for number, record in read_jsonl(path):

        def refuse(reason: str, number: int = number) -> None:
            raise InputError(f"{path}:{number}: {reason}")

        check_messages(record.get("prompt"), refuse)
        if not isinstance(record.get("response"), str) or not record["response"].strip():
            refuse("the response is missing or empty")
        if not isinstance(record.get("id"), str):
            refuse("the id is missing")
        found.append(record)
    if not found:
        raise InputError(f"{path}: no demonstrations")
    return found


def main() -> None:
    """Train mu."""
    parser = argparse.ArgumentParser(prog="python -m train.sft")
    parser.add_argument("--demonstrations", required=True, help=".jsonl with prompt and response")
    parser.add_argument("--out", required=True, help="run directory")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left in --out")
    SftRecipe.add_arguments(parser)
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("SFT of the miniature runs in one process; start it without torchrun")
    recipe = SftRecipe.from_arguments(arguments)
    settings = {"method": "sft", "recipe": dataclasses.asdict(recipe)}
    run = RunDirectory(Path(arguments.out), plan("train.sft", settings, {"demonstrations": arguments.demonstrations}))
    if not arguments.fresh and run.is_done:
        print(f"{run.path}: done already, nothing to do")
        return
    run.begin(recipe, arguments.fresh)

    demonstrations = read_demonstrations(arguments.demonstrations)
    texts = (text for item in demonstrations for text in (*(m["content"] for m in item["prompt"]), item["response"]))
    tokenizer = new_tokenizer(texts, recipe.vocabulary)
    model = new_mistral(
        tokenizer, hidden=recipe.hidden, layers=recipe.layers, heads=recipe.heads, kv_heads=recipe.kv_heads,
        feed_forward=recipe.feed_forward, positions=recipe.positions, seed=recipe.seed,
    )  # fmt: skip
    encoder = Encoder(tokenizer, recipe.max_prompt_tokens, recipe.max_response_tokens)
    rows = [
        EncodedRow(item["id"], *encoder.demonstration(item["id"], item["prompt"], item["response"]), [0.0])
        for item in demonstrations
    ]
    sampler = EpochSampler([row.stream_length for row in rows], recipe.global_batch, recipe.epochs, recipe.seed)
    no_reference = {row.id: [0.0] for row in rows}
    trainer = RowTrainer(model, training_arguments(run.path, recipe), rows, no_reference, sft_loss, sampler)
    train(trainer, run, recipe)
    facts = {"rows": encoder.facts(), "work": {"steps": trainer.state.global_step}}
    run.finish(model, tokenizer, [], facts | model_facts(model, trainer), {"device": str(trainer.args.device)})


if __name__ == "__main__":
    run_command(main)
