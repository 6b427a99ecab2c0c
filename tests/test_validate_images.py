"""validate_jsonl.py reads rows with images as training does; prepare_data.py refuses them and says what to do."""

import re
import shutil

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import DataError
from tests.helpers import open_stage, read_json, run_here, write_jsonl
from tests.pictures import COLOURS, SFT, SIZES, flags, save, write_colours
from tests.tiny import make_tiny
from tests.towers import make_seeing

import pytest

SCRIPT = "validate_jsonl.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_seeing(tmp_path_factory.mktemp("validate") / "base", "qwen2_5_vl")


@pytest.fixture
def data(tmp_path):
    return write_colours(tmp_path / "data")


def with_model(base, *more):
    return ("--model_name_or_path", base, "--template_name", "chatml", *more)


def test_problems_are_those_of_training_all_at_once(base, data, tmp_path):
    rows = read_json(data / "rows.jsonl")
    (data / "pics" / "text.png").write_text("not an image")
    for images, content in ((["pics/none.png"], "<image>?"), (["pics/text.png"], "<image>?"), (["pics/red0.png"], "?")):
        answer = {"role": "assistant", "content": "red"}
        rows.append({"messages": [{"role": "user", "content": content}, answer], "images": images})
    path = write_jsonl(data / "rows.jsonl", rows)
    with pytest.raises(DataError, match="^3 problem") as trained:
        open_stage(SFT, *flags(base, data, tmp_path / "never"))
    for model in ((), with_model(base)):
        with pytest.raises(DataError) as checked:
            run_here(SCRIPT, "--file_path", data, *model)
        assert sorted(str(checked.value).splitlines()) == sorted(str(trained.value).splitlines())
    for number, reason in (
        (13, "does not exist"),
        (14, "not an image that can be read"),
        (15, "0 <image> in the text"),
    ):
        assert re.search(rf"{path}:{number}: .*{reason}", str(checked.value))


def test_images_are_counted_and_their_tokens(base, data, capsys):
    run_here(SCRIPT, "--file_path", data)
    assert f"  images: {len(SIZES) * len(COLOURS)}\n" in capsys.readouterr().out

    def longest(*more):
        run_here(SCRIPT, "--file_path", data, *with_model(base, *more))
        out = capsys.readouterr().out
        assert out.endswith("every row can be used\n")
        return int(re.search(r" 100%: (\d+)$", out, re.MULTILINE)[1])

    # 24 x 16 pixels are 3 x 2 squares of 8 x 8; scaled to 64 pixels, they are one.
    assert longest("--image_max_pixels", 4096) - longest("--image_max_pixels", 64) == 5
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: \d+ tokens \(6 of them of images; --image_max_pixels lowers"):
        run_here(SCRIPT, "--file_path", data, *with_model(base, "--model_max_length", 30, "--long_rows", "refuse"))


def test_a_model_that_takes_text_and_bounds_without_images_are_refused(base, data, tmp_path, capsys):
    tiny = make_tiny(tmp_path / "tiny")
    with pytest.raises(DataError, match="(?s)^8 problem.*only text is trained on here") as refused:
        run_here(SCRIPT, "--file_path", data, "--model_name_or_path", tiny)
    assert "Qwen2.5-VL or Qwen3-VL" in str(refused.value)
    with pytest.raises(UserError, match="--image_max_pixels would have no effect: .*not trained on images"):
        run_here(SCRIPT, "--file_path", data, "--model_name_or_path", tiny, "--image_max_pixels", 64)
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--file_path", data, "--image_max_pixels", 64)
    assert "--image_max_pixels has no effect without --model_name_or_path" in capsys.readouterr().err
    text = write_jsonl(tmp_path / "text.jsonl", [{"prompt": "Q", "response": "A"}])
    with pytest.raises(UserError, match="--image_max_pixels would have no effect: no row has an image"):
        run_here(SCRIPT, "--file_path", text, *with_model(base, "--image_max_pixels", 4096))


def test_the_same_words_about_another_image_are_another_row(data, tmp_path, capsys):
    run_here(SCRIPT, "--file_path", data, "--stats_file", tmp_path / "found.json")
    assert "duplicates" not in capsys.readouterr().out
    (found,) = read_json(tmp_path / "found.json")["files"]
    # `<image>` is not among the characters: "Colour?", a line feed and "blue".
    assert found["characters"]["100"] == 13
    # The same image in another file.
    shutil.copy(data / "pics" / "red0.png", data / "pics" / "copy.png")
    first = read_json(data / "rows.jsonl")[0]
    write_jsonl(data / "rows.jsonl", [*read_json(data / "rows.jsonl"), {**first, "images": ["pics/copy.png"]}])
    run_here(SCRIPT, "--file_path", data)
    assert "exact duplicates: 1 of 13 rows" in capsys.readouterr().out


def test_the_cleaned_copy_finds_the_images(data, tmp_path, capsys):
    save(data / "sub" / "b.png", colour="green")
    row = {"prompt": " <image>Colour?", "response": "green"}
    write_jsonl(data / "sub" / "more.jsonl", [{**row, "images": [name]} for name in ("b.png", "none.png")])
    run_here(SCRIPT, "--file_path", data, "--fix")
    out = capsys.readouterr().out
    assert "13 of 14 rows; left out: 1 unusable" in out and "9 paths of images" in out
    fixed = tmp_path / "data_fixed"
    assert [row.get("images") for row in read_json(fixed / "rows.jsonl")][:1] == [["../data/pics/red0.png"]]
    assert [row["images"] for row in read_json(fixed / "sub" / "more.jsonl")] == [["../../data/sub/b.png"]]
    run_here(SCRIPT, "--file_path", fixed)
    out = capsys.readouterr().out
    assert "  images: 8\n" in out and "  images: 1\n" in out and out.endswith("every row can be used\n")


def test_rows_that_cannot_be_prepared_are_trained_from_their_files(base, data, tmp_path):
    prepare = ("prepare_data.py", "--format", "chat", "--train_file_dir", data, "--prepared_dir", tmp_path / "shards")
    with pytest.raises(DataError, match="(?s)^8 problem.*only text is trained on here") as refused:
        run_here(*prepare, *with_model(base))
    assert "from files that are neither streamed nor prepared" in str(refused.value)
    assert open_stage(SFT, *flags(base, data, tmp_path / "out")).trainer.vision
    # The other rows, as the message says.
    run_here(*prepare, *with_model(base, "--skip_bad_rows", True))
    assert read_json(tmp_path / "shards" / "index.json")["used"] == len(SIZES)
