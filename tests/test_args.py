"""The parser that all programs share: nothing is guessed, nothing is ignored, old spellings work."""

import ast
import dataclasses
import re
from dataclasses import dataclass, field

import dpo_training
import grpo_training
import orpo_training
import ppo_training
import pretraining
import reward_modeling
import supervised_finetuning
from chatpdf import FileArguments
from inference import InferenceArguments
from medicalgpt.args import DataArguments, LoraArguments, ModelArguments, RunArguments, StageDefaults
from medicalgpt.parser import StrictParser, parse_args
from medicalgpt.refusals import ACCEPTED, ANY, EVERY, REFUSED, RENAMED, TRAINING, for_program, refused_in
from medicalgpt.serving.arguments import ApiArguments
from tests.helpers import ROOT, run_program

import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

PAIR_STAGES = {
    "reward_modeling": reward_modeling.RewardArguments,
    "dpo_training": dpo_training.PreferenceArguments,
    "orpo_training": orpo_training.OrpoArguments,
}
STAGES = {
    "pretraining": pretraining.PretrainingArguments,
    "supervised_finetuning": supervised_finetuning.FinetuningArguments,
    **PAIR_STAGES,
    "ppo_training": ppo_training.PpoArguments,
    "grpo_training": grpo_training.GrpoArguments,
}


def parse(*argv, stage="supervised_finetuning"):
    """All values that a stage would get, by name, and the set of those that were given."""
    groups = parse_args(
        ModelArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        STAGES[stage],
        program=f"{stage}.py",
        argv=["--model_name_or_path", "m", *map(str, argv)],
    )
    values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
    given = set().union(*(group.given for group in groups)) - {"model_name_or_path"}
    return values, given


@pytest.fixture
def refusal(capsys):
    """Parse what must be refused and return the message; the exit code is 2."""

    def refuse(*argv, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*argv, **options)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return refuse


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- names -----------------------------------------------------------------------------------------------------------


def test_unknown_flag_names_the_nearest(refusal):
    message = refusal("--lora_rnk", 3)
    assert "unknown flag --lora_rnk: did you mean --lora_rank?" in message
    assert "--help" in message


@pytest.mark.parametrize(
    ("given", "flag"), [("--train_file_dri", "--train_file_dir"), ("--nm_train_epochs", "--num_train_epochs")]
)
def test_a_mistake_in_a_short_word_is_seen_where_the_others_agree(refusal, given, flag):
    assert f"unknown flag {given}: did you mean {flag}?" in refusal(given, 3)


def test_unknown_flag_without_neighbour_guesses_none(refusal):
    message = refusal("--qqqqqqqq", 3)
    assert "unknown flag --qqqqqqqq: see --help" in message and "did you mean" not in message


def test_all_problems_of_names_come_in_one_message(refusal):
    message = refusal(
        "--lora_rnk", 3, "--max_length", 9, "--bogus_flag=1", "--logging_dir", "x", "--lr_schedule_type", "cosine"
    )
    for part in (
        "unknown flag --lora_rnk",
        "unknown flag --bogus_flag",
        "--max_length has no effect",
        "--logging_dir has no effect",
        "did you mean --lr_scheduler_type?",
    ):
        assert part in message


def test_a_refused_flag_is_never_proposed(refusal):
    assert "--max_length?" not in refusal("--max_lengths", 3)


@pytest.mark.parametrize("short", ["--lora_ran", "--model_name", "--output", "--use_pef"])
def test_no_abbreviations(refusal, short):
    assert f"unknown flag {short}" in refusal(short, "x")


def test_stray_words_and_bad_values_are_refused(refusal):
    assert "unrecognized arguments: stray" in refusal("stray")
    assert "invalid int value: 'x'" in refusal("--lora_rank", "x")
    assert "invalid choice: 'int8'" in refusal("--dtype", "int8")
    assert "expected one argument" in refusal("--lora_rank")
    assert "maybe" in refusal("--use_peft", "maybe")


def test_the_required_flag_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(ModelArguments, argv=[])
    assert stop.value.code == 2
    assert "--model_name_or_path" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on a GPU")
