"""Rows with images: what is read, what is refused, which tokens they become and which of these are trained on."""

import base64
import json
import shutil
import struct
from functools import partial
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data.batching import Collator, ImageCollator
from medicalgpt.data.encoding import (
    IGNORED,
    EncodingError,
    ImageSample,
    ShortenedSamples,
    encode_chat,
    prompt_pictures,
    render_prompts,
)
from medicalgpt.data.images import MAX_BYTES, MAX_PIXELS, ImageError, Picture, write_image_tokens
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_rows
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import (
    Converter,
    to_messages,
    to_messages_with_images,
    to_preference,
    to_prompt_with_images,
)
from medicalgpt.formats.image_rows import move_image_paths
from medicalgpt.models.hub import Checkpoint, CheckpointError
from medicalgpt.models.loading import checkpoint_tokenizer
from medicalgpt.models.templating import with_image_parts
from medicalgpt.models.vision import Vision, check_same_bounds
from medicalgpt.readers.problems import DataError, RowError
from medicalgpt.training.preview import decode_shortened
from template import apply_template
from tests.helpers import read_json, write_jsonl
from tests.pictures import ANSWER, png_that_claims, save
from tests.towers import make_seeing

import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PLACED = [{"type": "image"}, {"type": "text", "text": "Colour?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_seeing(tmp_path_factory.mktemp("seeing"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def vision(base):
    return vision_of(base)


def vision_of(folder, **bounds) -> Vision:
    checkpoint = Checkpoint.resolve(str(folder))
    return Vision.of(checkpoint, checkpoint_tokenizer(checkpoint), **bounds)


@pytest.fixture
def tokenizer(base):
    tokenizer = checkpoint_tokenizer(Checkpoint.resolve(base))
    apply_template(tokenizer, "chatml")
    return tokenizer


# -- the spellings of rows --------------------------------------------------------------------------------------------

SHAPES = {
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "Red."}],
        "images": ["a.png"],
    },
    "ms-swift": {"messages": [{"role": "user", "content": "<image>Colour?"}, ANSWER], "images": ["a.png"]},
    "ms-swift, with a dict": {
        "messages": [{"role": "user", "content": "<image>Colour?"}, ANSWER],
        "images": [{"path": "a.png", "bytes": None}],
    },
    "LLaVA": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "Red."}],
    },
    "an instruction": {"instruction": "<image>Colour?", "input": "", "output": "Red.", "images": ["a.png"]},
    "Qwen": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "file://a.png"}, {"type": "text", "text": "Colour?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ]
    },
    "OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}, "text": None},
                    {"type": "text", "text": "Colour?", "image_url": None},
                ],
            },
            ANSWER,
        ]
    },
    "parts, and a list": {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}, ANSWER],
        "images": ["a.png"],
    },
    "turns as a string of JSON": {
        "messages": json.dumps([{"role": "user", "content": [{"type": "image", "image": "a.png"}, "Colour?"]}, ANSWER])
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_every_shape_become_the_same(name):
    wanted = {"messages": [{"role": "user", "content": PLACED}, ANSWER], "tools": None, "images": ["a.png"]}
    conversion = Converter(to_messages_with_images).convert(SHAPES[name])
    assert conversion.row == wanted
    assert not conversion.unused
    with pytest.raises(RowError) as refused:
        to_messages(SHAPES[name])
    assert "supervised_finetuning.py with Qwen2.5-VL or Qwen3-VL" in refused.value.remedy


@pytest.mark.parametrize("name", SHAPES)
def test_paths_move_with_the_data_file(name):
    moved = move_image_paths(SHAPES[name], ["a.png"], Path("data/in"), Path("data_fixed"))
    converted = to_messages_with_images(SHAPES[name])
    assert to_messages_with_images(moved) == {**converted, "images": ["../data/in/a.png"]}
    absolute = json.loads(json.dumps(SHAPES[name]).replace("a.png", "/pics/a.png"))
    kept = move_image_paths(absolute, ["/pics/a.png"], Path("data/in"), Path("data_fixed"))
    assert to_messages_with_images(kept)["images"] == ["/pics/a.png"]


def test_fields_that_are_named_on_the_command_line():
    convert = Converter(to_messages_with_images, columns={"question": "问", "answer": "答", "images": "图"})
    given = {"问": "<image>Colour?", "答": "Red.", "图": "a.png"}
    row = {"messages": [{"role": "user", "content": PLACED}, ANSWER], "tools": None, "images": ["a.png"]}
    assert convert(given) == row
    assert move_image_paths(given, ["a.png"], Path("in"), Path("out"), "图") == {**given, "图": "../in/a.png"}


def test_several_images_in_several_turns_keep_their_places():
    row = {
        "messages": [
            {"role": "user", "content": "A <image> and <image>."},
            ANSWER,
            {"role": "user", "content": [{"type": "text", "text": "Or "}, {"type": "image"}]},
            ANSWER,
        ],
        "images": ["1.png", "2.png", "3.png"],
    }
    converted = to_messages_with_images(row)
    assert converted["images"] == ["1.png", "2.png", "3.png"]
    image, text = {"type": "image"}, "text"
    assert converted["messages"][0]["content"] == [
        *({"type": text, "text": "A "}, image, {"type": text, "text": " and "}, image, {"type": text, "text": "."})
    ]
    assert converted["messages"][2]["content"] == [{"type": text, "text": "Or "}, image]


def test_rows_without_images_are_as_before():
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "An <image> tag."}]}
    assert to_messages_with_images(row) == to_messages(row)
    assert to_messages_with_images({**row, "images": []}) == to_messages(row)


