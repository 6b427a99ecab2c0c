"""Text in each encoding is read as it was written, or refused with the encoding named: never as other characters."""

import json

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.data.streaming import check_data
from medicalgpt.encodings import decode_text, find_encoding, sample_of
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_text
from medicalgpt.parser import parse_args
from medicalgpt.readers import text_files
from medicalgpt.readers.sources import read_rows

import pytest

CHINESE = "患者男，45岁，因“反复上腹部疼痛3个月”入院。查体：T 36.5℃。诊断：慢性胃炎？"
TRADITIONAL = "感冒是由病毒引起的，請多喝水、多休息。若發燒超過三天，應儘速就醫。"
JAPANESE = "風邪をひいたら、水分を十分にとって休んでください。熱が続く場合は医師に相談してください。"
KOREAN = "감기에 걸리면 물을 많이 마시고 충분히 쉬어야 합니다. 열이 나면 의사와 상담하십시오."
RUSSIAN = "При простуде нужно пить много воды и отдыхать. Если температура держится, обратитесь к врачу."
GREEK = "Όταν έχετε κρυολόγημα, πίνετε πολύ νερό. Αν ο πυρετός συνεχίζεται, μιλήστε με τον γιατρό."
GERMAN = "Bei einer Erkältung sollten Sie viel trinken. Größere Mengen Flüssigkeit müssen über den Tag verteilt werden."
FRENCH = "Après un rhume, il faut se reposer et boire de l’eau. Les antibiotiques n’aident pas, même à forte dose."
SPANISH = "síntomas y diagnóstico de la infección"
PORTUGUESE = "informação sobre a medicação"
SWEDISH = "Smörgåsbord är gott"
POLISH = "W przypadku przeziębienia należy pić dużo wody. Jeśli gorączka się utrzymuje, skontaktuj się z lekarzem."
CZECH = "Při nachlazení je třeba hodně pít a odpočívat. Pokud horečka přetrvává, vyhledejte lékaře."
TURKISH = "Soğuk algınlığında bol su için ve dinlenin. Ateş devam ederse doktorunuza danışın."
# What must be read, with the encoding it is written in.
READ = [
    *[
        (text, "gb18030")
        for text in (CHINESE, "感冒是病毒感染。", "感冒要多休息多喝水", "你好", "感冒\n病毒\n", TRADITIONAL)
    ],
    *[(text, "big5") for text in (TRADITIONAL, "感冒發燒", "高血壓患者應少吃鹽")],
    *[(text, "shift_jis") for text in (JAPANESE, "こんにちは", "風邪薬を飲む")],
    (JAPANESE, "euc_jp"),
    (JAPANESE, "iso2022_jp"),
    *[(text, "euc_kr") for text in (KOREAN, "안녕하세요")],
    *[(RUSSIAN, encoding) for encoding in ("cp1251", "koi8_r", "cp866", "iso8859_5")],
    (GREEK, "cp1253"),
    *[(text, "latin_1") for text in (GERMAN, SPANISH, PORTUGUESE, SWEDISH, "café", "Müller", "Größe", "37 °C", "5 µg")],
    *[(text, "cp1252") for text in (FRENCH, "It’s one tablet", "the “best” dose – 5 mg…", "It’s one.\n" * 500)],
    (FRENCH, "mac_roman"),
    (GERMAN, "cp850"),
    (POLISH, "cp1250"),
    (POLISH, "iso8859_2"),
    (CZECH, "cp1250"),
    (TURKISH, "cp1254"),
    *[(CHINESE, encoding) for encoding in ("utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le")],
    ("感冒是病毒感染。", "utf_16_le"),
    (KOREAN, "utf_16_le"),
    ("It is one tablet.\n", "utf_16_le"),
    ("fever\n", "utf_16_be"),
]
# What may be refused, but must not become something else.
UNCERTAIN = [
    ("嗜铬细胞瘤", "gb18030"),
    ("头孢克肟颗粒", "gb18030"),
    ("Été", "latin_1"),
    ("Übelkeit", "latin_1"),
    ("Грипп", "cp1251"),
    ("Привет", "koi8_r"),
    ("±5 %", "latin_1"),
    ("cœur", "iso8859_15"),
    (CZECH, "iso8859_2"),
    ("เมื่อเป็นหวัดควรดื่มน้ำมากๆ และพักผ่อน", "cp874"),
    ("כאשר אתה מצונן, שתה הרבה מים ונוח", "cp1255"),
    ("عند الإصابة بالزكام اشرب الكثير من الماء", "cp1256"),
]


@pytest.mark.parametrize(("text", "encoding"), READ, ids=lambda value: value[:12])
def test_each_encoding_is_read_with_one_decoded_line(tmp_path, text, encoding, log):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert "".join(row.value.strip() for row in read_rows(path)) == text.replace("\n", "").strip()
    (line,) = log
    shown = line.removeprefix(f"{path} is not UTF-8; it was read as ").partition(": ")[2]
    assert shown and shown in text
    # In a row of JSON, where most characters are ASCII.
    row = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    assert json.loads(decode_text(row.encode(encoding), "a.jsonl")[0].lstrip("\ufeff")) == json.loads(row)


