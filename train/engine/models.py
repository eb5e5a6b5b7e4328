"""Loading and saving models and tokenizers; making the small ones that are trained from scratch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from data_prep.files import InputError, read_json, sha256_text
from data_prep.manifest import file_digest
from train.engine.attention import NAME as ATTENTION_NAME
from train.engine.experts import EXPERT_LAYERS, separate_experts
from train.engine.logps import packable
from train.engine.official import parse_quirks
from train.engine.recipe import AlignmentRecipe

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"
# Turns as in the Zephyr template, without its newlines: each marker is one token, so that no merge can cross
# the boundary between prompt and response.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
transformers_logging.disable_progress_bar()  # weights load in a blink here; the bars that matter are ours


# All projections of attention and of the feed-forward layers, as in the released recipe. A mixture's experts are two
# three-dimensional parameters in current transformers, not modules; its router stays as it is.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTED = {
    "mistral": {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "mixtral": {
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
BASE_FILE = "base.json"  # beside an adapter: the model it belongs to


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from: a local directory, or a Hub id with its pinned revision (a commit).

    A directory may hold a whole model, or an adapter with the base that it belongs to (in base.json).
    """

    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        """InputError for a Hub id without a revision: its weights could change between two runs."""
        if not self.is_local and not self.revision:
            raise InputError(
                f"{self.name}: no such directory; for a model from the Hub name its commit with --model-revision"
            )

    @classmethod
    def of(cls, recipe: AlignmentRecipe) -> "Checkpoint":
        """The reference policy that a recipe starts from."""
        if not recipe.model:
            raise InputError("the recipe names no model; give --model")
        return cls(recipe.model, recipe.model_revision or None)

    @property
    def is_local(self) -> bool:
        """Whether the name is a directory."""
        return Path(self.name).is_dir()

    @property
    def digest(self) -> str:
        """Content of a local directory, or the name and commit on the Hub."""
        return file_digest(self.name) if self.is_local else sha256_text(f"{self.name}@{self.revision}")

    def load(
        self, *, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None,
        quantized: torch.dtype | None = None, dequantized: bool = False, attention: str = "auto",
        router_aux_loss: bool = False, device_map: Any = None,
        adapt: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
        """The model, without dropout and `packable`, and its tokenizer; InputError if they cannot be read.

        dtype: of the forward pass. weights: of the weights, if not `dtype`. quantized: nf4 weights, computing in this
        dtype. dequantized: not even the base of an adapter that was trained so. attention, router_aux_loss: see
        `packable`. device_map: as transformers takes it. adapt: puts new adapters on the model.
        Only safetensors are read and no code of the checkpoint is run. An adapter is put on its recorded base, in the
        quantization that it was trained on, and refused on any other.
        """
        name, revision = self.name, self.revision
        adapter = self.is_local and (Path(self.name) / "adapter_config.json").exists()
        if adapter:
            base, quantization = _recorded_base(Path(self.name))
            name, revision = base.name, base.revision
            quantized = None if dequantized else quantized or quantization
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        loading = {"dtype": weights or dtype, "device_map": device_map}
        if quantized:
            if device_map is None and self._is_mixture(name, options):
                loading["device_map"] = {"": "cpu"}  # whole experts would not fit a card; single ones move there below
            loading["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=quantized
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.name, **({"trust_remote_code": False} if adapter else options)
            )
            model = AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=True, attn_implementation=ATTENTION_NAME, **loading, **options
            )
            if quantized or (adapter and quantization):  # adapters of a quantized mixture belong to single experts
                separate_experts(model, quantized)
            if adapter:
                model = PeftModel.from_pretrained(model, self.name, use_safetensors=True)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise InputError(f"{self.name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
        if adapt is not None:
            model = adapt(model)
        for module in model.modules():
            # Else bitsandbytes repacks weights on a CPU with AVX512-BF16 when they are evaluated, computes in bfloat16
            # from then on, and gives no gradient any more.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        disable_dropout(model)
        return packable(model, attention, dtype, router_aux_loss), tokenizer

    def _is_mixture(self, name: str, options: dict[str, Any]) -> bool:
        try:
            return hasattr(AutoConfig.from_pretrained(name, **options), "num_local_experts")
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: no configuration ({' '.join(str(error).split())[:300]})") from None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone; InputError if it cannot be read."""
        try:
            return AutoTokenizer.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.name}: no tokenizer ({' '.join(str(error).split())[:300]})") from None


