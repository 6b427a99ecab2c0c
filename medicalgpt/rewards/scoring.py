"""Reward models: score conversations, as a reward function of GRPO, and the rows of a file.

The score is one number, read at the last token that is not padding. transformers recognizes padding by its id
(`config.pad_token_id`), not by the attention mask, so a model that pads with the token that ends its answers would be
read before that end. `choose_padding` picks another token.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medicalgpt.data.encoding import EncodingError, encode_answered, refuse_special_tokens
from medicalgpt.data.lengths import describe_lost_rows
from medicalgpt.errors import UserError
from medicalgpt.files import refuse_overwriting
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.formats.fields import PREFERENCE_FIELDS
from medicalgpt.logs import heartbeat
from medicalgpt.models import adapters, loading
from medicalgpt.models.attention import context_length
from medicalgpt.models.hub import HEADS, Adapter, Checkpoint, CheckpointError
from medicalgpt.readers.folders import format_of
from medicalgpt.readers.problems import SHOWN_PROBLEMS, Problem, RowError, SourceRow, advise, format_problems, place_of
from medicalgpt.readers.sources import read_rows
from medicalgpt.rewards.rewards import RewardFunction

import torch
from jinja2 import TemplateError
from loguru import logger
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any]

HEAD_NAME = re.compile(rf"(?:^|\.)(?:{'|'.join(HEADS)})(?:\.modules_to_save\.\w+)?$")
# A parameter of the head in a model with an adapter; the adapter's file omits the middle part of the name.
TRAINED_HEAD = re.compile(rf"(?P<head>.*\.(?:{'|'.join(HEADS)}))\.modules_to_save\.\w+(?P<part>\.\w+)")
# Rows are scored and written in chunks of this many batches: enough to group by length, few to lose.
BATCHES_PER_WRITE = 16


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a model with a head of one output, the score.

    Raises:
        CheckpointError: a head with several outputs, a classifier.
    """
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return False
    if config.num_labels != 1:
        raise CheckpointError(
            f"{config.name_or_path} has a head with {config.num_labels} outputs: it is a classifier, and a reward "
            "model has one output. Start from a language model, or from a reward model."
        )
    return True


def is_reward_adapter(adapter: Adapter) -> bool:
    """Whether an adapter belongs to a reward model: low-rank matrices and a head with one output.

    Raises:
        CheckpointError: its head is missing or has several outputs.
    """
    if adapter.config.get("task_type") != "SEQ_CLS":
        return False
    outputs = adapters.head_outputs(adapter)
    if outputs != 1:
        found = f"a head with {outputs} outputs" if outputs else "no head, so that its scores would be random"
        raise CheckpointError(f"the adapter {adapter.path} has {found}; a reward model has a head with one output.")
    return True


def choose_padding(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> str:
    """A padding token that does not end answers: the tokenizer's own if possible, else another special token.

    Args:
        tokenizer: with its chat template.
        ends: token ids that end answers, as `templating.stop_token_ids` returns them.

    Raises:
        UserError: no other special token exists.
    """
    ends = set(ends)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer.pad_token
    # Some families give the embedding of the padding token no gradient, so texts must not contain it.
    template = tokenizer.chat_template or ""
    free = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in ends and token.content not in template and number != tokenizer.bos_token_id
    ]
    if not free:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token}, which also ends answers, and has no other special token: "
            "scores would be read before the end of an answer. Add a separate padding token "
            '(tokenizer.add_special_tokens({"pad_token": "<|pad|>"}), tokenizer.save_pretrained("my-tokenizer")) and '
            "pass --tokenizer_name_or_path my-tokenizer"
        )
    return min(free, key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token))


