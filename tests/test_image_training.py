"""A model learns to look at images, as a user would train it; the result is merged, asked, and compared."""

import json
import shutil
from pathlib import Path

from medicalgpt.args import ChatArguments
from medicalgpt.data.images import Picture, question_with_images
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, hub, loading
from medicalgpt.serving.chat import ChatEngine, NoImagesError
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import Sampling
from tests.helpers import open_stage, read_json, run_here, run_program, write_jsonl
from tests.pictures import ANSWER, COLOURS, SFT, SIZES, flags, save, write_colours
from tests.templates import official
from tests.towers import hashes, is_tower, make_seeing, make_towers, require_whole

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data"))


def shown(folder, data):
    """A batch with two images in one row, one in another and none in the third, as it was in training."""
    engine = ChatEngine.from_pretrained(str(folder), with_images=True)
    pictures = [
        [Picture.read(data / "pics" / f"{name}.png") for name in names] for names in (["red0", "blue1"], ["blue2"])
    ]
    image, text = {"type": "image"}, {"type": "text", "text": "Colour?"}
    prompts = [
        engine.prompt_ids([{"role": "user", "content": [*[image] * len(own), text]}], pictures=own) for own in pictures
    ]
    prompts.append(engine.prompt_ids([{"role": "user", "content": "Number 1?"}]))
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    inputs = engine.vision.inputs(ids, [each.decode() for own in pictures for each in own])
    return {"input_ids": ids, "attention_mask": mask, **inputs}


def logits_of(model, batch):
    model.eval()
    with torch.no_grad():
        scores = model(**batch, use_cache=False).logits
    return scores[batch["attention_mask"].bool()]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "qwen3_vl_moe")]


@pytest.mark.parametrize("name", ["qwen2_5_vl", *SLOW])
def test_a_model_learns_to_look(name, data, tmp_path):
    """Only the image says what the answer is. Live, with the adapter on its base and merged, the model is the same."""
    base = make_seeing(tmp_path / "base", name)
    more = ("--num_train_epochs", 20, "--image_max_pixels", 1024)
    opened = open_stage(SFT, *flags(base, data, tmp_path / "lora", *more))
    model = opened.trainer.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    opened.finish()
    moved = {name for name, old in before.items() if not old.equal(dict(model.named_parameters())[name])}
    assert moved and not any(is_tower(name) for name in moved)
    assert all("language_model" in name and ".lora_" in name for name in moved)
    assert read_json(tmp_path / "lora" / "preprocessor_config.json")["max_pixels"] == 1024

    batch = shown(tmp_path / "lora", data)
    live = logits_of(model, batch)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    assert (logits_of(model, other) - live).abs().max() > 0.1, "the images would make no difference"
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "preprocessor_config.json")["max_pixels"] == 1024
    unchanged = hashes(base)
    assert {n: h for n, h in hashes(tmp_path / "merged").items() if is_tower(n)} == {
        n: h for n, h in unchanged.items() if is_tower(n)
    }
    whole, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(whole, batch), live, rtol=1e-4, atol=1e-4)
    reloaded = loading.load_model(AutoModelForCausalLM, base, with_towers=True)
    attached = adapters.attach_adapter(reloaded, hub.Adapter.read(str(tmp_path / "lora")))
    torch.testing.assert_close(logits_of(attached, batch), live, rtol=1e-4, atol=1e-4)

    for folder in ("lora", "merged"):
        engine = ChatEngine.from_pretrained(str(tmp_path / folder), with_images=True)
        pictures = {colour: Picture.read(save(tmp_path / f"new-{colour}.png", (18, 22), colour)) for colour in COLOURS}
        requests = [
            engine.request(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}], pictures=[each]
            )
            for each in pictures.values()
        ]
        requests.append(engine.request([{"role": "user", "content": "Number 2?"}], Sampling(max_new_tokens=8)))
        alone = [engine.generate([request])[0].text for request in requests]
        assert alone == ["red", "blue", "yes"]
        assert [answer.text for answer in engine.generate(requests)] == alone
        assert engine.generate([requests[2]])[0].text == "yes", "an earlier image has changed the positions"