def test_float16_on_a_cpu_is_float32_with_a_notice(capsys, tmp_path):
    (args,) = parse_args(supervised_finetuning.FinetuningArguments, argv=["--output_dir", str(tmp_path), "--fp16"])
    assert not args.fp16 and not args.bf16
    assert "on this CPU training computes in float32" in capsys.readouterr().err


def test_contradictions_that_the_library_finds_are_user_errors(refusal):
    assert "fp16 and bf16" in refusal("--fp16", "--bf16")
    assert "load_best_model_at_end" in refusal("--load_best_model_at_end", "True", "--eval_strategy", "epoch")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--torch_compile_backend", "x"], "--torch_compile_backend x cannot be used here. Use one of aot_eager, "),
        (["--torch_compile_backend", "tensorrt"], "--torch_compile_backend tensorrt cannot be used here"),
        (["--torch_compile_mode", "x"], "--torch_compile_mode x cannot be used here. Use one of default, "),
        (["--activation_offloading", "True"], "activations are on the CPU already"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf must be a number"),
        (["--num_train_epochs", "nan"], "--num_train_epochs nan must be a number"),
        (["--eval_accumulation_steps", 0], "--eval_accumulation_steps 0 must be at least 1"),
        (["--dataloader_prefetch_factor", 0], "--dataloader_prefetch_factor 0 must be at least 1"),
        (["--dataloader_persistent_workers", "True"], "add --dataloader_num_workers 1, or omit it"),
        (["--dataloader_multiprocessing_context", "fork"], "add --dataloader_num_workers 1, or omit it"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_work_here_is_refused_before_anything_is_loaded(refusal, argv, message):
    printed = refusal(*argv)
    assert message in printed and "Traceback" not in printed


def test_what_the_refusals_propose_is_accepted():
    for argv in (
        ["--torch_compile_backend", "inductor", "--torch_compile_mode", "default"],
        ["--dataloader_persistent_workers", "True", "--dataloader_num_workers", 1],
        ["--dataloader_multiprocessing_context", "fork", "--dataloader_num_workers", 1],
        ["--bf16", "True"],
        ["--eval_accumulation_steps", 1],
    ):
        parse(*argv)


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--torch_dtype", "float16"], "dtype", "float16"),
        (["--torch-dtype=float16"], "dtype", "float16"),
        (["--max_seq_length", 77], "model_max_length", 77),
        (["--lora-rank", 3], "lora_rank", 3),
        (["--lora_rank=3"], "lora_rank", 3),
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--evaluation-strategy=epoch"], "eval_strategy", "epoch"),
        (["--warmup_ratio", 0.05], "warmup_steps", 0.05),
        (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length=False"], "train_sampling_strategy", "random"),
        (["--group-by-length", "false"], "train_sampling_strategy", "random"),
        (["--no_cuda"], "use_cpu", True),
        (["--no_cuda", "True"], "use_cpu", True),
        (["--bf16"], "bf16", True),
        (["--bf16", "True"], "bf16", True),
        (["--no_use_peft"], "use_peft", False),
        (["--use_peft", "False"], "use_peft", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--max_steps", "-1"], "max_steps", -1),
    ],
)
def test_spellings(argv, name, value):
    values, given = parse(*argv)
    assert values[name] == value
    assert given == {name}


def test_a_switch_named_alone_leaves_the_next_flag_alone():
    values, _ = parse("--bf16", "--gradient_checkpointing", "True", "--tf32", "False")
    assert (values["bf16"], values["gradient_checkpointing"], values["tf32"]) == (True, True, False)


def test_old_switch_without_value_is_refused(refusal):
    assert "--train_sampling_strategy group_by_length" in refusal("--group_by_length")


@pytest.mark.parametrize(("flag", "steps"), [("--warmup_ratio", 5), ("--warmup_steps", 5)])
def test_the_warmup_fraction_is_a_fraction_of_all_steps(flag, steps):
    groups = parse_args(supervised_finetuning.FinetuningArguments, argv=[flag, "0.05"])
    assert groups[0].get_warmup_steps(100) == steps


@pytest.mark.parametrize(
    "argv",
    [
        ["--dtype", "auto", "--torch_dtype", "float32"],
        ["--lora_rank", 3, "--lora-rank", 4],
        ["--warmup_ratio", 0.1, "--warmup_steps", 3],
        ["--use_peft", "True", "--no_use_peft"],
        ["--group_by_length", "True", "--train_sampling_strategy", "random"],
        ["--no_cuda", "--use_cpu", "False"],
    ],
)
def test_one_thing_set_by_two_spellings_is_refused(refusal, argv):
    first, second = [token for token in map(str, argv) if token.startswith("--")]
    message = refusal(*argv)
    assert "set the same thing" in message and first in message and second in message


def test_one_thing_set_twice_to_the_same_value_is_accepted(capsys):
    values, given = parse("--dtype", "float32", "--torch_dtype", "float32", "--lora_rank", 3, "--lora-rank=3")
    assert (values["dtype"], values["lora_rank"], given) == ("float32", 3, {"dtype", "lora_rank"})
    assert "note: --torch_dtype and --dtype name the same thing." in capsys.readouterr().err


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_old_names_are_gone_from_the_library_and_the_new_ones_are_there(old):
    """Where a library takes a name back, the renaming has to go."""
    assert old not in {f.name for f in dataclasses.fields(TrainingArguments)}
    new = RENAMED[old]
    classes = [*STAGES.values(), ModelArguments, DataArguments, LoraArguments, ApiArguments, FileArguments]
    names = {f.name for cls in [*classes, InferenceArguments] for f in dataclasses.fields(cls)}
    assert set([new] if isinstance(new, str) else new) <= names


# --- flags without effect --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--max_length", 3], "--model_max_length"),
        (["--max-length", 3], "--model_max_length"),
        (["--logging_dir", "x"], "--report_to"),
        (["--push_to_hub", "True"], "hf upload"),
        (["--save_safetensors", "False"], "pickles"),
        (["--assistant_only_loss", "True"], "--train_on_inputs"),
        (["--dataset_text_field", "x"], "data/README.md"),
    ],
)
def test_flags_without_effect_are_refused_with_the_reason(refusal, argv, reason):
    message = refusal(*argv)
    assert f"{argv[0]} has no effect in this program" in message and reason in message


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_that_a_stage_refuses_exists_in_the_library_or_in_another_stage(stage):
    """A name that the library has dropped would hide a typo in the table."""
    known = {f.name for cls in (STAGES[stage], DataArguments, SFTConfig) for f in dataclasses.fields(cls)}
    older = {"block_size", "early_stopping", "reward_baseline", "stop_token", "keep_linebreaks", "group_by_text"}
    assert set(refused_in(f"{stage}.py")) - older - set(refused_in()) <= known


