"""Mode `official`: what the released code does otherwise than the paper says, each a switch of a recipe's `quirks`.

The released code is github.com/thu-ml/Noise-Contrastive-Alignment at cbb9248. Its published metrics (the authors'
model cards) can only be met with its tokens, labels and sums. `quirks: official` turns every switch on; an empty
`quirks` is the paper's objective on the tokens that the model was fine-tuned on.

    separate_tokenization   prompt and response are tokenized apart, not as one text. (No special tokens are added in
                            either mode: BOS is the template's business, and the Zephyr template writes none.)
    doubled_eos             the template's own end of turn (EOS, newline) stays in the response, and another EOS comes
                            after it. All are targets, but no token attends to an EOS, in prompts and responses.
    joint_truncation        "too long" is judged on the longest response of the row; only then is the prompt cut to its
                            last max_prompt_tokens, and if that is not enough, every response of the row to
                            max_tokens - max_prompt_tokens, also behind a short prompt. max_response_tokens is not read.
    first_turn              the prompt is the first user turn behind the system message (an empty one if there is
                            none); everything after the conversation's first message is response.
    tie_break               0.01 is added to the best response's reward (the first among equals). The released sets are
                            sorted, so that this is their A0. At alpha = 1e-4 it alone is worth a factor of exp(100).
    float16_compute         4-bit weights are multiplied in float16, whatever the recipe's dtype (train.engine.models).
    rank0_metrics           metrics are the mean over the first process's share of the prompts (train.parity).

What has no switch, and why:

    K = 4, written out by hand                    the same numbers at K = 4; other K cannot be had from it
    the name temperature_alpha                    a name: see `alpha_of`
    dropout off although the recipe says 0.05     the same here: no dropout in either mode
    reference = the 4-bit base without adapters   the same here, where `tuning` is qlora
    evaluation asks for metrics that are missing  a crash
    float32 logits of all tokens, reference in
    every step                                    memory and time; not a number
    pad token = EOS                               padding is not attended to and not a target: there is none here
"""

from collections.abc import Callable

import numpy

from data_prep.files import InputError

QUIRKS = frozenset({
    "separate_tokenization", "doubled_eos", "joint_truncation", "first_turn", "tie_break", "float16_compute",
    "rank0_metrics",
})  # fmt: skip
TIE_BREAK = 0.01
EVALUATION_SHUFFLE = 42  # seed with which the released code shuffles also its test split


def parse_quirks(text: str) -> frozenset[str]:
    """The switches of a recipe's `quirks`: "" for none, "official" for all, or names separated by commas.
    InputError for a name that is not known."""
    names = frozenset(name.strip() for name in text.split(",")) - {""}
    if names == {"official"}:
        return QUIRKS
    if names - QUIRKS:
        raise InputError(
            f"recipe: quirks: {', '.join(sorted(names - QUIRKS))} unknown; known are official (all of them) or some "
            f"of {', '.join(sorted(QUIRKS))}"
        )
    return names


def alpha_of(temperature_alpha: float) -> float:
    """The paper's alpha of the released code's `temperature_alpha`, which are the same number.

    A comment there calls it 1 / alpha, but the code divides scores by it: its labels are softmax(score /
    temperature_alpha), the paper's are softmax(reward / alpha). InputError unless above 0.
    """
    if not temperature_alpha > 0:
        raise InputError(f"temperature_alpha = {temperature_alpha}: the released code divides by it; above 0")
    return temperature_alpha


def break_tie(rewards: list[float]) -> list[float]:
    """tie_break: the rewards with 0.01 more for the best one (the first among equals)."""
    best = rewards.index(max(rewards))
    return [reward + TIE_BREAK * (i == best) for i, reward in enumerate(rewards)]


def first_turn(
    prompt: list[dict[str, str]], response: str, render: Callable[..., str]
) -> tuple[list[dict[str, str]], str]:
    """first_turn: the messages of the prompt, and the rendered text of the response up to its end of turn.

    render(messages, generation) is the chat template without BOS; generation adds what opens an answer.
    """
    conversation = [*prompt, {"role": "assistant", "content": response}]
    users = [message for message in conversation if message["role"] == "user"]
    if not users:
        raise InputError("the prompt has no user turn, and the quirk first_turn takes only that; drop the row")
    system = conversation[0] if conversation[0]["role"] == "system" else {"role": "system", "content": ""}
    opening = render(users[:1], True).removeprefix(render(users[:1], False))
    text = render(conversation[1:], False).removeprefix(opening)
    return [system, users[0]], text.removesuffix(end_of_turn(render))


def end_of_turn(render: Callable[..., str]) -> str:
    """What the chat template writes behind an answer: EOS and a newline in the Zephyr template."""
    marker = "ANSWER"
    answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}]
    return render(answer, False).rpartition(marker)[2]


def cut_jointly(
    prompt_ids: list[int], response_ids: list[list[int]], max_tokens: int, max_prompt_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """joint_truncation of one row, ids of the responses with all their EOS."""
    longest = max(map(len, response_ids))
    if len(prompt_ids) + longest > max_tokens:
        prompt_ids = prompt_ids[-max_prompt_tokens:]
    if len(prompt_ids) + longest > max_tokens:
        response_ids = [ids[: max_tokens - max_prompt_tokens] for ids in response_ids]
    return prompt_ids, response_ids


def rank_share(rows: int, rank: int, devices: int) -> list[int]:
    """rank0_metrics: which of the rows, by their place in the released file, process `rank` of `devices` evaluates.

    The released code shuffles the test split with seed 42 (get_datasets of the alignment-handbook, by
    `datasets.Dataset.shuffle`) and evaluates one prompt per device, dealt in turn. Where rows do not divide,
    accelerate deals the first ones again; this is left out.
    """
    return numpy.random.default_rng(EVALUATION_SHUFFLE).permutation(rows)[rank::devices].tolist()
