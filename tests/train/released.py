"""The released code's tokens and log-probs, written from their description, by other means than the engine's.

One full sequence for each response, right-padded, with a two-dimensional mask and labels, and full logits.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data_prep.rows import Row

# Renders as the Zephyr template: each turn is its marker, a newline, the content, EOS and a newline; no BOS.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
NO_LABEL = -100


def zephyr_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, with the merge a + b -> ab. As Mistral's tokenizer does, it puts a mark ("_") before a text and behind
    each special token, so that a response encoded apart is not the tail of the joined text."""
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]  # ids 0 to 4
    names = [*specials, "\n", "a", "b", "ab", "_", *"cdefghij"]  # "\n" 5, a 6, b 7, ab 8, _ 9, c 10, ...
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("a", "b")]))
    tokenizer.normalizer = normalizers.Prepend("_")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=specials[2:],
        chat_template=TEMPLATE,
    )  # fmt: skip


def released_sequences(
    tokenizer: PreTrainedTokenizerFast, row: Row, max_tokens: int, max_prompt: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, mask, labels) of prompt + response for each response of a single-turn row."""
    eos = tokenizer.eos_token_id

    def encode(text: str) -> tuple[list[int], list[int]]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids, [0 if i == eos else 1 for i in ids]

    (question,) = (message["content"] for message in row.prompt)
    prompt, prompt_mask = encode(f"<|system|>\n</s>\n<|user|>\n{question}</s>\n<|assistant|>\n")
    answers = []
    for text in row.responses:
        ids, mask = encode(f"{text}</s>\n")
        answers.append(([*ids, eos], [*mask, 1]))
    longest = max(len(ids) for ids, _ in answers)
    if len(prompt) + longest > max_tokens:
        prompt, prompt_mask = prompt[-max_prompt:], prompt_mask[-max_prompt:]
        if len(prompt) + longest > max_tokens:
            keep = max_tokens - max_prompt
            answers = [(ids[:keep], mask[:keep]) for ids, mask in answers]
    return [(prompt + ids, prompt_mask + mask, [NO_LABEL] * len(prompt) + ids) for ids, mask in answers]


@torch.no_grad()
def released_logps(model: nn.Module, sequences: list[tuple[list[int], list[int], list[int]]]) -> list[float]:
    """Summed log-probs of the labels, one forward pass over all sequences, padded on the right."""
    longest = max(len(ids) for ids, _, _ in sequences)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    ids, masks, labels = (list(column) for column in zip(*sequences, strict=True))
    logits = model(padded(ids, 0), attention_mask=padded(masks, 0)).logits.double()[:, :-1]
    labels = padded(labels, NO_LABEL)[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (labels != NO_LABEL)).sum(-1).tolist()