def restore_head(model: torch.nn.Module, adapter: Adapter) -> None:
    """Load the head's float32 weights from an adapter's file; peft rounds them to the dtype of the base.

    Call it after attaching the adapter and before `score_in_float32`. Does nothing under ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        return
    with safe_open(Path(adapter.path) / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
        for name, parameter in model.named_parameters():
            match = TRAINED_HEAD.fullmatch(name)
            if match and (key := match["head"] + match["part"]) in saved:
                parameter.data = file.get_tensor(key).to(parameter.device, torch.float32)


def score_in_float32(model: torch.nn.Module) -> None:
    """Compute the head in float32, whatever the dtype of the model: bfloat16 keeps three digits of a score.

    Call it after `restore_head`. Does nothing under ZeRO-3, which gathers a weight for its own module only.
    """
    if is_deepspeed_zero3_enabled():
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and HEAD_NAME.search(name):
            module.register_forward_pre_hook(_cast_input)
            module.register_forward_hook(_recompute_output)


def _cast_input(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(),) if module.weight.dtype == torch.float32 else inputs


def _recompute_output(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    weight, bias = module.weight, module.bias
    if weight.dtype == inputs[0].dtype == output.dtype == torch.float32:
        return output
    with torch.autocast(weight.device.type, enabled=False):
        hidden = inputs[0].to(weight.device).float()
        return torch.nn.functional.linear(hidden, weight.float(), None if bias is None else bias.float())


class RewardScorer:
    """A reward model and its tokenizer, ready to score conversations that end with an answer.

    A score does not depend on the other conversations in the batch. The input is messages, not token ids, so that the
    policy may have another tokenizer: they are rendered with the reward model's own chat template, up to the end of the
    last answer if the template marks answers with `{% generation %}`, and completely otherwise.

    Args:
        model: with a head of one output, with or without adapter. A padding token is set in its `config` if missing.
        tokenizer: its tokenizer, with a chat template.

    Raises:
        UserError: no chat template, or no token to pad with.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.context_length = context_length(model.config)
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer of the reward model has no chat template, so conversations cannot be tokenized. Pass "
                "one that has a template: --tokenizer_name_or_path."
            )
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            example = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
            ends = {tokenizer.eos_token_id, self.encode(example)[-1]}
            config.pad_token_id = tokenizer.convert_tokens_to_ids(choose_padding(tokenizer, ends))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        tokenizer_name_or_path: str | None = None,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        device_map: str | None = None,
        hub: str = "huggingface",
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> "RewardScorer":
        """Load a reward model: a full model, or the folder of an adapter (its base is found automatically).

        Raises:
            UserError: it cannot be found; see also `from_checkpoint`.
        """
        checkpoint = Checkpoint.resolve(
            name_or_path, tokenizer=tokenizer_name_or_path, hub=hub, revision=revision, cache_dir=cache_dir
        )
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, device_map=device_map
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        device_map: str | None = None,
    ) -> "RewardScorer":
        """Load a reward model from a resolved checkpoint.

        Args:
            device_map: see accelerate. None: one accelerator if available, else the CPU.

        Raises:
            UserError: it is not a reward model, or has no trained head.
        """
        base, adapter = checkpoint.source, checkpoint.adapter
        is_complete = is_reward_model(checkpoint.config)
        if not (is_reward_adapter(adapter) if adapter else is_complete):
            kind = "an adapter of a language model" if adapter else "a language model"
            raise CheckpointError(
                f"{checkpoint.name} is {kind}, without a scoring head. Train one: python reward_modeling.py "
                f"--model_name_or_path {checkpoint.name} --train_file_dir data/reward"
            )
        tokenizer = loading.checkpoint_tokenizer(checkpoint)
        # The adapter brings the head that the base lacks; transformers would warn that it is newly initialized.
        with suppress_seqcls_warning() if adapter else nullcontext():
            model, found = loading.load_model(
                AutoModelForSequenceClassification,
                base,
                config=checkpoint.config,
                dtype=dtype,
                load_in_4bit=load_in_4bit,
                load_in_8bit=load_in_8bit,
                device_map=device_map,
                revision=checkpoint.revision,
                cache_dir=checkpoint.cache_dir,
                num_labels=1,
                output_loading_info=True,
            )
        if missing := sorted(found["missing_keys"]) if is_complete else []:
            raise CheckpointError(
                f"{base} lacks {', '.join(missing[:3])}, which would be random. Get the complete checkpoint."
            )
        loading.never_repack_4bit(model)
        if not adapter:
            # An adapter brings the rows of its tokens itself.
            loading.add_missing_rows(model, tokenizer, "the reward model")
        # Quantized weights are already on their device.
        if device_map is None and not (load_in_4bit or load_in_8bit) and torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        if adapter:
            # The base's config does not know the padding token that the adapter was trained with.
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            model = adapters.attach_adapter(model, adapter)
            restore_head(model, adapter)
        model.config.use_cache = False
        score_in_float32(model)
        return cls(model, tokenizer)

    def encode(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Token ids of a conversation that ends with an answer, up to the token at which the score is read.

        Raises:
            EncodingError: too long for the model, refused by the template, or text that contains a special token.
        """
        refuse_special_tokens(self.tokenizer, messages, tools)
        if self._marks_answers:
            ids = encode_answered(self.tokenizer, messages, tools)
        else:
            try:
                ids = self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, return_dict=False, tokenizer_kwargs={"verbose": False}
                )
            except TemplateError as error:
                raise EncodingError(f"the chat template refuses it: {error}", "Fix the row") from error
        if self.context_length is not None and len(ids) > self.context_length:
            raise EncodingError(
                f"{len(ids)} tokens, longer than the {self.context_length} of the reward model",
                "Shorten the row",
                too_long=True,
                tokens=len(ids),
            )
        return ids

    def require_readable(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raises UserError, naming file and line, for prompts that leave no room for an answer or cannot be rendered.

        Args:
            rows: from `to_task`, with `place`.
        """
        problems = []
        for row in rows:
            try:
                self.encode([*row["messages"], {"role": "assistant", "content": "."}], row["tools"])
            except EncodingError as error:
                reason = f"the reward model cannot read it: {error.reason}"
                problems.append(Problem(place_of(row), reason, "Shorten or remove the row."))
        if problems:
            raise UserError(
                f"{len(problems)} prompt(s) cannot be scored by --reward_model_path:\n{format_problems(problems)}"
            )

    def score(
        self, conversations: Sequence[Messages], tools: Sequence[Tools | None] | None = None, batch_size: int = 8
    ) -> list[float]:
        """One score per conversation, in order.

        Args:
            conversations: each ends with an assistant turn, the one that is scored.
            tools: one entry per conversation, in OpenAI format.

        Raises:
            EncodingError: see `encode`; before anything is computed.
            UserError: a score is not finite.
        """
        tools = tools or [None] * len(conversations)
        return self.score_ids([self.encode(*each) for each in zip(conversations, tools, strict=True)], batch_size)

    @torch.no_grad()
    def score_ids(
        self, sequences: Sequence[Sequence[int]], batch_size: int = 8, progress: Callable[[int], Any] | None = None
    ) -> list[float]:
        """One score per sequence of token ids, in batches of similar length, padded on the right.

        Args:
            progress: called after each batch with its number of scores.

        Raises:
            UserError: a score is not finite.
        """
        pad, device = self.model.config.get_text_config().pad_token_id, self.model.device
        # Longest first: if memory runs out, it does so in the first batch.
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
        scores = [0.0] * len(sequences)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                ids = torch.full((len(chosen), len(sequences[chosen[0]])), pad)
                mask = torch.zeros_like(ids)
                for row, index in enumerate(chosen):
                    ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
                    mask[row, : len(sequences[index])] = 1
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                for index, score in zip(chosen, logits[:, 0].float().tolist(), strict=True):
                    scores[index] = score
                if progress is not None:
                    progress(len(chosen))
        finally:
            self.model.train(was_training)
        if not all(map(math.isfinite, scores)):
            raise UserError("the reward model returned a score that is not finite. Load it with --dtype float32.")
        return scores


def model_reward(scorer: RewardScorer, batch_size: int) -> RewardFunction:
    """The score of a reward model as a reward function, which renders prompt, answer and tools in its own template.

    An answer that the reward model cannot read, because it is too long or contains one of its special tokens, gets the
    lowest score of its batch; the share of such answers is logged as `reward_model/unreadable`.
    """

    def reward_model(
        prompts: list[Any],
        completions: list[Any],
        tools: list[Any] | None = None,
        log_metric: Any = None,
        **_: Any,
    ) -> list[float | None]:
        sequences = {}
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                sequences[number] = scorer.encode([*prompt, *completion], tools[number] if tools else None)
            except EncodingError:
                continue
        scores = dict(zip(sequences, scorer.score_ids(list(sequences.values()), batch_size), strict=True))
        if log_metric is not None:
            log_metric("reward_model/unreadable", 1 - len(scores) / len(prompts))
        lowest = min(scores.values(), default=None)
        return [scores.get(number, lowest) for number in range(len(prompts))]

    return reward_model


@dataclass(frozen=True)
class ScorableRow:
    """A row of a file and its conversations, by the name of the field that the score of each is written to."""

    row: SourceRow
    tools: list[dict[str, Any]] | None
    conversations: dict[str, list[dict[str, Any]]]


def check_output_file(score_file: str, output_file: str, overwrite: bool) -> None:
    """Raises UserError if the scores would overwrite the score file, or another file without `overwrite`.

    Scores of a run that was interrupted are a file too: computing them may have taken hours.
    """
    source, target, partial = Path(score_file), Path(output_file), Path(f"{output_file}.partial")
    for path in (target, partial):
        refuse_overwriting("--output_file", path, {"--score_file": source})
    if target.is_dir():
        raise UserError(f"--output_file {target} is a folder; give the name of a file in it.")
    if target.exists() and not overwrite:
        raise UserError(
            f"--output_file {target} exists already. Give another name, or replace it: --overwrite_output_file True."
        )
    if partial.exists() and not overwrite:
        raise UserError(
            f"{partial} has the scores of a run that was interrupted or has not ended yet. Give another --output_file, "
            "or replace it: --overwrite_output_file True."
        )


def read_score_file(
    score_file: str, ignore: frozenset[str] = frozenset(), encoding: str | None = None
) -> tuple[list[ScorableRow], list[Problem]]:
    """The rows that can be scored, in order, and the problems of the others.

    Raises:
        UserError: no such file, or a file without rows.
    """
    path = Path(score_file)
    if not path.is_file() or format_of(path) is None:
        raise UserError(
            f"--score_file {path} must be an existing .jsonl or .json file (looked in {Path.cwd()}; data/README.md "
            "lists further formats)."
        )
    found: list[ScorableRow] = []
    problems: list[Problem] = []
    for row in read_rows(path, encoding=encoding):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            found.append(_to_scorable(row, ignore))
        except RowError as error:
            problems.append(error.at(row.place))
    if not found and not problems:
        raise UserError(f"{path} has no rows. Fill it, or give another --score_file.")
    return found, problems


def _to_scorable(row: SourceRow, ignore: frozenset[str]) -> ScorableRow:
    value = row.value if isinstance(row.value, dict) else {}
    if any(field in value and field not in ignore for pair in PREFERENCE_FIELDS for field in pair):
        pair = to_preference(row.value, ignore)
        tools = pair["tools"]
        conversations = {f"{name}_score": [*pair["messages"], pair[name]] for name in ("chosen", "rejected")}
    else:
        chat = to_messages(row.value, ignore)
        tools, conversations = chat["tools"], {"score": chat["messages"]}
    if overwritten := sorted(({*conversations, "margin"} if len(conversations) == 2 else {"score"}) & set(value)):
        raise RowError(
            f"the output would replace the row's own {', '.join(overwritten)}",
            "Rename the field.",
            {name: value[name] for name in overwritten},
        )
    return ScorableRow(row, tools, conversations)


def score_rows(
    scorer: RewardScorer,
    rows: Sequence[ScorableRow],
    problems: Sequence[Problem],
    output_file: str,
    *,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
    long_rows: str = "turns",
    max_long_rows: float = 0.5,
) -> dict[str, float]:
    """Score rows and write them in order, each with all its fields; count the rows that are skipped.

    A preference pair gets `chosen_score`, `rejected_score` and `margin`, any other row `score`.

    Args:
        problems: of rows that could not be read. Rows that cannot be encoded are added.
        long_rows: `turns` or `skip` skips rows that are too long; `refuse` does not. A score belongs to the last
            answer, so no row is shortened.
        max_long_rows: the share of all rows that may be skipped so.

    Returns:
        For pairs `accuracy`, `margin`, `chosen_reward` and `rejected_reward`; for other rows `mean_reward`,
        `min_reward` and `max_reward`.

    Raises:
        UserError: a row has a problem that no flag allows to skip, or too many are too long; nothing is written then.
    """
    encoded: list[tuple[ScorableRow, list[list[int]]]] = []
    problems = list(problems)
    for scorable in rows:
        try:
            encoded.append(
                (scorable, [scorer.encode(each, scorable.tools) for each in scorable.conversations.values()])
            )
        except EncodingError as error:
            kind = "too long" if error.too_long else "unusable"
            problems.append(Problem(scorable.row.place, error.reason, f"{error.remedy}.", kind=kind))
    allowed = {"unusable": skip_bad_rows, "too long": long_rows != "refuse"}
    if refused := [problem for problem in problems if not allowed.get(problem.kind)]:
        raise UserError(
            f"{len(refused)} row(s) cannot be scored; nothing was written:\n{format_problems(refused)}\n"
            f"{advise(refused)}"
        )
    long = [problem for problem in problems if problem.kind == "too long"]
    total = len(encoded) + len(problems)
    if found := describe_lost_rows(len(long), total, max_long_rows):
        reason, way_out = found
        raise UserError(f"{reason}; nothing was written. The first: {long[0]}\n{way_out}".rstrip())
    for problem in problems[:SHOWN_PROBLEMS]:
        logger.warning(f"skipped: {problem}")
    if not encoded:
        raise UserError("every row was skipped, so there is nothing to score; see the warnings above.")

    target, partial = Path(output_file), Path(f"{output_file}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, float]] = []
    on_terminal, total = sys.stderr.isatty(), sum(len(sequences) for _, sequences in encoded)
    with (
        open(partial, "w", encoding="utf-8") as file,
        tqdm(total=total, unit="answer", disable=not on_terminal) as bar,
        nullcontext() if on_terminal else heartbeat(lambda: f"{len(results)} of {len(encoded)} rows scored"),
    ):
        for first in range(0, len(encoded), batch_size * BATCHES_PER_WRITE):
            part = encoded[first : first + batch_size * BATCHES_PER_WRITE]
            scores = iter(scorer.score_ids([ids for _, each in part for ids in each], batch_size, bar.update))
            for scorable, _ in part:
                result = {name: next(scores) for name in scorable.conversations}
                if len(result) == 2:
                    result["margin"] = result["chosen_score"] - result["rejected_score"]
                results.append(result)
                file.write(json.dumps({**scorable.row.value, **result}, ensure_ascii=False) + "\n")
    partial.replace(target)
    counts = Counter(problem.kind for problem in problems)
    skipped = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    logger.info(f"{len(encoded) + len(problems)} rows, scored {len(encoded)}, skipped: {skipped}; {target}")
    return _summary(results)


def _summary(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    pairs = [result for result in results if "margin" in result]
    single = [result["score"] for result in results if "score" in result]
    summary: dict[str, float] = {}
    if pairs:
        summary = {
            "accuracy": fmean(pair["margin"] > 0 for pair in pairs),
            "margin": fmean(pair["margin"] for pair in pairs),
            "chosen_reward": fmean(pair["chosen_score"] for pair in pairs),
            "rejected_reward": fmean(pair["rejected_score"] for pair in pairs),
        }
    if single:
        summary |= {"mean_reward": fmean(single), "min_reward": min(single), "max_reward": max(single)}
    return summary
