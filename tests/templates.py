"""Conversations for chat templates, tokenizers of every kind, and what a template makes of the one with the other."""

import json
from pathlib import Path

from template import TEMPLATES, get_template

import jinja2
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILY_TOKENS = [token for template in TEMPLATES.values() for token in template.tokens]
ALL_TOKENS = list(dict.fromkeys(["<|endoftext|>", "<s>", "</s>", *CHATML_TOKENS, *LLAMA3_TOKENS, *FAMILY_TOKENS]))
# A few templates of each kind: test_template.py tries these with every tokenizer, tests/silent has the others.
CORE = ("chatml", "qwen", "qwen3", "llama3", "vicuna", "alpaca")

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'the "dose" of a drug, 查剂量 <mg>',
        "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}, "required": ["drug"]},
    },
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


def call(arguments: dict | str) -> dict:
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}}


SYSTEM = {"role": "system", "content": "You are a doctor. 你是医生。"}
ASPIRIN = '{"drug": "阿司匹林"}'
HERMES = '<tool_call>\n{"name": "look_up", "arguments": ' + ASPIRIN + "}\n</tool_call>"
ACTION = "Action: look_up\nAction Input: " + ASPIRIN
LLAMA = '{"name": "look_up", "parameters": ' + ASPIRIN + "}"
NO_THOUGHT = "<think>\n\n</think>\n\n"

# name -> messages, tools, supervised texts without the turn end: in general, of llama3, of qwen3.
# None: as in general; []: not supported.
CASES = {
    "one_turn": (
        [user("I have a headache."), assistant("Drink water. 多喝水，早点睡。")],
        None,
        ["Drink water. 多喝水，早点睡。"],
        None,
        [NO_THOUGHT + "Drink water. 多喝水，早点睡。"],
    ),
    "many_turns": (
        [
            user("你好"),
            assistant("你好！"),
            user("3 drugs?"),
            assistant("1. a\n\n2. b"),
            user("Why?"),
            assistant("(so) "),
        ],
        None,
        ["你好！", "1. a\n\n2. b", "(so) "],
        ["你好！", "1. a\n\n2. b", "(so)"],
        ["你好！", "1. a\n\n2. b", NO_THOUGHT + "(so) "],
    ),
    "system": (
        [SYSTEM, user("Hi"), assistant("Hello, what hurts?")],
        None,
        ["Hello, what hurts?"],
        None,
        [NO_THOUGHT + "Hello, what hurts?"],
    ),
    "tools": (
        [
            user("Dose?"),
            assistant(None, tool_calls=[call({"drug": "阿司匹林"})]),
            tool("100 mg"),
            assistant("100 mg 一天。"),
        ],
        [TOOL],
        [HERMES, "100 mg 一天。"],
        [LLAMA, "100 mg 一天。"],
        [HERMES, NO_THOUGHT + "100 mg 一天。"],
    ),
    "tools_system_text_and_json_arguments": (
        [
            SYSTEM,
            user("Dose?"),
            assistant("One moment.", tool_calls=[call(ASPIRIN)]),
            tool("100 mg"),
            assistant("Take it."),
        ],
        [TOOL],
        ["One moment.\n" + HERMES, "Take it."],
        ["One moment.\n" + LLAMA, "Take it."],
        ["One moment.\n" + HERMES, NO_THOUGHT + "Take it."],
    ),
    "parallel_tools": (
        [
            user("Dose?"),
            assistant("", tool_calls=[call(ASPIRIN)] * 2),
            tool("100 mg"),
            tool("200 mg"),
            assistant("Both."),
        ],
        [TOOL],
        [HERMES + "\n" + HERMES, "Both."],
        [],
        [HERMES + "\n" + HERMES, NO_THOUGHT + "Both."],
    ),
    "thinking": (
        [
            user("Hi"),
            assistant("Hello.", reasoning_content="a greeting"),
            user("Dose?"),
            assistant("", reasoning_content="look it up", tool_calls=[call(ASPIRIN)]),
            tool("100 mg"),
            assistant("100 mg.", reasoning_content="so be it"),
        ],
        [TOOL],
        [],
        [],
        ["Hello.", "<think>\nlook it up\n</think>\n\n" + HERMES, "<think>\nso be it\n</think>\n\n100 mg."],
    ),
    "thinking_inline": (
        [
            user("Hi"),
            assistant("<think>\na greeting\n</think>\n\nHello."),
            user("And?"),
            assistant("<think>\n想一想\n</think>\n\nSleep."),
        ],
        None,
        ["<think>\na greeting\n</think>\n\nHello.", "<think>\n想一想\n</think>\n\nSleep."],
        None,
        ["Hello.", "<think>\n想一想\n</think>\n\nSleep."],
    ),
}


