"""Passages of documents: split along headings and sentences, stored on disk, ranked for a question.

BM25 counts words, Chinese characters and pairs of them, and with less weight other words for the same thing. Sentence
embeddings can be added; both rankings are then fused.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medicalgpt.code_version import code_version
from medicalgpt.errors import UserError
from medicalgpt.files import hash_file, write_atomically
from medicalgpt.formats.terms import SENTENCE, count_words, extract_terms, normalize, question_terms
from medicalgpt.models.hub import fingerprint
from medicalgpt.rag.documents import SUFFIXES, Unit, read_document
from medicalgpt.rag.relevance import Relevance

import bm25s
import numpy as np
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.nn import Sigmoid

# Reciprocal rank fusion (https://doi.org/10.1145/1571941.1572114): being high in both rankings beats first in one.
RRF_K = 60
SYNONYM_WEIGHT = 0.5  # chosen on the half of data/rag that is not held out
RERANKED = 20  # passages that a reranker reads for a question


@dataclass(frozen=True)
class Passage:
    """A few neighbouring sentences of one file, under one heading, on one page."""

    file: str
    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, page {self.page}" if self.page else " > ".join([self.file, *self.headings])

    @property
    def searched(self) -> str:
        return "\n".join([*self.headings, self.text])

    @cached_property
    def normalized(self) -> str:
        return normalize(self.text)


def with_short_names(passages: Sequence[Passage]) -> list[Passage]:
    """The passages with each file by its name, and as many folders before it as distinguish it from the others."""
    files = {passage.file: Path(passage.file).parts for passage in passages}
    counts = Counter(parts[start:] for parts in files.values() for start in range(len(parts)))
    names = {
        file: "/".join(next((parts[-n:] for n in range(1, len(parts)) if counts[parts[-n:]] == 1), parts))
        for file, parts in files.items()
    }
    return [replace(passage, file=names[passage.file]) for passage in passages]


def split(file: str, units: Iterable[Unit], size: int, overlap: int) -> list[Passage]:
    """Passages of whole sentences, at most `size` words each, unless one sentence is longer.

    A heading or a page begins a new passage. Within one, the last sentences of a passage, up to `overlap` words,
    are the first of the next.
    """
    passages: list[Passage] = []
    sentences: list[tuple[str, int]] = []
    where: tuple[tuple[str, ...], int | None] = ((), None)
    fresh = False

    def close() -> None:
        nonlocal fresh
        if fresh:
            passages.append(Passage(file, "".join(text for text, _ in sentences).strip(), *where))
        fresh = False

    for unit in units:
        if (unit.headings, unit.page) != where:
            close()
            sentences.clear()
            where = (unit.headings, unit.page)
        for match in SENTENCE.finditer(unit.text + "\n"):
            sentence = (match[0], count_words(match[0]))
            if fresh and sum(count for _, count in sentences) + sentence[1] > size:
                close()
                while sentences and sum(count for _, count in sentences) > min(overlap, size - sentence[1]):
                    del sentences[0]
            sentences.append(sentence)
            fresh = True
    close()
    return passages


def _load(kind: type, flag: str, name: str, cache_dir: str | None, otherwise: str) -> Any:
    """A model of sentence-transformers. Raises UserError, which says what to do `otherwise`, if it cannot be loaded."""
    try:
        return kind(name, cache_folder=cache_dir, model_kwargs={"use_safetensors": True}, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag} {name} cannot be loaded: {str(error).splitlines()[0][:200]}\n"
            "Name a folder or a hub model with safetensors weights. Without access to the hub, download it "
            f"elsewhere with `hf download {name}` and give the folder, or {otherwise}."
        ) from error


class Embedder:
    """Embeddings of norm 1, from sentence-transformers.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, name: str, cache_dir: str | None = None):
        from sentence_transformers import SentenceTransformer

        self.model = _load(
            SentenceTransformer, "--sim_model_name", name, cache_dir, "omit the flag: BM25 needs no model"
        )
        self.key = json.dumps([name, fingerprint(name), version("sentence-transformers")])

    def embed(self, texts: list[str]) -> np.ndarray:
        """Of passages: (texts, dimensions), float32."""
        return self._float(self.model.encode_document(texts, normalize_embeddings=True, show_progress_bar=False))

    def embed_question(self, text: str) -> np.ndarray:
        """(dimensions,), float32."""
        return self._float(self.model.encode_query(text, normalize_embeddings=True, show_progress_bar=False))

    @staticmethod
    def _float(vectors: np.ndarray) -> np.ndarray:
        return np.asarray(vectors, dtype=np.float32)


