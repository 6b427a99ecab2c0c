"""Retrieval: passages, terms, ranking and fusion; which files are read, and what is kept of them on disk."""

from chatpdf import FileArguments
from medicalgpt.errors import UserError
from medicalgpt.formats.terms import extract_terms, is_standalone, language_of, question_terms
from medicalgpt.rag import grounding, retrieval
from medicalgpt.rag.documents import Document, DocumentError, Unit
from medicalgpt.rag.retrieval import (
    Collection,
    DocumentStore,
    Passage,
    SearchResult,
    find_documents,
    split,
)
from tests.passages import ILLNESSES

import numpy as np
import pytest


def relevant(found: SearchResult, min_similarity: float | None = None, confidence=FileArguments.min_confidence) -> bool:
    return grounding.is_relevant(found, min_similarity, confidence, FileArguments.min_relevance)


# --- passages --------------------------------------------------------------------------------------------------------


def test_passages_are_whole_sentences_under_one_heading_on_one_page():
    sentences = [f"第{n}句话说的是同一件事情。" for n in range(12)]
    units = [
        Unit("".join(sentences), ("甲",), 1),
        Unit("A short paragraph. It has two sentences.", ("甲",), 1),
        Unit("下一页。", ("甲",), 2),
        Unit("下一节。", ("乙",), 2),
    ]
    passages = split("f.pdf", units, size=50, overlap=15)
    assert [(p.page, p.headings) for p in passages[-2:]] == [(2, ("甲",)), (2, ("乙",))]
    first_page = [p.text for p in passages if p.page == 1]
    assert len(passages) == len(first_page) + 2 and len(first_page) > 3
    for text, following in zip(first_page, first_page[1:], strict=False):
        assert text.endswith(("。", ".")) and len(extract_terms(text)) > 0
        # One sentence fits into the overlap of 15, two do not.
        last = text[text.rfind("。", 0, -1) + 1 :]
        assert following.startswith(last) and following.count(last) == 1 and len(following) > len(last)
    for sentence in [*sentences, "It has two sentences."]:
        assert any(sentence in text for text in first_page)


def test_what_never_ends_is_cut():
    passages = split("f.txt", [Unit("x " * 2000)], size=100, overlap=20)
    assert max(len(p.text) for p in passages) <= 1000
    assert "".join(p.text for p in passages).count("x") == 2000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("高血压", ["高血", "血压", "高", "血", "压"]),
        ("药", ["药"]),
        # A line break in a word, as in PDF files; radicals in place of characters; full-width letters.
        ("⽤\n药ＡＥＤ", ["用药", "用", "药", "aed"]),
        ("HbA1c of 7.0, twice; Allergies and tablets, illness, virus", None),
    ],
)
def test_terms(text, expected):
    english = ["hba1c", "of", "7.0", "twice", "allergy", "and", "tablet", "illness", "virus"]
    assert extract_terms(text) == (expected or english)


def test_the_form_of_a_question_is_no_subject():
    assert question_terms("请问感冒了怎么办？") == ["感冒", "感", "冒"]
    assert question_terms("What is the dose of insulin?") == ["dose", "insulin"]
    assert question_terms("Why?") == ["why"]
    assert language_of("感冒 virus") == "zh" and language_of("What is 感冒 please") == "en"


# --- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "best"),
    [("胰岛素开封以后能放几天？", 1), ("Is ibuprofen bad for my kidney?", 2), ("When are face stitches removed?", 3)],
)
def test_the_right_passage_is_first(question, best):
    found = Collection(ILLNESSES).search(question)
    assert found.order[0] == best and relevant(found)


@pytest.mark.parametrize("question", ["世界上最高的山是哪座？", "Who won the football world cup?", "🙂"])
def test_nothing_is_found_where_nothing_fits(question):
    assert not relevant(Collection(ILLNESSES).search(question))


def test_an_empty_collection_finds_nothing():
    assert not relevant(Collection([]).search("感冒"), confidence=0)


class Fixed:
    """An embedder that gives texts these vectors, in their order."""

    key = "fixed"

    def __init__(self, *vectors):
        self.vectors = np.asarray(vectors, dtype=np.float32)

    def embed(self, texts):
        return self.vectors[: len(texts)]

    def embed_question(self, text):
        return np.asarray([1, 0], dtype=np.float32)


def test_both_rankings_are_fused_by_rank():
    passages = [Passage("a", "fever fever fever"), Passage("a", "fever and cough with it"), Passage("a", "none")]
    embedder = Fixed((0, 1), (0.6, 0.8), (1, 0))
    collection = Collection([], embedder).with_more(passages)
    found = collection.search("fever")
    # BM25: 0, 1. Cosines: 2, 1, 0. Sums of 1 / (60 + rank): 0 has 1/61 + 1/63, 1 has 2/62, 2 has 1/61.
    assert Collection(passages).search("fever").order == [0, 1]
    assert found.order == [0, 1, 2] and found.similarity == pytest.approx(1.0)
    assert 1 / 61 + 1 / 63 > 2 / 62 > 1 / 61