def test_the_mark_is_text_in_a_question_without_images():
    assert to_prompt_with_images("What is <image>?")["messages"] == [{"role": "user", "content": "What is <image>?"}]
    row = to_prompt_with_images({"question": "<image>Colour?", "answer": "Red.", "images": ["a.png"]})
    assert row["messages"][0]["content"] == PLACED and row["reference"] == "Red." and row["images"] == ["a.png"]


def row_of(content="<image>Colour?", images=("a.png",), answer="Red."):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)} if images is not None else {"messages": turns}


REFUSED = {
    "more marks": (row_of("<image><image>?"), r"2 <image> in the text, and 1 image\(s\)", "List each image"),
    "fewer marks": (
        row_of("Colour?"),
        r"0 <image> in the text, and 1 image\(s\)",
        "Write <image> into the user's text",
    ),
    "a lost image": (row_of(images=None), r"1 <image> in the text, and 0 image\(s\)", "write it another way"),
    "a mark in an answer": (
        row_of(answer="<image>Red."),
        r"turn 2 \(assistant\) has an image",
        "the user's turn before",
    ),
    "a part of an answer": (
        {
            "messages": [
                {"role": "user", "content": "Draw."},
                {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
            ]
        },
        r"turn 2 \(assistant\) has an image",
        "Move the image",
    ),
    "a network address": (
        row_of(images=["https://a.invalid/a.png"]),
        "network address, and nothing is fetched",
        "Download",
    ),
    "an address in a part": (
        row_of([{"type": "image_url", "image_url": {"url": "http://a.invalid/a.png"}}], None),
        "network address",
        "Download",
    ),
    "within the row": (row_of(images=["data:image/png;base64,AAAA"]), "an image within the row", "Write it to a file"),
    "bytes of a table": (
        row_of(images=[{"bytes": "AAAA", "path": "a.png"}]),
        "not a path",
        "Write the image to a file",
    ),
    "a number": (row_of(images=[7]), "not a path", "Write the image to a file"),
    "both fields": ({**row_of(), "image": "b.png"}, "both `images` and `image`", "Keep one"),
    "two lists": (
        row_of([{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]),
        "`images` and the images in the turns differ",
        "Keep one",
    ),
    "a path for one of two": (
        row_of([{"type": "image", "image": "b.png"}, {"type": "image"}], None),
        "1 of 2 images in the turns have no path",
        "list all in `images`",
    ),
    "bounds of one image": (
        row_of([{"type": "image", "image": "b.png", "max_pixels": 9}], None),
        "`max_pixels`, which is not read",
        "--image_max_pixels",
    ),
    "a video": ({**row_of(), "videos": ["a.mp4"]}, "`videos`, and only text", "videos and audio are not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused(name):
    row, reason, remedy = REFUSED[name]
    with pytest.raises(RowError, match=reason) as error:
        to_messages_with_images(row)
    assert remedy in error.value.remedy


def test_other_stages_refuse_images_and_say_who_takes_them():
    pair = {"prompt": "<image>?", "chosen": "a", "rejected": "b", "images": ["a.png"]}
    with pytest.raises(RowError, match="only text is trained on here") as error:
        to_preference(pair)
    assert "supervised_finetuning.py" in error.value.remedy and "--skip_bad_rows True" in error.value.remedy


# -- the files --------------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, str]:
    """Reasons by the names of files that are not images a model can be shown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.png").write_text("not an image")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(folder / "whole.jpg")
    cut = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(cut[: len(cut) * 2 // 3])
    noise.save(folder / "whole.png")
    flipped = bytearray((folder / "whole.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    # After the pixels, where decoding has ended.
    whole = (folder / "whole.png").read_bytes()
    (folder / "tail.png").write_bytes(whole[:-12] + struct.pack(">I4s4sI", 4, b"tEXt", b"a\0bc", 0) + whole[-12:])
    (folder / "bomb.png").write_bytes(png_that_claims(60_000, 60_000))
    (folder / "large.png").write_bytes(png_that_claims(MAX_PIXELS // 1000 + 1, 1000))
    with open(folder / "heavy.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    save(folder / "strip.png", (500, 2))
    Image.new("I;16", (16, 16), 3000).save(folder / "xray.png")
    save(folder / "film.gif", colour=1, mode="L", save_all=True, append_images=[Image.new("L", (16, 16), 200)])
    (folder / "folder.png").mkdir()
    return {
        "missing.png": "missing.png does not exist",
        "text.png": "not an image that can be read",
        "cut.jpg": "damaged",
        "flipped.png": "damaged",
        "tail.png": "damaged",
        "bomb.png": f"more than {MAX_PIXELS:,} pixels",
        "large.png": f"more than {MAX_PIXELS:,} pixels",
        "heavy.png": f"more than {MAX_BYTES:,}",
        "strip.png": "one side more than 200 times the other",
        "xray.png": "pixels of the type I;16",
        "film.gif": "2 pictures",
        "folder.png": "is not a file",
    }


def test_every_file_that_cannot_be_used_is_reported_at_once(tmp_path):
    reasons = broken_files(tmp_path / "data" / "pics")
    rows = [row_of(images=[f"pics/{name}"]) for name in reasons]
    save(tmp_path / "data" / "pics" / "good.png")
    rows.append(row_of("<image><image>", ["pics/good.png", "pics/missing.png"]))
    rows.append(row_of(images=["pics/good.png"]))
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    arguments = DataArguments(train_file_dir=str(tmp_path / "data"))
    data = load_data(arguments, to_messages_with_images)
    with pytest.raises(DataError) as error:
        data.settle(arguments)
    lines = str(error.value).splitlines()
    for number, (name, reason) in enumerate(reasons.items(), start=1):
        line = next(line for line in lines if f"rows.jsonl:{number}:" in line)
        assert reason in line and f"[pics/{name}]" in line, line
    assert f"{len(reasons) + 1} problem(s)" in lines[0]
    skipping = DataArguments(train_file_dir=str(tmp_path / "data"), skip_bad_rows=True)
    data = load_data(skipping, to_messages_with_images)
    data.settle(skipping)
    (account,) = data.account["train"]
    assert (account.rows, account.used, account.images) == (len(rows), 1, 1)


def test_images_of_every_usual_kind(tmp_path):
    modes = {"L": 9, "LA": (9, 200), "P": 3, "RGB": "red", "RGBA": (255, 0, 0, 9), "1": 1}
    for mode, colour in modes.items():
        assert Picture.read(save(tmp_path / f"{mode}.png", (20, 10), colour, mode)).width == 20
    for suffix in ("jpg", "webp", "bmp", "gif", "tiff"):
        assert Picture.read(save(tmp_path / f"a.{suffix}", (20, 10))).height == 10
    save(tmp_path / "cmyk.jpg", (20, 10), (0, 9, 9, 0), "CMYK")
    assert Picture.read(tmp_path / "cmyk.jpg").decode().mode == "CMYK"


def test_a_photo_that_was_taken_sideways_is_upright(tmp_path):
    photo = Image.new("RGB", (32, 16), "red")
    photo.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    picture = Picture.read(tmp_path / "a.png")
    assert (picture.width, picture.height) == (16, 32) == picture.decode().size
    # Turned clockwise, the first corner is the upper right one.
    assert picture.decode().getpixel((15, 0)) == (0, 0, 255)


def test_paths_are_relative_to_the_data_file_or_absolute(tmp_path):
    elsewhere = save(tmp_path / "elsewhere" / "b.png", (24, 8))
    save(tmp_path / "data" / "a.png")
    write_jsonl(tmp_path / "data" / "rows.jsonl", [row_of("<image><image>?", ["a.png", elsewhere])])
    (row,) = load_data(DataArguments(train_file_dir=str(tmp_path / "data")), to_messages_with_images).train
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "data" / "a.png"), elsewhere]
    assert [(image["width"], image["height"]) for image in row["images"]] == [(16, 16), (24, 8)]


def test_the_same_image_in_another_file_is_not_held_out(tmp_path):
    for side in ("train", "validation"):
        save(tmp_path / side / f"{side}.png")
        write_jsonl(tmp_path / side / "rows.jsonl", [row_of(images=[f"{side}.png"])])
    arguments = DataArguments(train_file_dir=str(tmp_path / "train"), validation_file_dir=str(tmp_path / "validation"))
    with pytest.raises(UserError, match="held-out rows are also trained on"):
        load_data(arguments, to_messages_with_images)
    save(tmp_path / "validation" / "validation.png", colour="blue")
    assert load_data(arguments, to_messages_with_images).validation


def test_images_of_a_request(tmp_path):
    content = Path(save(tmp_path / "a.png", (20, 10))).read_bytes()
    address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    picture = Picture.from_data_address(address)
    assert (picture.width, picture.height) == (20, 10) == picture.decode().size
    for refused, reason in (
        ("http://127.0.0.1/a.png", "nothing is fetched from an address"),
        ("file:///etc/passwd", "nothing is fetched from an address"),
        (save(tmp_path / "b.png"), "nothing is fetched from an address"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:text/html;base64,AAAA", "nothing is fetched from an address"),
        (f"data:image/png;base64,{base64.b64encode(png_that_claims(60_000, 60_000)).decode()}", "more than 64,000,000"),
        (f"data:image/png;base64,{'A' * (MAX_BYTES * 4 // 3 + 200)}", f"more than {MAX_BYTES:,}"),
    ):
        with pytest.raises(ImageError, match=reason):
            Picture.from_data_address(refused)


def test_a_file_that_changes_after_it_was_checked(tmp_path, vision):
    path = save(tmp_path / "a.png")
    picture = Picture.read(path)
    save(tmp_path / "a.png", (32, 16))
    with pytest.raises(ImageError, match="32 x 16 pixels, and had 16 x 16"):
        picture.decode()
    row = {"input_ids": [vision.tokens.ids[0]] * 4, "labels": [IGNORED] * 4, "pictures": [path]}
    with pytest.raises(UserError, match="not those that were checked when the rows were read: they have 8 tokens"):
        ImageCollator(Collator(0), vision)([row])


# -- tokens and masks -------------------------------------------------------------------------------------------------


def converted(images, messages):
    found = [{"path": f"{n}.png", "width": w, "height": h, "sha256": str(n)} for n, (w, h) in enumerate(images)]
    return {"messages": messages, "tools": None, "images": found}


QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}


def spelled(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_and_labels_are_those_written_out_by_hand(tokenizer, vision):
    # 16 x 24 pixels are 2 x 3 tokens of 8 x 8.
    (sample,) = encode_chat(tokenizer, converted([(16, 24)], [QUESTION, ANSWER]), images=vision.tokens)
    prompt = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    before, answer, after = (spelled(tokenizer, text) for text in (prompt, "Red.<|im_end|>", "\n"))
    assert sample.input_ids == before + answer + after
    assert sample.labels == [IGNORED] * len(before) + answer + [IGNORED] * len(after)
    assert isinstance(sample, ImageSample) and sample.pictures == ["0.png"]


def test_tokens_of_images_are_never_trained_on(tokenizer, vision):
    row = converted([(16, 16), (8, 8)], [QUESTION, ANSWER, QUESTION, ANSWER])
    (sample,) = encode_chat(tokenizer, row, images=vision.tokens, train_on_inputs=True)
    of_images = [token in vision.tokens.ids for token in sample.input_ids]
    assert sum(of_images) == (4 + 2) + (1 + 2)
    assert [label == IGNORED for label in sample.labels] == of_images
    assert sample.pictures == ["0.png", "1.png"]


def test_a_sample_has_the_images_of_its_own_turns(tokenizer, vision):
    """A template that drops earlier thoughts makes two samples of this conversation."""
    apply_template(tokenizer, "qwen3")
    answers = [{**ANSWER, "reasoning_content": "I look."}] * 2
    row = converted([(16, 16), (8, 8)], [QUESTION, answers[0], QUESTION, answers[1]])
    samples = encode_chat(tokenizer, row, images=vision.tokens)
    assert [sample.pictures for sample in samples] == [["0.png"], ["0.png", "1.png"]]


def test_rows_that_are_too_long(tokenizer, vision):
    row = converted([(64, 64)], [QUESTION, ANSWER])
    with pytest.raises(EncodingError, match=r"\d+ tokens \(64 of them of images; --image_max_pixels") as error:
        encode_chat(tokenizer, row, max_length=60, images=vision.tokens)
    assert error.value.too_long and error.value.tokens > 64
    # Of two exchanges the first fits, and its image with it.
    row = converted([(8, 8), (64, 64)], [QUESTION, ANSWER, QUESTION, ANSWER])
    kept = encode_chat(tokenizer, row, max_length=60, images=vision.tokens, shorten_rows=True)
    assert isinstance(kept, ShortenedSamples) and [sample.pictures for sample in kept] == [["0.png"]]


def test_rows_that_are_too_long_are_skipped_and_counted(tmp_path, tokenizer, vision):
    for number, size in enumerate([(8, 8), (64, 64), (16, 16)]):
        save(tmp_path / f"{number}.png", size)
    write_jsonl(tmp_path / "rows.jsonl", [row_of(images=[f"{number}.png"]) for number in range(3)])
    arguments = DataArguments(train_file_dir=str(tmp_path))
    data = load_data(arguments, to_messages_with_images)
    encode = partial(encode_chat, tokenizer, max_length=80, images=vision.tokens)
    encoded = encode_rows(data, "train", encode, sample=ImageSample)
    data.settle(arguments)
    assert [row["pictures"] for row in encoded] == [[str(tmp_path / "0.png")], [str(tmp_path / "2.png")]]
    assert data.account["train"][0].left_out == {"too long": 1}
    # Another picture of the same name and size is another row for the cache.
    assert encode_rows(data, "train", encode, sample=ImageSample).column_names == encoded.column_names


def test_a_text_that_imitates_an_image_is_refused(tokenizer, vision):
    row = converted([], [{"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>"}, ANSWER])
    with pytest.raises(EncodingError, match="special token"):
        encode_chat(tokenizer, row, images=vision.tokens)


def test_a_template_that_leaves_out_an_image_is_refused(tokenizer, vision):
    body = tokenizer.chat_template
    tokenizer.chat_template = body.replace("message.content", "message.content | replace('<|image_pad|>', '')")
    assert tokenizer.chat_template != body
    with pytest.raises(EncodingError, match="leaves out an image"):
        encode_chat(tokenizer, converted([(16, 16)], [QUESTION, ANSWER]), images=vision.tokens)


@pytest.mark.parametrize("template", ["chatml", "qwen", "qwen3", "qwen3_nothink"])
def test_the_processor_of_other_programs_gives_the_same_prompt(template, tmp_path, base, tokenizer, vision):
    """The template is saved so that a processor writes images with it, and expands them to the same tokens."""
    apply_template(tokenizer, template)
    image = "".join((vision.tokens.start, vision.tokens.pad, vision.tokens.end))
    before = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    tokenizer.chat_template = with_image_parts(tokenizer, image)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == before
    assert with_image_parts(tokenizer, image) == tokenizer.chat_template, "twice is once"
    # The next stage keeps it, marks included.
    again = tokenizer.chat_template
    apply_template(tokenizer)
    assert tokenizer.chat_template == again
    picture = Picture.read(save(tmp_path / "a.png", (40, 24)))
    processor = Qwen2VLImageProcessorPil.from_pretrained(base)
    grid = processor([picture.decode()], return_tensors="pt")["image_grid_thw"]
    text = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    expanded = text.replace(vision.tokens.pad, vision.tokens.pad * (int(grid.prod()) // 4))
    row = {**converted([(40, 24)], [QUESTION]), "tools": None}
    assert render_prompts(tokenizer, [row], 1, vision.tokens) == [spelled(tokenizer, expanded)]
    assert prompt_pictures([row], 1)[0][0].width == 40


def test_numbers_of_tokens_are_those_of_the_processor(base):
    for bounds in ({}, {"min_pixels": 256, "max_pixels": 1024}):
        vision = vision_of(base, **bounds)
        for size in ((8, 8), (16, 24), (100, 60), (3, 200), (640, 480), (9, 9)):
            encoded = vision.encode([Image.new("RGB", size)])
            patches = vision.tokens.count(*size) * 4
            assert patches == len(encoded["pixel_values"]) == int(encoded["image_grid_thw"].prod())
            narrow = max(size) > 10 * min(size)
            assert narrow or patches * 16 <= vision.tokens.max_pixels


def test_the_collator_gives_images_to_the_rows_that_have_some(tmp_path, vision):
    pad = vision.tokens.ids[0]
    red, blue = save(tmp_path / "r.png", (8, 16)), save(tmp_path / "b.png", (8, 8), "blue")
    rows = [
        {"input_ids": [1, 2], "labels": [IGNORED, 2], "pictures": []},
        {"input_ids": [1, pad, pad, 5, pad], "labels": [IGNORED] * 5, "pictures": [red, blue]},
    ]
    batch = ImageCollator(Collator(0), vision)(rows)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 2]]
    assert batch["pixel_values"].shape == (8 + 4, 3 * 2 * 4 * 4)
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]
    assert batch["pixel_values"][0, 0] > 0 > batch["pixel_values"][-1, 0], "red comes first"
    assert set(ImageCollator(Collator(0), vision)(rows[:1])) == {"input_ids", "labels", "attention_mask"}


# -- settings of a checkpoint -----------------------------------------------------------------------------------------


def test_bounds_come_from_the_flags_the_adapter_or_the_base(base, tmp_path):
    assert vision_of(base).settings["size"] == {"shortest_edge": 64, "longest_edge": 4096}
    given = vision_of(base, min_pixels=128, max_pixels=1024, trains=True)
    assert (given.tokens.min_pixels, given.tokens.max_pixels) == (128, 1024)
    given.save(tmp_path)
    saved = read_json(tmp_path / "preprocessor_config.json")
    before = read_json(Path(base, "preprocessor_config.json"))
    assert saved == before | {"min_pixels": 128, "max_pixels": 1024}
    copied = Path(shutil.copytree(base, tmp_path / "copy"))
    for settings in (
        {"size": {"shortest_edge": 64, "longest_edge": 50_000_000}},
        {"min_pixels": 64, "max_pixels": 50_000_000},
    ):
        content = {name: value for name, value in before.items() if "pixels" not in name} | settings
        (copied / "preprocessor_config.json").write_text(json.dumps(content))
        assert vision_of(copied).tokens.max_pixels == 50_000_000
        assert vision_of(copied, trains=True).tokens.max_pixels == 589_824
        vision_of(copied, trains=True, max_pixels=700_000).save(copied)
        assert vision_of(copied).tokens.max_pixels == 700_000
        assert set(read_json(copied / "preprocessor_config.json")) == set(content)
    nested = {"image_processor": content, "video_processor": {"size": 1}}
    (copied / "preprocessor_config.json").unlink()
    (copied / "processor_config.json").write_text(json.dumps(nested))
    vision_of(copied, max_pixels=640).save(copied)
    assert read_json(copied / "processor_config.json")["video_processor"] == {"size": 1}
    assert vision_of(copied).tokens.max_pixels == 640


def test_checkpoints_and_bounds_that_are_refused(base, tmp_path):
    for bounds, message in (
        ({"max_pixels": 63}, "--image_max_pixels 63 is less than one token, which is 8 x 8"),
        ({"min_pixels": 5000}, "--image_min_pixels 5000 is more than --image_max_pixels 4096"),
    ):
        with pytest.raises(UserError, match=message):
            vision_of(base, **bounds)
    copied = Path(shutil.copytree(base, tmp_path / "copy"))
    path = copied / "preprocessor_config.json"
    for text, message in (
        ('{"image_processor_type": "CLIPImageProcessor"}', "of CLIPImageProcessor, and only Qwen2VLImageProcessor"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            vision_of(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        vision_of(copied)


def test_adapters_of_other_bounds_are_not_combined(base, tmp_path):
    for name, most in (("a", 1024), ("b", 2048), ("c", 1024)):
        (tmp_path / name).mkdir()
        vision_of(base, max_pixels=most).save(tmp_path / name)
    (tmp_path / "text").mkdir()
    check_same_bounds([str(tmp_path / name) for name in ("a", "c", "text")])
    with pytest.raises(UserError, match=r"other sizes: .*a \(64 to 1,024 pixels\), .*b \(64 to 2,048 pixels\)"):
        check_same_bounds([str(tmp_path / "a"), str(tmp_path / "b")])


def test_repeated_tokens_are_shown_once(tokenizer, vision):
    ids = spelled(tokenizer, "a" * 20 + "<|vision_start|>" + "<|image_pad|>" * 30 + "<|vision_end|>中文")
    assert decode_shortened(tokenizer, ids) == "a" * 20 + "<|vision_start|><|image_pad|>×30<|vision_end|>中文"
    plain = spelled(tokenizer, "感冒<|im_end|>\n")
    assert decode_shortened(tokenizer, plain) == tokenizer.decode(plain)


def test_messages_with_the_tokens_of_images(vision):
    (message,) = write_image_tokens([QUESTION], [Picture(8, 16)], vision.tokens)
    assert message["content"] == "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>?"