def _recorded_base(adapter: Path) -> tuple[Checkpoint, torch.dtype | None]:
    """The base of an adapter, and the compute dtype of its quantization; InputError unless it is the recorded one."""
    if not (adapter / BASE_FILE).exists():
        raise InputError(f"{adapter}: an adapter without {BASE_FILE}: its base is unknown; train it again")
    recorded = read_json(adapter / BASE_FILE)
    try:
        base = Checkpoint(recorded["name"], recorded["revision"])
        if base.digest != recorded["digest"]:
            raise InputError(
                f"{adapter}: was trained on {recorded['name']} with digest {recorded['digest'][:12]}, which is "
                f"{base.digest[:12]} now; bring the base back"
            )
        return base, getattr(torch, recorded["quantized"]) if recorded["quantized"] else None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{adapter / BASE_FILE}: not a record of a base; train the adapter again") from None


def load_policy(
    checkpoint: Checkpoint, recipe: AlignmentRecipe, device: torch.device, *, spread: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The start of a run, pi = mu, as the recipe trains it: all parameters, or adapters on a frozen base. On the
    CPU until the Trainer moves it, or `spread` over all devices of the machine. InputError for a recipe that does
    not fit the model."""
    computes, full = getattr(torch, recipe.dtype), recipe.tuning == "full"
    quantized = getattr(torch, nf4_compute(recipe)) if recipe.tuning == "qlora" else None
    router = recipe.router_aux_loss == "as_configured"

    def adapt(model: PreTrainedModel) -> PreTrainedModel:
        is_mixture = hasattr(model.config, "num_local_experts")
        if is_mixture and not recipe.router_aux_loss:
            raise InputError(
                f"{checkpoint.name}: a mixture of experts has a load-balancing loss; name it in the recipe "
                "(router_aux_loss: declined or as_configured)"
            )
        if router and not is_mixture:
            raise InputError(f"{checkpoint.name}: no mixture of experts, so there is no router_aux_loss; leave it out")
        if full:
            return model
        if isinstance(model, PeftModel):
            raise InputError(
                f"{checkpoint.name}: an adapter cannot carry adapters; merge it first (python -m train.merge)"
            )
        if model.config.model_type not in ADAPTED:
            known = ", ".join(ADAPTED)
            raise InputError(f"{checkpoint.name}: adapters are known for {known}, not for {model.config.model_type}")
        torch.manual_seed(recipe.seed)  # of the adapters' random half; the other half is zero, so that pi = mu
        targets = ADAPTED[model.config.model_type]
        if is_mixture and quantized:
            targets = {"target_modules": [*ATTENTION, *EXPERT_LAYERS]}
        config = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
            **targets,
        )  # fmt: skip
        return get_peft_model(model, config)

    return checkpoint.load(
        dtype=computes, weights=torch.float32 if full else computes, quantized=quantized, attention=recipe.attention,
        router_aux_loss=router, device_map="auto" if spread else None, adapt=adapt,
    )  # fmt: skip


def nf4_compute(recipe: AlignmentRecipe) -> str:
    """The dtype that nf4 weights are multiplied in."""
    return "float16" if "float16_compute" in parse_quirks(recipe.quirks) else recipe.dtype


def record_base(checkpoint: Checkpoint, recipe: AlignmentRecipe) -> dict[str, Any]:
    """What base.json says of the model that an adapter belongs to."""
    quantized = nf4_compute(recipe) if recipe.tuning == "qlora" else None
    name = str(Path(checkpoint.name).resolve()) if checkpoint.is_local else checkpoint.name
    return {"name": name, "revision": checkpoint.revision, "digest": checkpoint.digest, "quantized": quantized}


def as_reference(policy: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """A context in which a policy with adapters is its base: the reference mu. Without adapters nothing changes,
    so the policy is mu only until it is trained."""
    return policy.disable_adapter() if isinstance(policy, PeftModel) else contextlib.nullcontext()


def disable_dropout(model: PreTrainedModel) -> None:
    """Turn off all dropout, in modules and in the configuration (attention reads it there)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    for name in vars(model.config):
        if name.endswith(("dropout", "_pdrop")):
            setattr(model.config, name, 0.0)


def new_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; every string can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_mistral(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int,
    positions: int, seed: int,
) -> MistralForCausalLM:  # fmt: skip
    """A MistralForCausalLM with random weights: the architecture of Mistral-7B, with tied embeddings."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=feed_forward, max_position_embeddings=positions,
        sliding_window=None, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, attn_implementation="sdpa",
    )  # fmt: skip
    return packable(MistralForCausalLM(config))