@pytest.mark.parametrize("flag", REFUSED)
def test_a_program_refuses_a_flag_for_one_reason(flag):
    programs = [program for group in REFUSED[flag] for program in group]
    assert len(programs) == len(set(programs))
    assert all(program in EVERY or (ROOT / program).is_file() for program in programs)
    assert all(re.fullmatch(r"[A-Z].*[.]", reason) for reason in REFUSED[flag].values())


def test_each_reason_is_written_once():
    text = (ROOT / "medicalgpt" / "refusals.py").read_text(encoding="utf-8")
    sentences = [sentence for sentence in re.findall(r'"([^"\n]*[.])"', text) if " " in sentence]
    assert len(sentences) > 60 and len(sentences) == len(set(sentences))


def test_what_every_program_refuses_is_refused_by_those_without_refusals_of_their_own():
    assert set(refused_in()) == {"logging_dir", "save_safetensors", "fp16_backend"}
    for program in TRAINING:
        assert refused_in().items() < refused_in(program).items()
    assert refused_in("dpo_training.py")["max_length"] != refused_in("pretraining.py")["max_length"]
    with pytest.raises(KeyError, match="no program dpo_trainning.py"):
        refused_in("dpo_trainning.py")


def test_one_stage_refuses_what_the_other_has():
    pt = run_program("pretraining.py", "--model_name_or_path", "m", "--template_name", "qwen", check=False)
    sft = run_program("supervised_finetuning.py", "--model_name_or_path", "m", "--block_size", 64, check=False)
    assert pt.returncode == sft.returncode == 2
    assert "unknown flag --template_name" in pt.stderr
    assert "--block_size has no effect" in sft.stderr and "--model_max_length" in sft.stderr


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--per_device_train_batch_size", 0], "must be at least 1"),
        (["--per_device_eval_batch_size", -1], "must be at least 1"),
        (["--gradient_accumulation_steps", 0], "must be at least 1"),
        (["--max_steps", 0], "would train nothing"),
        (["--num_train_epochs", 0], "would train nothing"),
        (["--load_best_model_at_end", True], "add --eval_strategy steps"),
        (["--early_stopping_patience", 2], "add --eval_strategy steps"),
        (["--metric_for_best_model", "loss"], "add --eval_strategy steps"),
        (["--save_strategy", "best"], "add --eval_strategy steps"),
        (["--early_stopping_patience", 0], "must be at least 1"),
        (["--seed", 2**32], "must be between 0 and 4294901760"),
        (["--data_seed", -1], "must be between 0 and 4294901760"),
        (["--early_stopping_threshold", 0.1], "has no effect without --early_stopping_patience"),
    ],
)
def test_numbers_that_train_nothing_are_refused(refusal, stage, argv, reason):
    message = refusal(*argv, stage=stage)
    # Where a stage has no use for the flag, no number of it is right.
    reason = refused_in(f"{stage}.py").get(argv[0].removeprefix("--"), reason)
    assert argv[0] in message and reason in message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("argv", "seed"), [([], 42), (["--seed", 7], 7), (["--seed", 7, "--data_seed", 0], 0), (["--data_seed", 5], 5)]
)
def test_the_order_of_rows_has_a_seed_of_its_own(stage, argv, seed):
    (args,) = parse_args(STAGES[stage], argv=list(map(str, argv)))
    assert args.order_seed == seed