class Reranker:
    """A cross-encoder of sentence-transformers that reads a question together with a passage.

    Raises:
        UserError: the model cannot be loaded, or does not give one score.
    """

    def __init__(self, name: str, cache_dir: str | None = None):
        from sentence_transformers import CrossEncoder

        self.model = _load(CrossEncoder, "--rerank_model_name", name, cache_dir, "omit the flag")
        if self.model.num_labels != 1:
            raise UserError(
                f"--rerank_model_name {name} gives {self.model.num_labels} scores, a reranker gives one. Name another."
            )

    def score(self, question: str, texts: Sequence[str]) -> list[float]:
        """One score per text from 0 to 1, the higher the better: the sigmoid of what the model gives."""
        pairs = [(question, text) for text in texts]
        # Some models have no activation of their own, so that their scores are logits.
        return self.model.predict(pairs, show_progress_bar=False, activation_fn=Sigmoid()).tolist()


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        order: indexes of passages, best first.
        confidence: how likely the passages answer the question, from 0 to 1, by words alone; see `Relevance`.
        similarity: the largest cosine between question and passage; None without embeddings.
        relevance: the reranker's score of the best passage; None without a reranker.
    """

    order: list[int]
    confidence: float
    similarity: float | None
    relevance: float | None = None


class Collection:
    """Passages that can be searched.

    The vector index is a matrix, multiplied by the question's vector: exact, with nothing to train or tune.
    A hundred thousand passages of 768 numbers are 300 MB and take 10 ms; approximate indexes pay beyond that.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        embedder: Embedder | None = None,
        vectors: np.ndarray | None = None,
        reranker: Reranker | None = None,
    ):
        self.passages = passages
        self.reranker = reranker
        self.embedder = embedder
        self.vectors = vectors
        words = [extract_terms(passage.searched) for passage in passages]
        frequency = Counter(term for found in words for term in set(found))
        self.relevance = Relevance([passage.searched for passage in passages], frequency)
        self.bm25 = bm25s.BM25()
        if passages:
            self.bm25.index(words, show_progress=False)

    def with_more(self, passages: Sequence[Passage]) -> "Collection":
        """A collection with further passages."""
        vectors = self.vectors
        if self.embedder and passages:
            fresh = self.embedder.embed([passage.searched for passage in passages])
            vectors = fresh if vectors is None else np.concatenate([vectors, fresh])
        return Collection([*self.passages, *passages], self.embedder, vectors, self.reranker)

    def with_short_names(self) -> "Collection":
        """The same with the names of its files in place of their paths, see `with_short_names`."""
        return Collection(with_short_names(self.passages), self.embedder, self.vectors, self.reranker)

    def search(self, question: str) -> SearchResult:
        """Rank the passages: by `rank`, and the best `RERANKED` of them again with the reranker, if there is one."""
        found = self.rank(question)
        if self.reranker is None or not found.order:
            return found
        best = found.order[:RERANKED]
        scores = self.reranker.score(question, [self.passages[index].searched for index in best])
        order = [index for _, index in sorted(zip(scores, best, strict=True), key=lambda pair: -pair[0])]
        return replace(found, order=order + found.order[RERANKED:], relevance=max(scores))

    def rank(self, question: str) -> SearchResult:
        """Rank the passages that share terms with the question, by BM25 and, with embeddings, by both."""
        if not self.passages:
            return SearchResult([], 0.0, None)
        order = self.rank_by_terms(question)
        confidence = self.relevance.confidence(question, order)
        if self.embedder is None:
            return SearchResult(order, confidence, None)
        cosines = self.vectors @ self.embedder.embed_question(question)
        fused = Counter()
        for ranking in (order, np.argsort(-cosines, kind="stable").tolist()):
            fused.update({index: 1 / (RRF_K + rank) for rank, index in enumerate(ranking, start=1)})
        return SearchResult([index for index, _ in fused.most_common()], confidence, float(cosines.max()))

    def rank_by_terms(self, question: str) -> list[int]:
        """Indexes of the passages that have terms of the question or synonyms of them, best first, by BM25."""
        scores = np.zeros(len(self.passages))
        asked = question_terms(question)
        synonyms = [term for term in self.relevance.synonyms(question) if term not in asked]
        for terms, weight in ((asked, 1.0), (synonyms, SYNONYM_WEIGHT)):
            # A question of punctuation alone has no terms.
            if terms:
                scores += weight * self.bm25.get_scores(terms)
        return [index for index in np.argsort(-scores, kind="stable").tolist() if scores[index] > 0]