@pytest.mark.slow
def test_the_programs_as_a_user_runs_them(data, tmp_path):
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    run_program(SFT, *flags(base, data, tmp_path / "out", "--num_train_epochs", 20))
    run_program("merge_peft_adapter.py", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    for colour, folder in zip(COLOURS, ("out", "merged"), strict=True):
        picture = save(tmp_path / f"{colour}.png", (17, 23), colour)
        question = ("--model_name_or_path", tmp_path / folder, "--query", "Colour?", "--images", picture)
        assert run_program("inference.py", *question).stdout.strip() == colour
    run_here(
        "inference.py",
        *("--model_name_or_path", tmp_path / "out", "--data_file", data / "rows.jsonl"),
        *("--output_file", tmp_path / "answers.jsonl"),
    )
    rows = read_json(tmp_path / "answers.jsonl")
    assert [row["response"] for row in rows] == [row["reference"] for row in rows]
    assert len(rows) == 3 * len(SIZES) and {row["response"] for row in rows} == {"red", "blue", "yes"}


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_image(data, tmp_path):
    """The rows of a step are those of one process; and no process waits for one that has none."""
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    more = ("--num_train_epochs", 2, "--train_sampling_strategy", "random", "--logging_steps", 1)
    batch = ("--per_device_train_batch_size", 3)
    run_program(SFT, *flags(base, data, tmp_path / "one", *more, "--per_device_train_batch_size", 6))
    run_program(SFT, *flags(base, data, tmp_path / "two", *more, *batch), processes=2)
    zero2 = ("--deepspeed", "zero2.json")
    run_program(SFT, *flags(base, data, tmp_path / "zero2", *more, *batch, *zero2), processes=2)
    # Batches of one row: in each step, one process may have an image and the other none; the last has a filler.
    few = write_jsonl(tmp_path / "few" / "rows.jsonl", (data / "rows.jsonl").read_text().splitlines()[:5])
    shutil.copytree(data / "pics", Path(few).parent / "pics")
    rows = flags(base, Path(few).parent, tmp_path / "three", *more, "--per_device_train_batch_size", 1)
    run_program(SFT, *rows, "--validation_file_dir", data, "--allow_overlap", "True", processes=2)
    losses = [
        [event["loss"] for event in read_json(tmp_path / name / "metrics.jsonl") if "loss" in event]
        for name in ("one", "two", "zero2")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] == pytest.approx(losses[2], rel=1e-3)
    assert read_json(tmp_path / "three" / "run.json")["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP"])
def test_weights_that_are_sharded_do_not_go_with_images(engine, data, tmp_path):
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    given, environment = {
        "ZeRO-3": (("--deepspeed", "zero3.json"), {}),
        "FSDP": ((), {"ACCELERATE_USE_FSDP": "true"}),
    }[engine]
    done = run_program(SFT, *flags(base, data, tmp_path / "never", *given), env=environment, check=False)
    assert done.returncode == 1 and "weights that are sharded (ZeRO-3, FSDP)" in done.stderr, done.stderr
    assert "Use DDP or ZeRO-2" in done.stderr and not list(tmp_path.glob("never/*.safetensors"))
    # The same without images is trained; so are images under ZeRO-2 (`test_two_processes_of_which_one_has_no_image`).
    write_jsonl(tmp_path / "text" / "rows.jsonl", [{"prompt": "Why?", "response": "So."}] * 4)
    if engine == "ZeRO-3":
        run_program(SFT, *flags(base, tmp_path / "text", tmp_path / "out", "--max_steps", 1, *given))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_all_weights_and_a_resumed_run(name, data, tmp_path):
    """The encoder stays as it is, and so do its bytes; a run that is resumed sees the same images."""
    base = make_seeing(tmp_path / "base", name)
    more = ("--use_peft", "False", "--max_steps", 4, "--save_steps", 2)
    for out in ("whole", "resumed"):
        given = flags(base, data, tmp_path / out, *more)
        for name in ("--lora_rank", "--lora_dropout"):
            at = given.index(name)
            del given[at : at + 2]
        given[given.index("--save_strategy") + 1] = "steps"
        open_stage(SFT, *given).finish()
    require_whole(base, tmp_path / "whole")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    (tmp_path / "resumed" / "model.safetensors").unlink()
    record = read_json(tmp_path / "resumed" / "run.json") | {"status": "failed"}
    (tmp_path / "resumed" / "run.json").write_text(json.dumps(record))
    resume = ("--resume_from_checkpoint", tmp_path / "resumed" / "checkpoint-2")
    open_stage(SFT, *given, *resume).finish()
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole") != hashes(base)
    assert (tmp_path / "resumed" / "checkpoint-2" / "preprocessor_config.json").is_file()
    # Another picture under the same name is another row.
    save(data / "pics" / "red0.png", (16, 16), "green")
    with pytest.raises(UserError, match="trained on other rows than these"):
        open_stage(SFT, *given, *resume)
    save(data / "pics" / "red0.png", (16, 16), "red")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_base_in_4_bits(name, data, tmp_path):
    """The encoder is not quantized, since it is not in the merged checkpoint either."""
    base = make_seeing(tmp_path / "base", name)
    more = ("--load_in_4bit", "True", "--num_train_epochs", 20, "--gradient_checkpointing", "True")
    opened = open_stage(SFT, *flags(base, data, tmp_path / "out", *more))
    kinds = {name: parameter.dtype for name, parameter in opened.trainer.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if is_tower(name)} == {torch.float32}
    assert torch.uint8 in {kind for name, kind in kinds.items() if "language_model" in name}
    opened.finish()
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    engine = ChatEngine.from_pretrained(str(tmp_path / "merged"), with_images=True)
    for colour in COLOURS:
        picture = Picture.read(data / "pics" / f"{colour}1.png")
        answer = engine.chat([question_with_images("Colour?", 1)], Sampling(max_new_tokens=6), pictures=[picture])
        assert answer.text == colour


