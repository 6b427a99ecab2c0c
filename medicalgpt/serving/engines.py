"""The engine that the flags of a front end name: a model, an adapter, several combined, or several to choose from."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medicalgpt.args import ChatArguments
from medicalgpt.errors import UserError
from medicalgpt.models import combining, loading
from medicalgpt.models.adapters import embedding_rows
from medicalgpt.models.combining import Combination
from medicalgpt.models.hub import Adapter, Checkpoint
from medicalgpt.models.vision import Vision, check_same_bounds
from medicalgpt.serving.chat import ChatEngine, load_base
from medicalgpt.serving.generation import AnswerState

from loguru import logger
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase


class NamedEngine(ChatEngine):
    """One of several engines on one model, each of which answers with its own adapter, template and stop tokens.

    Args:
        name: of the adapter, or of the base.
        label: of the adapter in peft; None: the base alone. Also an attribute.
        lock: the same for all engines on the model: only one adapter is active at a time.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        *,
        name: str,
        label: str | None,
        lock: threading.Lock,
        vision: Vision | None = None,
    ):
        super().__init__(model, tokenizer, generation_config, vision)
        self.name = name
        self.label = label
        self._lock = lock

    def extend(self, states: Sequence[AnswerState], pause: Callable[[], bool] = lambda: False) -> None:
        with self._lock, self._active():
            super().extend(states, pause)

    @contextmanager
    def _active(self) -> Iterator[None]:
        for model in (self.model, self.model.get_base_model()):
            model.generation_config = self.generation_config
        with self.adapter_on(self.model):
            yield

    @contextmanager
    def adapter_on(self, model: PeftModel) -> Iterator[None]:
        if self.label is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(self.label, inference_mode=True)
            yield


def engine_from(arguments: ChatArguments, *, by_name: bool = False, with_images: bool = False) -> ChatEngine:
    """Load the model that the flags name.

    Args:
        by_name: the front end can choose among adapters. If there are several, or one as NAME=PATH, the engine of the
            first is returned, with all of them, and that of the base, as its `siblings`.
        with_images: load the encoder of images too.

    Raises:
        UserError: see `ChatEngine.from_pretrained`; several adapters that do not fit together, or no way is given to
            use them.
    """
    named = combining.named_adapters(arguments.lora_model)
    combination = Combination.from_arguments(arguments, list(named))
    if len(named) > 1 and combination is None and not by_name:
        raise UserError(
            f"--lora_model names {len(named)} adapters, and one answers here. Combine them: --lora_weights "
            f"{','.join([f'{1 / len(named):.2g}'] * len(named))}, or name one; inference.py --interactive and "
            "openai_api.py switch between adapters."
        )
    placed = {
        "dtype": arguments.dtype,
        "load_in_4bit": arguments.load_in_4bit,
        "load_in_8bit": arguments.load_in_8bit,
        "device_map": arguments.device_map,
        "with_images": with_images,
    }
    found = {"hub": arguments.hub, "revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    tokenizer = arguments.tokenizer_name_or_path
    # One adapter is served under a name that it is given, too.
    named_one = by_name and any(name != base_name(path) for name, path in named.items())
    if len(named) < 2 and combination is None and not named_one:
        return ChatEngine.from_pretrained(
            arguments.model_name_or_path,
            lora_model=next(iter(named.values()), None),
            tokenizer_name_or_path=tokenizer,
            **placed,
            **found,
        )
    adapters = combining.read_adapters(named, hub=arguments.hub, cache_dir=arguments.cache_dir)
    checkpoint = Checkpoint.resolve(
        arguments.model_name_or_path,
        adapter=next(iter(named.values())),
        adapter_flag="--lora_model",
        tokenizer=tokenizer,
        **found,
    )
    combining.check_bases(adapters, checkpoint, base_given=True)
    if combination:
        combining.check_combinable(adapters, combination)
        if not tokenizer:
            combining.check_same_template(checkpoint, adapters)
        check_same_bounds([each.path for each in adapters.values()])
        model = load_base(checkpoint, **placed)
        # The stop tokens belong to the template, which a tokenizer brings along.
        for place in (checkpoint.adapter.path, *([checkpoint.tokenizer] if tokenizer else [])):
            model.generation_config = combining.generation_config_in(place) or model.generation_config
        combined, own = combining.combine(model, adapters, combination), loading.checkpoint_tokenizer(checkpoint)
        return ChatEngine(combined, own, vision=Vision.of(checkpoint, own) if with_images else None)
    names = [base_name(arguments.model_name_or_path), *adapters]
    if names[0] in adapters:
        raise UserError(
            f"the base and an adapter are both called {names[0]}. Give the adapter another name: --lora_model "
            f"NAME={adapters[names[0]].path}"
        )
    return _switchable(checkpoint, adapters, names[0], own_tokenizer=not tokenizer, **placed)


def adapted(engine: ChatEngine) -> list[ChatEngine]:
    """The engines of the adapters, without that of their base; the engine itself if there is only one."""
    return [each for each in engine.siblings.values() if each.label is not None] or [engine]


def base_name(model_name_or_path: str) -> str:
    """The last part of a model's path, or of its name on the hub."""
    path = Path(model_name_or_path)
    return path.resolve().name if path.is_dir() else path.name


def _switchable(
    checkpoint: Checkpoint, adapters: dict[str, Adapter], base: str, *, own_tokenizer: bool, **placed: object
) -> ChatEngine:
    """The engine of the first adapter, with one for each other and for the base."""
    model = load_base(checkpoint, **placed)
    of_base = model.generation_config
    rows = model.get_input_embeddings().num_embeddings
    grows = any(embedding_rows(adapter, rows) != rows for adapter in adapters.values())
    attached = combining.attach_adapters(model, adapters)
    lock = threading.Lock()

    def engine(name: str, adapter: Adapter | None, label: str | None) -> NamedEngine:
        has_tokenizer = adapter is not None and adapter.has_tokenizer
        place = adapter.path if has_tokenizer else checkpoint.source
        tokenizer = dataclasses.replace(checkpoint, tokenizer=place) if own_tokenizer else checkpoint
        settings = combining.generation_config_in(adapter.path) if adapter else None
        own = loading.checkpoint_tokenizer(tokenizer)
        vision = Vision.of(dataclasses.replace(checkpoint, adapter=adapter), own) if placed["with_images"] else None
        return NamedEngine(attached, own, settings or of_base, name=name, label=label, lock=lock, vision=vision)

    labels = combining.peft_names(adapters)
    engines = {name: engine(name, adapter, labels[name]) for name, adapter in adapters.items()}
    if not grows:
        engines[base] = engine(base, None, None)
    else:
        # The rows of the adapters' tokens are random in the base, which could say them.
        logger.info(f"{base} itself is not offered: the adapters have more tokens than it")
    for each in engines.values():
        each.siblings = engines
    logger.info(f"adapters by name: {', '.join(engines)}")
    return next(iter(engines.values()))
