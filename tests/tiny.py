"""A tiny Qwen3 on disk: random weights, or a few answers learned by heart. One token is one byte of UTF-8."""

from pathlib import Path

from template import apply_template

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"


def byte_backend() -> Tokenizer:
    """A token for each of 256 bytes, and nothing else."""
    backend = Tokenizer(
        BPE(vocab={char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, four special tokens, the template `chatml`. A Chinese character has three tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(),
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
    )
    apply_template(tokenizer, "chatml")
    return tokenizer


def make_tiny(
    path: str | Path,
    *,
    answers: dict[str, str] | None = None,
    never_stops: bool = False,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> str:
    """Save a model and its tokenizer in the folder `path`, and return it as a string.

    Args:
        answers: question -> answer, trained until they are known by heart.
        never_stops: the saved generation settings forbid the tokens that end a turn.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=max_position_embeddings,
            # Wide enough that the scores of random weights differ clearly.
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if answers:
        _learn(model, tokenizer, answers)
    ends = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    model.generation_config.eos_token_id = ends
    model.generation_config.suppress_tokens = ends if never_stops else None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _learn(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, answers: dict[str, str]) -> None:
    rows = []
    for question, answer in answers.items():
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(
            [*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False, return_dict=False
        )
        rows.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(400):
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"the answers were not learned (loss {loss:.3f})"
    model.eval()


def save_encoder(folder: Path) -> str:
    """A random BERT of one layer over bytes, with the mean of its tokens as the embedding; returns its folder."""
    # Most tests need neither.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return str(folder / "model")
