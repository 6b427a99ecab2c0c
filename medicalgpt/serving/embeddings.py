"""Embeddings of texts for the OpenAI interface, from an encoder of sentence-transformers."""

import base64
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from medicalgpt.errors import UserError

import numpy as np

# Texts that the encoder reads at a time.
BATCH_SIZE = 32


class Encoder:
    """Reads texts one request after the other, in a thread of its own.

    Attributes:
        name: of the model in requests.
        dimensions: of an embedding.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, path: str, name: str, cache_dir: str | None = None):
        # It takes seconds to import.
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(
                path, cache_folder=cache_dir, model_kwargs={"use_safetensors": True}, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--embedding_model {path} cannot be loaded: {str(error).splitlines()[0][:200]}\n"
                "Name a folder or a hub model of sentence-transformers with safetensors weights."
            ) from error
        self.name = name
        self.dimensions: int = self._model.get_sentence_embedding_dimension()
        self._thread = ThreadPoolExecutor(1, "embeddings")

    def submit(self, texts: Sequence[str]) -> "Future[tuple[np.ndarray, int]]":
        """Embeddings of norm 1, (texts, dimensions), float32, and the number of tokens of all texts."""
        return self._thread.submit(self._embed, list(texts))

    def _embed(self, texts: list[str]) -> tuple[np.ndarray, int]:
        vectors = self._model.encode(
            texts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )
        tokens = self._model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return np.asarray(vectors, dtype=np.float32), sum(map(len, tokens))

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that are read."""
        return self._model.max_seq_length

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def embedding_list(model: str, vectors: np.ndarray, tokens: int, as_base64: bool) -> dict[str, Any]:
    """The response of the OpenAI interface."""

    def written(vector: np.ndarray) -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()

    data = [{"object": "embedding", "index": i, "embedding": written(vector)} for i, vector in enumerate(vectors)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
