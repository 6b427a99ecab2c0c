"""A model as a server's clients know it: its name, and what its chat template can render."""

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

from medicalgpt.models.templating import tool_format_of
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import REPLACEMENT
from medicalgpt.serving.guides import GuideMaker

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
# What a request cannot set, since the server does: the conversation, and how it is rendered.
OWN_VARIABLES = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
_THOUGHT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
    {"role": "user", "content": "d"},
]


class ServedModel:
    """A name in requests, and what answers to it.

    Attributes:
        form: how it writes calls; None if its chat template cannot render tools.
        takes_thoughts: whether its chat template knows what to do with the reasoning of earlier answers.
        guides: compiles the grammars that its answers are held to.
    """

    def __init__(self, name: str, engine: ChatEngine):
        self.name = name
        self.engine = engine
        self.form = tool_format_of(engine.tokenizer)
        self.takes_thoughts = _renders(engine.tokenizer, _THOUGHT)
        self.vocabulary: int = engine.model.config.get_text_config().vocab_size
        self.guides = GuideMaker(engine.tokenizer, self.vocabulary, engine.stop_ids)
        self.bytes_of = lru_cache(maxsize=None)(partial(token_bytes, engine.tokenizer))

    def known_variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Those that the chat template reads.

        Raises:
            ValueError: one of them is not a request's to set.
        """
        tokenizer = self.engine.tokenizer
        if own := sorted((OWN_VARIABLES | set(tokenizer.special_tokens_map)) & set(variables)):
            raise ValueError(f"{', '.join(own)}: the server sets this itself.")
        template = tokenizer.chat_template or ""
        return {name: value for name, value in variables.items() if re.search(rf"\b{re.escape(name)}\b", template)}


def _renders(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> bool:
    """Whether a chat template takes messages; templates refuse what they cannot render."""
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    # A template may raise anything.
    except Exception:
        return False
    return True


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    """The bytes of a token; a character may be split over several tokens. None if they are unknown."""
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if REPLACEMENT not in text:
        # The space before a first word is not decoded.
        return (" " + text if name.startswith("▁") and not text.startswith(" ") else text).encode()
    return bytes(BYTES[char] for char in name) if all(char in BYTES for char in name) else None


def token_text(known: bytes | None) -> str:
    try:
        return (known or b"").decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)
