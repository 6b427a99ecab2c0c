"""Tiny random checkpoints of model families, each with a tokenizer that has its family's special tokens.

One token is one byte of UTF-8. The families are those of docs/models.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from template import apply_template
from tests.tiny import byte_backend

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD = "<|pad|>"
CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """What tells one family from another.

    Attributes:
        template: name of its chat template in template.py.
        special: special tokens of that template.
        eos: ends every text.
        bos: begins every text, where the family's tokenizers put it.
        config: on top of the sizes that all share.
        experts: whether the feed-forward layers are mixtures of experts.
        packs: whether packed sequences stay apart.
        vllm: True if vLLM on a CPU gives the same greedy tokens; False if it gives others, since its kernel there turns
            queries wrongly that are not one row per token; what it fails with otherwise; None if not tried.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    experts: bool = False
    packs: bool = True
    vllm: bool | str | None = None


LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
MISTRAL = ("[INST]", "[/INST]", *TOOLS)
GEMMA = ("<start_of_turn>", "<end_of_turn>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK3 = ("<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_ENDS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
COHERE = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
GLM4 = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# Shorter than the texts of the tests, so that it has an effect.
WINDOW = {"sliding_window": 16}
BOTH = {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"], **WINDOW}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# With experts of this size, the answers of random weights differ only if they are wide.
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16, "initializer_range": 0.15}
# The first layer is dense and the second has experts, one of which all tokens share.
ROUTED = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
# Queries, keys and values are compressed; head_dim is the part of a head that is rotated.
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"head_dim": 4, "num_key_value_heads": 4},
}
MINIMAX = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4},
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
# What vLLM on a CPU says to layers of linear attention in float32; in bfloat16 sums differ too much to compare tokens.
GDN = "CPU GDN attention requires BF16"
# Its router there takes the sigmoid of scores only for experts in groups.
SIGMOID = 'assert self.scoring_func == "softmax"'
# Keyed by `model_type` of config.json.
FAMILIES = {
    "llama": Family("llama3", LLAMA3, "<|end_of_text|>", "<|begin_of_text|>", vllm=True),
    "qwen2": Family("qwen", CHATML, "<|endoftext|>", vllm=True),
    "qwen3": Family("qwen3", CHATML, "<|endoftext|>", config={"tie_word_embeddings": True}, vllm=True),
    "mistral": Family("mistral", MISTRAL, "</s>", "<s>", WINDOW, vllm=True),
    "gemma": Family("gemma", GEMMA, "<eos>", "<bos>", vllm=True),
    "gemma2": Family("gemma", GEMMA, "<eos>", "<bos>", BOTH, vllm=True),
    "gemma3_text": Family("gemma", GEMMA, "<eos>", "<bos>", BOTH, vllm=True),
    "phi3": Family("phi3", PHI3, "<|endoftext|>", config=WINDOW, vllm=True),
    "glm": Family("glm4", GLM4, "<|endoftext|>", vllm=True),
    "glm4": Family("glm4", GLM4, "<|endoftext|>", vllm=True),
    "mixtral": Family("mistral", MISTRAL, "</s>", "<s>", {"num_local_experts": 4}, experts=True, vllm=True),
    "qwen3_moe": Family("qwen3", CHATML, "<|endoftext|>", config=EXPERTS, experts=True, vllm=True),
    "qwen2_moe": Family("qwen", CHATML, "<|endoftext|>", config=SHARED, experts=True, vllm=True),
    "qwen3_next": Family(
        "qwen3", CHATML, "<|endoftext|>", config={**SHARED, **LINEAR}, experts=True, packs=False, vllm=GDN
    ),
    "deepseek_v2": Family("deepseek", (), *DEEPSEEK_ENDS, {**LATENT, **ROUTED}, experts=True, vllm=False),
    "deepseek_v3": Family("deepseek3", DEEPSEEK3, *DEEPSEEK_ENDS, {**LATENT, **ROUTED}, experts=True, vllm=False),
    "glm4_moe": Family("glm4", GLM4, "<|endoftext|>", config=ROUTED, experts=True, vllm=True),
    "glm4_moe_lite": Family("glm4", GLM4, "<|endoftext|>", config={**LATENT, **ROUTED}, experts=True, vllm=False),
    "gpt_oss": Family(
        "chatml",
        CHATML,
        "<|endoftext|>",
        config={"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, **WINDOW},
        experts=True,
        packs=False,
        vllm=True,
    ),
    "llama4_text": Family(
        "chatml",
        CHATML,
        "<|endoftext|>",
        config={"num_local_experts": 4, "intermediate_size": 16, "intermediate_size_mlp": 32},
        experts=True,
        vllm=True,
    ),
    "minimax_m2": Family("chatml", CHATML, "<|endoftext|>", config=MINIMAX, experts=True, vllm=SIGMOID),
    "hunyuan_v1_moe": Family(
        "chatml", CHATML, "</s>", "<s>", {"num_experts": 4, "moe_topk": 2}, experts=True, vllm=True
    ),
    "hunyuan_v1_dense": Family("chatml", CHATML, "</s>", "<s>", vllm=True),
    "minicpm3": Family(
        "chatml", CHATML, "</s>", "<s>", {**LATENT, "head_dim": None, "scale_emb": 1, "scale_depth": 8}, vllm=True
    ),
    "ministral3": Family("mistral", MISTRAL, "</s>", "<s>", vllm=True),
    "seed_oss": Family("chatml", CHATML, "</s>", "<s>", vllm=True),
    "ernie4_5": Family("chatml", CHATML, "</s>", "<s>", vllm=True),
    "exaone4": Family("chatml", CHATML, "<|endoftext|>", config=SLIDING, vllm=True),
    "smollm3": Family("chatml", CHATML, "<|endoftext|>", config={"no_rope_layers": [1, 0]}, vllm=True),
    "olmo2": Family("chatml", CHATML, "<|endoftext|>", vllm=True),
    "olmo3": Family("chatml", CHATML, "<|endoftext|>", config=SLIDING, vllm=True),
    "granite": Family("chatml", CHATML, "<|endoftext|>", config={"attention_multiplier": 0.3}, vllm=True),
    "cohere2": Family(
        "cohere", COHERE, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", {"logit_scale": 0.9, **SLIDING}, vllm=True
    ),
    "lfm2": Family(
        "chatml", CHATML, "<|endoftext|>", config={"layer_types": ["conv", "full_attention"]}, packs=False, vllm=False
    ),
}
# Of tests of every family, those in the quick suite.
QUICK = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "glm", "glm4", "mixtral"),
    *("qwen3_moe", "deepseek_v3"),
)
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def vllm_mark(vllm: bool | str | None) -> str:
    """How the tables show `Family.vllm`."""
    return {True: "✓", None: "–"}.get(vllm, "✗")


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """256 bytes, padding, and the family's special tokens; its chat template is installed."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(),
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=PAD,
        additional_special_tokens=list(family.special),
    )
    if family.bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, tokenizer.bos_token_id)],
        )
    apply_template(tokenizer, family.template)
    return tokenizer


def make_family(path: str | Path, name: str, **config: Any) -> str:
    """Save a model of two layers and its tokenizer in the folder `path`, and return it as a string."""
    family = FAMILIES[name]
    tokenizer = family_tokenizer(family)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # Wide enough that the scores of random weights differ clearly.
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**settings, **family.config, **config}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


class Followed:
    """What training does to each parameter: its largest gradient, and whether it moves.

    Args:
        model: before training.
    """

    def __init__(self, model: torch.nn.Module):
        self.parameters = dict(model.named_parameters())
        self.before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.largest = dict.fromkeys(self.parameters, 0.0)
        self.declared = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        for name in self.declared:
            self.parameters[name].register_post_accumulate_grad_hook(lambda found, name=name: self._note(name, found))

    def _note(self, name: str, parameter: torch.nn.Parameter) -> None:
        self.largest[name] = max(self.largest[name], parameter.grad.abs().max().item())

    def with_gradient(self) -> set[str]:
        return {name for name, gradient in self.largest.items() if gradient > 0}

    def moved(self) -> set[str]:
        return {name for name, old in self.before.items() if not old.equal(self.parameters[name].detach())}


def stage_flags(data: Path, stage: str, model: str | Path, out: Path, *more: Any) -> list[Any]:
    """Flags of a short run of a stage on the rows in its folder of `data`."""
    return [
        *("--model_name_or_path", model, "--train_file_dir", data / stage, "--output_dir", out, "--max_steps", 3),
        *("--save_strategy", "no", "--sample_prompts", 0, "--learning_rate", 1e-2, "--max_grad_norm", 0, *more),
    ]