def test_early_ranks_weigh_more_than_late_ones():
    """A rank further down adds less, and passages of one ranking come after those of both."""
    # Texts of one length, in which the question's word becomes rarer until it is gone.
    passages = [Passage("a", " ".join(["fever"] * times + ["rest"] * (6 - times))) for times in (5, 4, 3, 2, 0, 0)]
    cosines = (0.7, 0.8, 0.1, 0.3, 0.5, 0.9)
    collection = Collection([], Fixed(*((x, (1 - x * x) ** 0.5) for x in cosines))).with_more(passages)
    assert Collection(passages).search("fever").order == [0, 1, 2, 3]
    ranks = {0: (1, 3), 1: (2, 2), 2: (3, 6), 3: (4, 5), 5: (1,), 4: (4,)}
    sums = [sum(1 / (60 + rank) for rank in ranks[index]) for index in ranks]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == len(passages)
    assert collection.search("fever").order == list(ranks)


def test_similarity_can_stand_in_for_words():
    collection = Collection([], Fixed((1, 0))).with_more([Passage("a", "fever")])
    found = collection.search("热度")
    assert found.order == [0] and not relevant(found)
    assert relevant(found, min_similarity=0.9)


def test_a_short_question_is_searched_with_the_last():
    history = [{"role": "user", "content": "布洛芬怎么吃？"}, {"role": "assistant", "content": "饭后。"}]
    assert grounding.search_query("那儿童呢？", history) == "布洛芬怎么吃？\n那儿童呢？"
    assert grounding.search_query("那儿童呢？", []) == "那儿童呢？"
    assert is_standalone("眼药水开封后可以用多久？") and not is_standalone("And for children?")


# --- files and the store on disk -------------------------------------------------------------------------------------


def test_places_of_files(tmp_path, log):
    folder = tmp_path
    for name in ("感冒.md", "insulin.txt"):
        (folder / name).write_text("x")
    (folder / "scan.jpg").write_text("x")
    (folder / ".hidden.md").write_text("x")
    (folder / "a,b.md").write_text("x")
    assert [path.name for path in find_documents([str(folder), str(folder / "a,b.md")])] == [
        "a,b.md",
        "insulin.txt",
        "感冒.md",
    ]
    assert any("1 .jpg" in line for line in log)
    assert len(find_documents([f"{folder / '感冒.md'},{folder / 'insulin.txt'}"])) == 2
    with pytest.raises(UserError, match="no such file"):
        find_documents(["gone.pdf"])


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of files as they are read; what is in them is their text, with a notice."""
    names: list[str] = []

    def read(path, encoding=None):
        names.append(path.name)
        text = path.read_text(encoding="utf-8")
        if text == "broken":
            raise DocumentError(f"{path}: it is damaged")
        return Document((Unit(text, ("头",), 3),), ("a picture is not read",))

    monkeypatch.setattr(retrieval, "read_document", read)
    return names


def test_a_file_is_read_once_and_comes_back_as_it_was(tmp_path, reads):
    file = tmp_path / "a.md"
    file.write_text("胰岛素可放 28 天。", encoding="utf-8")
    passage = Passage(str(file), "胰岛素可放 28 天。", ("头",), 3)
    first = DocumentStore(tmp_path / "index", 100, 10).read(file)
    assert (list(first[0]), list(first[1]), first[2]) == ([passage], ["a picture is not read"], False)
    # Another program, later.
    again = DocumentStore(tmp_path / "index", 100, 10).read(file)
    assert (list(again[0]), list(again[1]), again[2]) == ([passage], ["a picture is not read"], True)
    assert reads == ["a.md"]


@pytest.mark.parametrize("change", ["content", "chunk_size", "chunk_overlap", "encoding", "code", "library"])
def test_whatever_passages_depend_on_makes_them_new(tmp_path, reads, monkeypatch, change):
    file, settings = tmp_path / "a.md", [100, 10]
    file.write_text("one", encoding="utf-8")
    DocumentStore(tmp_path / "index", *settings).read(file)
    if change == "content":
        file.write_text("two", encoding="utf-8")
    elif change == "code":
        monkeypatch.setattr(retrieval, "code_version", lambda *names: "other")
    elif change == "library":
        monkeypatch.setattr(retrieval, "version", lambda name: "0.0")
    elif change == "encoding":
        settings.append("gb18030")
    else:
        settings[change == "chunk_overlap"] += 1
    (passage,), _, kept = DocumentStore(tmp_path / "index", *settings).read(file)
    assert not kept and reads == ["a.md", "a.md"]
    assert passage.text == ("two" if change == "content" else "one")


def test_files_that_cannot_be_read_are_not_kept(tmp_path, reads):
    file = tmp_path / "a.md"
    file.write_text("broken")
    store = DocumentStore(tmp_path / "index", 100, 10)
    with pytest.raises(UserError, match="a.md: it is damaged"):
        store.read(file)
    with pytest.raises(UserError, match="gone.md: No such file or directory. Check the file."):
        store.read(tmp_path / "gone.md")
    assert list((tmp_path / "index").iterdir()) == []


def test_vectors_belong_to_their_texts_and_their_model(tmp_path):
    file, embedder = tmp_path / "a.md", Fixed((1, 0), (0, 1))
    store = DocumentStore(tmp_path / "index", 100, 10)
    passages = [Passage(str(file), "one"), Passage(str(file), "two")]
    assert store.vectors(file, passages, embedder).tolist() == [[1, 0], [0, 1]]
    # Kept ones are not made again.
    assert store.vectors(file, passages, Fixed((5, 5), (6, 6))).tolist() == [[1, 0], [0, 1]]
    other = Fixed((7, 7), (8, 8))
    other.key = "other"
    assert store.vectors(file, passages, other).tolist() == [[7, 7], [8, 8]]
    changed = [passages[0], Passage(str(file), "three")]
    assert store.vectors(file, changed, Fixed((1, 1), (2, 2))).tolist() == [[1, 1], [2, 2]]