@pytest.mark.parametrize(("text", "encoding"), UNCERTAIN, ids=lambda value: value[:12])
def test_what_is_not_certain_is_refused_or_right(text, encoding):
    try:
        assert decode_text(text.encode(encoding), "a.txt")[0] == text
    except UserError as refused:
        assert "Save the file as UTF-8, or name its encoding: --encoding " in str(refused)
    assert decode_text(text.encode(encoding), "a.txt", encoding)[0] == text


def test_every_beginning_of_a_text_is_right_or_refused():
    """Short texts are the ones that have several meanings."""
    usual = ("gb18030", "big5", "shift_jis", "euc_kr", "latin_1", "cp1252", "cp1251", "koi8_r", "utf_16_le")
    for text, encoding in ((text, encoding) for text, encoding in READ if encoding in usual):
        for end in range(1, min(len(text), 24)):
            data = text[:end].encode(encoding)
            try:
                found = decode_text(data, "a.txt")[0]
            except UserError:
                continue
            # Bytes that are valid UTF-8 by chance cannot be known for anything else.
            assert found.lstrip("\ufeff") == text[:end] or _is_utf8(data), (text[:end], encoding, found)


def _is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def test_the_remedy_of_a_refusal_reads_the_file(tmp_path, log):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one"}\n{"text": "嗜铬"}\n'.encode("gb18030"))
    arguments = {"train_file_dir": str(path)}
    with pytest.raises(UserError) as refused:
        load_data(DataArguments(**arguments), to_text)
    assert str(refused.value).startswith(f"{path}:2: neither UTF-8 nor certainly in another encoding")
    assert "as gb18030: " in str(refused.value) and "--encoding gb18030" in str(refused.value)
    named = load_data(DataArguments(**arguments, encoding="gb18030"), to_text)
    streamed = check_data(DataArguments(**arguments, encoding="gb18030"), to_text)
    assert [row["text"] for row in named.train] == [row["text"] for row in streamed.train] == ["one", "嗜铬"]
    assert [row.value["text"] for row in streamed.streams[0].files[0].read("auto")] == ["one", "嗜铬"]
    with pytest.raises(UserError, match="--encoding klingon is not an encoding"):
        load_data(DataArguments(**arguments, encoding="klingon"), to_text)
    with pytest.raises(UserError, match=f"{path}:2: not utf-8 text"):
        load_data(DataArguments(**arguments, encoding="utf8"), to_text)


def test_a_file_in_utf8_stays_utf8_whatever_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("naïve 感冒", encoding="utf-8")
    assert [row.value for row in read_rows(tmp_path / "a.txt", encoding="cp1252")] == ["naïve 感冒"]


@pytest.mark.parametrize("held", [0, 1_000_000])
def test_files_of_two_encodings_are_refused_with_the_line(tmp_path, monkeypatch, held):
    monkeypatch.setattr(text_files, "MAX_HELD_BYTES", held)
    path = tmp_path / "a.txt"
    path.write_bytes(f"{CHINESE}\n".encode("gb18030") * 20 + f"{CHINESE}\n".encode())
    with pytest.raises(UserError, match=f"{path}:1: this line is not UTF-8, but line 21 is"):
        list(read_rows(path))
    path.write_bytes(f"{CHINESE}\n".encode("gb18030") * 2_000 + f"{KOREAN}\n".encode("euc_kr") * 2_000)
    with pytest.raises(UserError, match="neither UTF-8 nor gb18030, as other lines are"):
        list(read_rows(path))


def test_zero_bytes_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("感冒\n".encode() + b"\0\0\0 fever\n")
    with pytest.raises(UserError, match=f"{path}:2: it contains zero bytes"):
        list(read_rows(path))


def test_a_late_line_decides_in_a_long_file(tmp_path):
    """The sample is of the lines that are not ASCII, wherever they are."""
    data = b"plain ASCII text of one line\n" * 5_000 + "Größe und Übelkeit müssen geprüft werden\n".encode("latin_1")
    assert find_encoding(sample_of(data), "a.txt").encoding == "cp1252"


@pytest.mark.parametrize("encoding", ["gb18030", "utf_16", "utf_16_le", "big5"])
def test_a_config_file_in_another_encoding(tmp_path, capsys, encoding):
    path = tmp_path / "run.yaml"
    path.write_bytes("# 訓練的設定，請勿刪除\ntrain_file_dir: data/病人\n".encode(encoding))
    (arguments,) = parse_args(DataArguments, argv=["--config", str(path)])
    assert arguments.train_file_dir == "data/病人"
    assert f"note: {path} is not UTF-8; it was read as" in capsys.readouterr().err
    path.write_bytes(b"train_file_dir: \xff\xff\xff\n")
    with pytest.raises(SystemExit):
        parse_args(DataArguments, argv=["--config", str(path)])
    shown = capsys.readouterr().err
    assert "neither UTF-8 nor certainly" in shown and "Save the file as UTF-8." in shown and "Traceback" not in shown


def test_rows_of_latin1_are_trained_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"prompt": "Qu’est-ce ?", "response": GERMAN}, ensure_ascii=False).encode("cp1252"))
    (row,) = load_data(DataArguments(train_file_dir=str(path)), to_messages).train
    assert [turn["content"] for turn in row["messages"]] == ["Qu’est-ce ?", GERMAN]