@pytest.mark.parametrize("stage", sorted(PAIR_STAGES))
@pytest.mark.parametrize("flag", ["--max_source_length", "--max_target_length"])
def test_limits_of_pairs_are_at_least_one_token(refusal, stage, flag):
    assert f"{flag} 0 must be at least 1." in refusal(flag, 0, stage=stage)
    assert parse(flag, 1, stage=stage)[1] == {flag[2:]}


# --- which flags were given ------------------------------------------------------------------------------------------


def test_given_is_what_the_user_set_even_to_the_default(config):
    path = config("lora_alpha: 16\n")
    _, given = parse("--config", path, "--lora_rank", 8, "--torch_dtype", "auto")
    assert given == {"lora_alpha", "lora_rank", "dtype"}
    assert parse()[1] == set()


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file(config):
    path = config("lora_rank: 4\nlora_dropout: 0.2\nlearning_rate: 1e-4\nuse_peft: no\n")
    values, given = parse("--config", path, "--lora-rank", 32)
    assert (values["lora_rank"], values["lora_dropout"], values["learning_rate"]) == (32, 0.2, 1e-4)
    assert values["use_peft"] is False
    assert given == {"lora_rank", "lora_dropout", "learning_rate", "use_peft"}
    assert parse("--lora-rank", 32, f"--config={path}") == (values, given)


def test_the_command_line_wins_over_another_spelling_in_the_file(config):
    assert parse("--config", config("torch_dtype: float16\n"), "--dtype", "float32")[0]["dtype"] == "float32"


def test_unknown_keys_name_file_and_line(config, refusal):
    path = config("# comment\nlora_rank: 4\n\nlora_rnk: 8\nmax_length: 9\n")
    message = refusal("--config", path, "--lora_drop", 1)
    assert f"{path}:4: unknown flag --lora_rnk: did you mean --lora_rank?" in message
    assert f"{path}:5: --max_length has no effect" in message
    assert "unknown flag --lora_drop: did you mean --lora_dropout?" in message