def test_flags_and_bases_that_do_not_go_with_images(data, tmp_path):
    seeing = make_seeing(tmp_path / "seeing", "qwen2_5_vl")
    text_only = tmp_path / "text"
    write_jsonl(text_only / "rows.jsonl", [{"prompt": "Why?", "response": "So."}] * 4)
    for base, rows, more, message in (
        (seeing, data, ("--packing", "True"), "--packing True: rows with images are not packed"),
        (
            seeing,
            text_only,
            ("--image_max_pixels", 512),
            "--image_max_pixels would have no effect: no row has an image",
        ),
        (seeing, data, ("--modules_to_save", "visual"), "--modules_to_save visual: .* stays as it is"),
        (seeing, data, ("--streaming", "True", "--max_steps", 2), "only text is trained on here"),
        (
            seeing,
            text_only,
            ("--streaming", "True", "--max_steps", 2, "--image_max_pixels", 512),
            "--image_max_pixels would have no effect: rows with images are not trained on with --streaming",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_stage(SFT, *flags(base, rows, tmp_path / "out", *more))
    for name, template in (("gemma3", "gemma"), ("qwen2_5_vl", "chatml")):
        base = make_towers(tmp_path / name, name)
        given = (tmp_path / "out", "--template_name", template)
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*only text is trained on here.*Qwen2.5-VL or Qwen3-VL"):
            open_stage(SFT, *flags(base, data, *given))
        with pytest.raises(UserError, match="--image_max_pixels would have no effect: "):
            open_stage(SFT, *flags(base, text_only, *given, "--image_max_pixels", 512))
    pairs = tmp_path / "pairs"
    write_jsonl(pairs / "rows.jsonl", [{"prompt": "<image>?", "chosen": "a", "rejected": "b", "images": ["a.png"]}])
    given = ("--model_name_or_path", seeing, "--train_file_dir", pairs, "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*only text is trained on here"):
        open_stage("dpo_training.py", *given, "--template_name", "chatml")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


def test_rows_of_text_leave_the_encoder_on_the_disk(data, tmp_path):
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    write_jsonl(tmp_path / "text" / "rows.jsonl", [{"prompt": "Why?", "response": "So."}] * 4)
    opened = open_stage(SFT, *flags(base, tmp_path / "text", tmp_path / "out", "--max_steps", 1))
    assert not any(is_tower(name) for name, _ in opened.trainer.model.named_parameters())
    assert opened.trainer.vision is None and "pictures" not in opened.trainer.train_dataset.column_names
    opened.finish()
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    engine = ChatEngine.from_pretrained(str(tmp_path / "out"))
    with pytest.raises(NoImagesError, match="takes text only"):
        engine.prompt_ids([{"role": "user", "content": [{"type": "image"}]}], pictures=[Picture(8, 8)])


def test_an_adapter_of_text_is_trained_on_images_and_served_with_them(data, tmp_path):
    """Modules of the encoder have names that the adapter's have; none of them gets a part of it."""
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    assert any(name.endswith("visual.blocks.0.mlp.gate_proj.weight") for name in hashes(base))
    write_jsonl(tmp_path / "text" / "rows.jsonl", [{"prompt": "Why?", "response": "So."}] * 4)
    for name, seed in (("a", 1), ("b", 2)):
        more = ("--max_steps", 1, "--seed", seed, "--target_modules", "q_proj,gate_proj")
        open_stage(SFT, *flags(base, tmp_path / "text", tmp_path / name, *more)).finish()
    given = flags(tmp_path / "a", data, tmp_path / "on", "--max_steps", 1)
    del given[given.index("--lora_rank") : given.index("--lora_rank") + 4]
    opened = open_stage(SFT, *given)
    assert opened.trainer.vision
    trained = {name for name, parameter in opened.trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and not any(is_tower(name) for name in trained)
    opened.finish()
    chat = ChatArguments(model_name_or_path=base, lora_model=f"{tmp_path / 'a'},{tmp_path / 'on'}")
    engine = engine_from(chat, by_name=True, with_images=True)
    assert not any(is_tower(name) and "lora" in name for name, _ in engine.model.named_parameters())
    picture = Picture.read(data / "pics" / "red0.png")
    alone = ChatEngine.from_pretrained(str(tmp_path / "on"), with_images=True)
    request = [question_with_images("Colour?", 1)], Sampling(max_new_tokens=6)
    assert engine.siblings["on"].chat(*request, pictures=[picture]) == alone.chat(*request, pictures=[picture])


def test_inference_names_every_image_that_cannot_be_used(data, tmp_path):
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    model = ("--model_name_or_path", base)
    for more, message in (
        (("--query", "?", "--images", f"{tmp_path / 'no.png'},{base}"), "no.png does not exist.*\n.*is not a file"),
        (("--query", "?", "--images", "https://a.invalid/a.png"), "does not exist"),
        (("--query", "?", "--images", ""), "it names no file"),
        (("--interactive", "--images", "a.png"), "--images belongs to --query"),
    ):
        with pytest.raises(UserError, match=message):
            run_here("inference.py", *model, *more)
    rows = [{"question": "<image>?", "images": ["no.png"]}, {"question": "Why?"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*no.png does not exist"):
        run_here("inference.py", *model, "--data_file", tmp_path / "rows.jsonl", "--output_file", tmp_path / "a.jsonl")
    text = make_towers(tmp_path / "text", "gemma3")
    picture = save(tmp_path / "a.png")
    with pytest.raises(UserError, match="gemma3, which is not trained on images here"):
        run_here("inference.py", "--model_name_or_path", text, "--query", "?", "--images", picture)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_own_template_of_the_base_needs_no_flag(name, data, tmp_path):
    base = make_seeing(tmp_path / "base", name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = official(name)
    tokenizer.save_pretrained(base)
    given = flags(base, data, tmp_path / "out", "--max_steps", 1)
    del given[given.index("--template_name") : given.index("--template_name") + 2]
    open_stage(SFT, *given).finish()
    parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "Colour?"}]
    asked = {"conversation": [{"role": "user", "content": parts}], "tokenize": False, "add_generation_prompt": True}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        **asked
    ) == tokenizer.apply_chat_template(**asked)


def test_the_template_that_is_saved_writes_images(data, tmp_path):
    """For other programs, which send contents in parts; and the base's own is kept next to it."""
    base = make_seeing(tmp_path / "base", "qwen2_5_vl")
    open_stage(SFT, *flags(base, data, tmp_path / "out", "--max_steps", 1)).finish()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Colour?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}, ANSWER], tokenize=False)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>user\n{image}Colour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
