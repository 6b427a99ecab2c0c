"""Build a very small base model with random weights, to try every stage on a laptop in minutes.

    python build_tiny_model.py --output_dir outputs/tiny-base
    python pretraining.py --model_name_or_path outputs/tiny-base --train_file_dir data/pretrain --output_dir outputs/pt

The architecture is Qwen3 with tied embeddings and about 4 million parameters, so what runs with it also runs with real
models. The tokenizer is a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) trained on the
sample texts: any text can be encoded and decoded without loss. Nothing is downloaded. The model knows nothing
before pretraining, and after all stages only the few facts in the samples.

In `output_dir`: config.json, generation_config.json, model.safetensors and the tokenizer with the `chatml` template.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.args import MAX_SEED, DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError, run_main
from medicalgpt.files import overlap
from medicalgpt.formats.conversion import to_messages, to_text
from medicalgpt.logs import setup_logging
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.training.folder_lock import FolderLock
from medicalgpt.training.output_folder import PreviousRun, recover, replace_model
from template import apply_template

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

ROLES = ("system", "user", "assistant")
END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
BYTES = 256


def main() -> None:
    """Train the tokenizer, initialize the weights, save both."""
    args = parse_args()
    setup_logging()
    check_output_dir(args.output_dir, args.overwrite_output_dir, args.data_dir)
    started = time.perf_counter()

    tokenizer = train_tokenizer(training_texts(args.data_dir), args.vocab_size, args.max_position_embeddings)
    stop = apply_template(tokenizer, "chatml")
    # A base model ends texts, not turns: fine-tuning makes the turn end the EOS token.
    tokenizer.eos_token = END_OF_TEXT
    model = build_model(tokenizer, stop_token_ids(tokenizer, stop), args)

    with replace_model(args.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vocabulary: {len(tokenizer):,} tokens")
    print(f"parameters: {parameters:,}")
    print(f"saved to {args.output_dir} in {time.perf_counter() - started:.1f} s")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where to save the model")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder with pretrain/ and finetune/")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens, including special tokens and bytes")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--intermediate_size", type=int, default=704)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--num_kv_heads", type=int, default=2, help="key-value heads; must divide --num_heads")
    parser.add_argument("--max_position_embeddings", type=int, default=2048, help="maximum context length in tokens")
    parser.add_argument("--seed", type=int, default=42, help="seed of the random weights")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace a model that is already there")
    args = parser.parse_args()
    if args.hidden_size % args.num_heads or args.hidden_size // args.num_heads % 2:
        parser.error(f"--hidden_size {args.hidden_size} must be an even multiple of --num_heads {args.num_heads}")
    if args.num_heads % args.num_kv_heads:
        parser.error(f"--num_kv_heads {args.num_kv_heads} must divide --num_heads {args.num_heads}")
    if args.vocab_size < BYTES + 4:
        parser.error(f"--vocab_size {args.vocab_size} must be {BYTES + 4} or more: every byte needs a token")
    if not 0 <= args.seed <= MAX_SEED:
        parser.error(f"--seed {args.seed} must be between 0 and {MAX_SEED}")
    return args


def check_output_dir(output_dir: Path, overwrite: bool, data_dir: Path) -> None:
    """Raise UserError if the texts are in the output folder, or a model would be replaced and `overwrite` is False."""
    if data_dir.exists() and (how := overlap(output_dir, data_dir)) in ("is", "contains"):
        raise UserError(f"--output_dir {output_dir} {how} --data_dir {data_dir}. Choose another --output_dir.")
    with FolderLock(output_dir):
        recover(output_dir)
    model = PreviousRun.model_in(output_dir)
    present = ", ".join(path.name for path in model.files())
    if present and not overwrite:
        raise UserError(
            f"{output_dir} already holds a model ({present}).\n"
            "Choose another --output_dir, or add --overwrite_output_dir to replace it."
        )


def training_texts(data_dir: Path) -> Iterator[str]:
    """Every training text in `data_dir`: the documents of pretrain/ and the turns of finetune/, in any known format.

    Raises:
        UserError: a folder is missing, or contains a row that cannot be used.
    """
    for folder, convert in (("pretrain", to_text), ("finetune", to_messages)):
        arguments = DataArguments(train_file_dir=str(data_dir / folder))
        data = load_data(arguments, convert)
        data.settle(arguments)
        for row in data.train:
            if "text" in row:
                yield row["text"]
            else:
                # The template writes the role before each turn; given with every row, each role becomes one token.
                yield from (*ROLES, *(message["content"] for message in row["messages"]))


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every Han character is a separate unit.

    A BPE trained on little Chinese text merges across words, so the same name is split differently in each sentence
    and a small model cannot learn it. Splitting at Han characters first makes every frequent character one token, the
    same in every sentence; rare ones fall back to their UTF-8 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, stop_ids: list[int], args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 model with weights drawn from `args.seed`, in float32; generation stops at any of `stop_ids`."""
    set_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads,
        head_dim=args.hidden_size // args.num_heads,
        max_position_embeddings=args.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    return model


if __name__ == "__main__":
    run_main(main)
