"""The answers before and after training are those of the front ends, whatever the base's generation_config says."""

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"Question {n}?", "response": "An answer. " * n} for n in range(1, 7)]
RECOMMENDED = {
    "repetition_penalty": 1.9,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 40,
    "num_beams": 3,
    "do_sample": False,
    "bad_words_ids": [[65]],
}


def answers(folder: str, prompts: list[list[int]]) -> list[str]:
    engine = ChatEngine.from_pretrained(folder)
    return [answer.text for answer in engine.batch(prompts, Sampling(max_new_tokens=64))]


def test_samples_are_the_answers_of_the_front_ends(tmp_path):
    base = save_model(tmp_path / "base", tiny_tokenizer(), context=512)
    settings = read_json(tmp_path / "base" / "generation_config.json")
    write_jsonl(tmp_path / "base" / "generation_config.json", [settings | RECOMMENDED])
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", base, "--train_file_dir", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"),
        *("--save_strategy", "no", "--max_steps", 6, "--learning_rate", 1e-2, "--use_peft", "False"),
    )
    before = answers(base, opened.options["sample_prompts"])
    opened.finish()
    after = answers(str(tmp_path / "out"), opened.options["sample_prompts"])
    samples = read_json(tmp_path / "out" / "samples.jsonl")
    assert [row["before"] for row in samples] == before
    assert [row["after"] for row in samples] == after != before