def text_of(tokenizer, messages, tools=None, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)


def takes(name: str, message: dict) -> bool:
    """Whether a template renders a conversation with this message rather than refusing it."""
    messages = [message, user("Hi"), assistant("Hello.")] if message["role"] == "system" else [user("Hi"), message]
    tools = [TOOL] if "tool_calls" in message else None
    try:
        return bool(text_of(ANY_TOKENIZER, messages, tools, chat_template=get_template(name).jinja))
    except jinja2.TemplateError:
        return False


def repeats_bos(name: str) -> bool:
    """Whether a family writes the token `<s>` in every round, not only at the beginning."""
    messages = CASES["many_turns"][0]
    return text_of(ANY_TOKENIZER, messages, chat_template=get_template(name).jinja, bos_token="<s>").count("<s>") > 1


def expected_spans(name: str, case: str) -> list[str]:
    general, llama3, qwen3 = CASES[case][2:]
    special = {"llama3": llama3, "qwen3": qwen3}.get(name)
    texts = general if special is None else special
    return [text.replace(HERMES, ACTION) for text in texts] if name in ("vicuna", "alpaca") else texts


SUPPORTED = [(name, case) for name in CORE for case in CASES if expected_spans(name, case)]

# Text with the boundaries of the templates in it, so that merges over a boundary are learned where the pre-tokenizer
# does not prevent them.
CORPUS = [
    "A chat between a curious user and an assistant. USER: I have a headache. ASSISTANT: Drink water. 多喝水。",
    "### Instruction:\nI have a headache.\n\n### Response:\nDrink water. 多喝水。\n\n### Instruction:\n你好",
    "assistant\nDrink water.\nuser\nHello. 你好！\nassistant\n<think>\n\n</think>\n\nDrink water.\n\n你好",
] * 8


def byte_level(bos: str | None, adds_bos: bool, eos: str = "<|endoftext|>", tokens=ALL_TOKENS, like_qwen: bool = False):
    """Byte-level BPE; like_qwen: line breaks join the punctuation before them."""
    backend = Tokenizer(models.BPE())
    if like_qwen:
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=490 + len(tokens), special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    processor = processors.ByteLevel(trim_offsets=False)
    if adds_bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        processor = processors.Sequence([processor, template])
    backend.post_processor = processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def metaspace(prepend: str, tokens=ALL_TOKENS):
    """As SentencePiece models come: spaces are ▁, unknown characters bytes, <s> before the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    characters = sorted({c for text in CORPUS for c in text.replace("\n", "") if c < "\u2e80" and c != " "} | {"▁"})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    backend.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    # In real tokenizers bytes are not special tokens, which decoding would skip.
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in bytes_]
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in tokens if token not in ("<s>", "</s>")],
    )


TOKENIZERS = {
    "byte_without_bos": lambda: byte_level(None, False),
    "byte_adds_bos": lambda: byte_level("<s>", True),
    "byte_has_bos_adds_none": lambda: byte_level("<s>", False),
    "byte_like_qwen": lambda: byte_level(None, False, like_qwen=True),
    "byte_bos_opens_turns": lambda: byte_level("<|im_start|>", False),
    "byte_bos_opens_turns_and_is_added": lambda: byte_level("<|im_start|>", True),
    "metaspace": lambda: metaspace("first"),
    "metaspace_legacy": lambda: metaspace("always"),
}
ANY_TOKENIZER = TOKENIZERS["byte_without_bos"]()
THINKING = {name for name in TEMPLATES if takes(name, assistant("Hello.", reasoning_content="a greeting"))}
NO_TOOLS = {name for name in TEMPLATES if not takes(name, assistant("", tool_calls=[call({"drug": "阿司匹林"})]))}
NO_SYSTEM = {name for name in TEMPLATES if not takes(name, SYSTEM)}


def ids_and_spans(tokenizer, messages, tools=None, **kwargs) -> tuple[list[int], list[tuple[int, str]]]:
    """Token ids and, for each supervised run, its start and its decoded text."""
    batch = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    ids, mask = batch["input_ids"], batch["assistant_masks"]
    spans, start = [], None
    for i, supervised in enumerate([*mask, 0]):
        if supervised and start is None:
            start = i
        elif not supervised and start is not None:
            spans.append((start, tokenizer.decode(ids[start:i], clean_up_tokenization_spaces=False)))
            start = None
    return ids, spans


def official(name: str) -> str:
    """A chat template as published, from the data files of TRL."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