def find_documents(places: Sequence[str]) -> list[Path]:
    """All documents at these places, each once; other files in the folders are counted in the log.

    Raises:
        UserError: a place does not exist, or has no documents.
    """
    # MedicalGPT separates files by commas, and a name may contain one.
    parts = [part for place in places for part in ([place] if Path(place).exists() else place.split(","))]
    files: dict[Path, Path] = {}
    problems = []
    for place in map(Path, filter(None, map(str.strip, parts))):
        if not place.is_dir():
            files[place.resolve()] = place
            if not place.is_file():
                problems.append(f"{place}: no such file or folder (looked in {Path.cwd()})")
            continue
        inside = [path for path in sorted(place.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        fitting = [path for path in inside if path.suffix.lower() in SUFFIXES]
        others = Counter(path.suffix.lower() or "no suffix" for path in inside if path not in set(fitting))
        if others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
            logger.warning(f"{place}: skipped, as only {', '.join(SUFFIXES)} files are read: {kinds}")
        if not fitting:
            problems.append(f"{place}: no {', '.join(SUFFIXES)} files in it")
        files.update((path.resolve(), path) for path in fitting)
    if problems:
        raise UserError("--files:\n  " + "\n  ".join(problems))
    return list(files.values())


class DocumentStore:
    """Passages of files, stored on disk with an entry for each path, so that only new and changed files are read.

    An entry is used only if its key matches: content of the file, settings, code and versions. Entries of deleted files
    are removed. There is no index of terms on disk: BM25 indexes 5,000 pages in two seconds.
    """

    def __init__(self, folder: str | Path, chunk_size: int, chunk_overlap: int, encoding: str | None = None):
        self.folder = Path(folder)
        self.chunk_size, self.chunk_overlap, self.encoding = chunk_size, chunk_overlap, encoding
        libraries = {name: version(name) for name in ("pypdf", "python-docx", "beautifulsoup4")}
        self.settings = {"size": chunk_size, "overlap": chunk_overlap, "code": code_version(__name__), **libraries}
        if encoding:
            self.settings["encoding"] = encoding
        try:
            # Extracts of medical documents are private.
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"--index_dir {folder} cannot be used ({error.strerror}). Name another folder.") from error

    def read(self, path: Path) -> tuple[list[Passage], Sequence[str], bool]:
        """The passages of a file, the notices about it, and whether they were on disk.

        Raises:
            UserError: the file cannot be read, or the entry cannot be written.
        """
        try:
            if kept := self.passages(path):
                return *kept, True
            # The key first: if the file changes while it is read, the entry does not match next time.
            key = self.key(path)
            document = read_document(path, encoding=self.encoding)
            passages = split(str(path), document.units, self.chunk_size, self.chunk_overlap)
            self.keep(path, key, passages, document.notices)
            return passages, document.notices, False
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}. Check the file.") from error

    def key(self, path: Path) -> str:
        return json.dumps({"sha256": hash_file(path), **self.settings}, sort_keys=True)

    def entry(self, path: Path, suffix: str) -> Path:
        return self.folder / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32] + suffix)

    def passages(self, path: Path) -> tuple[list[Passage], list[str]] | None:
        """The stored passages of this file as it is now, with its notices; None if there are none."""
        entry = self.entry(path, ".json")
        if not entry.exists():
            return None
        try:
            header, _, body = entry.read_text(encoding="utf-8").partition("\n")
            header = json.loads(header)
            if header["digest"] != hashlib.sha256(body.encode()).hexdigest():
                raise ValueError("its digest does not match")
            if header["key"] != self.key(path):
                return None
            kept = json.loads(body)
            return [Passage(str(path), *row[:1], tuple(row[1]), row[2]) for row in kept["passages"]], kept["notices"]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(f"the index entry {entry} is damaged ({error}); {path} is read again")
            return None

    def keep(self, path: Path, key: str, passages: list[Passage], notices: Sequence[str]) -> None:
        rows = [(passage.text, passage.headings, passage.page) for passage in passages]
        body = json.dumps({"passages": rows, "notices": notices}, ensure_ascii=False)
        digest = hashlib.sha256(body.encode()).hexdigest()
        header = json.dumps({"path": str(path.resolve()), "key": key, "digest": digest})
        self._write(self.entry(path, ".json"), f"{header}\n{body}".encode())

    def vectors(self, path: Path, passages: list[Passage], embedder: "Embedder") -> np.ndarray:
        """Embeddings of a file's passages (passages, dimensions), from disk if they match, else computed and stored."""
        entry = self.entry(path, ".safetensors")
        texts = hashlib.sha256("\0".join(passage.searched for passage in passages).encode()).hexdigest()
        try:
            with safe_open(entry, framework="numpy") as file:
                if file.metadata() == {"texts": texts, "model": embedder.key}:
                    return file.get_tensor("vectors")
        except FileNotFoundError:
            pass
        except SafetensorError as error:
            logger.warning(f"the index entry {entry} is damaged ({error}); {path} is embedded again")
        vectors = embedder.embed([passage.searched for passage in passages])
        self._write(entry, save({"vectors": vectors}, metadata={"texts": texts, "model": embedder.key}))
        return vectors

    def remove_missing(self) -> None:
        """Remove the entries of files that no longer exist, unless their whole folder is empty or missing.

        That is how the folder of a disk looks that is not mounted: its files would have to be read and embedded again.
        """
        unseen: dict[Path, int] = {}
        for entry in self.folder.glob("*.json"):
            try:
                with entry.open(encoding="utf-8") as file:
                    path = Path(json.loads(file.readline())["path"])
                # Another file in this folder, which is not of the index.
                if entry != self.entry(path, ".json") or path.exists():
                    continue
                if not path.parent.is_dir() or not any(path.parent.iterdir()):
                    unseen[path.parent] = unseen.get(path.parent, 0) + 1
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                continue
            logger.info(f"{path} is gone; removed from the index")
            entry.unlink(missing_ok=True)
            entry.with_suffix(".safetensors").unlink(missing_ok=True)
        for folder, count in unseen.items():
            logger.info(
                f"{folder} is empty or missing; {count} file(s) of it are kept in the index {self.folder}, in case it "
                "is on a disk that is not mounted"
            )

    def _write(self, target: Path, data: bytes) -> None:
        try:
            write_atomically(target, data, mode=0o600)
        except OSError as error:
            raise UserError(
                f"--index_dir {self.folder}: {error.strerror or error}. Make room, or name another."
            ) from error