def test_lists_dicts_and_awkward_texts_in_yaml(config):
    path = config(
        "target_modules: [q_proj, v_proj]\n"
        "modules_to_save:\n- embed_tokens\n- lm_head\n"
        "label_names: [a, b]\n"
        "lr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 0.5}\n"
        "system_prompt: '--- Antworte kurz. =)'\n"
        "group_by_length: false\n"
        "bf16: true\n"
        "peft_path:\n"
    )
    values, given = parse("--config", path)
    assert values["target_modules"] == "q_proj,v_proj"
    assert values["modules_to_save"] == "embed_tokens,lm_head"
    assert values["label_names"] == ["a", "b"]
    assert values["lr_scheduler_kwargs"] == {"min_lr": 0.5}
    assert values["system_prompt"] == "--- Antworte kurz. =)"
    assert values["train_sampling_strategy"] == "random"
    assert values["bf16"] is True
    # A key without value is not set.
    assert values["peft_path"] is None and "peft_path" not in given


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora_rank: 4\nlora_rank: 8\n", ":2: "),
        ("lora_rank: 4\nlora-rank: 8\n", ":2: "),
        ("1: 2\n", ":1: unknown flag --1"),
        ("on: 2\n", ":1: unknown flag --on"),
        ("config: other.yaml\n", ":1: a --config file cannot name another"),
        ("- lora_rank\n", "`flag: value` lines"),
        ("lora_rank 8\n", "`flag: value` lines"),
        ("a: [\n", "not valid YAML"),
        ("lora_rank: [1, 2]\n", "invalid int value: '1,2'"),
        ("seed: !!python/object/apply:os.getpid []\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(config, refusal, text, part):
    path = config(text)
    assert part in refusal("--config", path)


def test_an_empty_file_sets_nothing(config):
    assert parse("--config", config("\n# nothing\n")) == parse()


def test_a_missing_or_second_file_is_refused(config, refusal):
    assert "No such file" in refusal("--config", "no/such.yaml")
    assert "given twice" in refusal("--config", config(""), "--config", "other.yaml")
    assert "expected one argument" in refusal("--config")


# --- declarations ----------------------------------------------------------------------------------------------------


def test_choices_aliases_and_help_of_a_dataclass():
    @dataclass
    class Own:
        size: int = field(default=1, metadata={"help": "Size.", "aliases": ["--large"], "choices": [1, 2]})

    (own,) = parse_args(Own, argv=["--large", "2"])
    assert own.size == 2 and own.given == {"size"}


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_happens_here_where_the_library_declares_a_flag(stage):
    cls = STAGES[stage]
    parser = StrictParser(cls).parser
    shown = {action.dest: action.help for action in parser._actions}
    explained = {**StageDefaults.HELP, **vars(cls).get("HELP", {})}
    assert set(explained) <= {f.name for f in dataclasses.fields(cls)}
    assert {name: shown[name] for name in explained} == explained
    assert " ".join(explained["eval_on_start"].split()) in " ".join(parser.format_help().split())


@pytest.mark.parametrize("script", [*TRAINING, "merge_peft_adapter.py", "validate_jsonl.py"])
def test_help_names_every_flag_with_its_help(script):
    text = run_program(script, "--help", timeout=60).stdout
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree).splitlines()[0] in text
    shown = set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    own = {node.target.id for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign)} - {
        "HELP",
        "BEST_METRIC",
    }
    if script in TRAINING:
        unused = refused_in(script)
        for group in (ModelArguments, DataArguments, LoraArguments, RunArguments):
            own |= {f.name for f in dataclasses.fields(group)}
        own |= {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
        own -= set(unused) | {name for name, (values, _) in for_program(ACCEPTED, script).items() if values is ANY}
        assert shown.isdisjoint(f"--{name}" for name in unused)
    assert {f"--{name}" for name in own} <= shown
    assert "--config" in shown
