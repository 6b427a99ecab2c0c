"""Fit the weights of relevance.json, by which chatpdf.py refuses questions without a reranker.

    python -m benchmarks.relevance
    python -m benchmarks.relevance --write

The questions are those of data/relevance, each about one document (of a library, a washing machine, a shelter), and the
half of data/rag/questions.jsonl that is not held out. Scores are cross-validated in ten folds; the threshold is the
highest that refuses at most 4% of the answerable questions, so that it is unlikely to be more than 5% of others.
`chatpdf.py --evaluate` measures on the half that is held out.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from medicalgpt.files import write_atomically
from medicalgpt.rag.documents import read_document
from medicalgpt.rag.relevance import BIAS, WEIGHTS
from medicalgpt.rag.retrieval import Collection, split
from medicalgpt.rag.tasks import is_held_out

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "data"
CHUNK_SIZE, CHUNK_OVERLAP = 220, 40
FOLDS = 10
RIDGE = 10.0  # of standardized features
REFUSED_BY_MISTAKE = 0.04
Row = tuple[str, bool, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace {WEIGHTS.name}")
    arguments = parser.parse_args()
    rows = [*rows_of_single_documents(), *rows_of_rag()]
    weights = {language: fit_language(language, rows) for language in ("en", "zh")}
    if arguments.write:
        write_atomically(WEIGHTS, json.dumps(weights, indent=1) + "\n")


def rows_of_single_documents() -> Iterable[Row]:
    folder = DATA / "relevance"
    collections = {path.name: collect([path]) for path in sorted((folder / "documents").iterdir())}
    for row in read_rows(folder / "questions.jsonl"):
        yield row["language"], row["answered"], features(collections[row["about"]], row["question"])


def rows_of_rag() -> Iterable[Row]:
    collection = collect(sorted((DATA / "rag" / "documents").iterdir()))
    for row in read_rows(DATA / "rag" / "questions.jsonl"):
        if not is_held_out(row["question"]):
            yield row["language"], row["file"] is not None, features(collection, row["question"])


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collect(paths: Iterable[Path]) -> Collection:
    return Collection(
        [
            passage
            for path in paths
            for passage in split(str(path), read_document(path).units, CHUNK_SIZE, CHUNK_OVERLAP)
        ]
    )


def features(collection: Collection, question: str) -> dict[str, float]:
    return collection.relevance.features(question, collection.rank_by_terms(question))


def fit_language(language: str, rows: Iterable[Row]) -> dict[str, float]:
    """The weights and the bias, at which a score of 0 is the threshold. Prints what they do, cross-validated."""
    # Where nothing is found, chatpdf.py refuses without a score.
    of_language = [(answered, found) for spoken, answered, found in rows if spoken == language]
    names = list(next(found for _, found in of_language if found))
    answered = np.array([each for each, _ in of_language])
    matrix = np.array([[found.get(name, 0.0) for name in names] for _, found in of_language])
    folds = np.random.default_rng(0).permutation(len(answered)) % FOLDS
    scores = np.empty(len(answered))
    for fold in range(FOLDS):
        bias, weights = fit(matrix[folds != fold], answered[folds != fold])
        scores[folds == fold] = bias + matrix[folds == fold] @ weights
    threshold = np.sort(scores[answered])[int(REFUSED_BY_MISTAKE * answered.sum())]
    refused = scores < threshold
    print(
        f"{language}: {refused[answered].mean():.1%} of {answered.sum()} answerable questions refused by mistake, "
        f"{refused[~answered].mean():.1%} of {(~answered).sum()} others refused"
    )
    bias, weights = fit(matrix, answered)
    rounded = {name: round(float(weight), 3) for name, weight in zip(names, weights, strict=True)}
    return {BIAS: round(float(bias - threshold), 3), **rounded}


def fit(matrix: np.ndarray, answered: np.ndarray) -> tuple[float, np.ndarray]:
    """Logistic regression with an L2 penalty on the weights of standardized features, by Newton's method."""
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0) + 1e-9
    inputs = np.column_stack([np.ones(len(matrix)), (matrix - mean) / scale])
    penalty = np.diag([0.0, *[RIDGE] * matrix.shape[1]])
    weights = np.zeros(inputs.shape[1])
    for _ in range(30):
        likely = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (likely - answered) + penalty @ weights
        hessian = (inputs * (likely * (1 - likely))[:, None]).T @ inputs + penalty
        weights -= np.linalg.solve(hessian, gradient)
    return weights[0] - weights[1:] @ (mean / scale), weights[1:] / scale


if __name__ == "__main__":
    main()
