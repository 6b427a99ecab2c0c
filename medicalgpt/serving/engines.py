"""The engine that the flags of a front end name: a model, an adapter, several combined, or several to choose from."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medicalgpt.args import ChatArguments
from medicalgpt.errors import UserError
from medicalgpt.models import combining, loading
from medicalgpt.models.adapters import attach_adapter, embedding_rows
from medicalgpt.models.combining import Combination
from medicalgpt.models.hub import Adapter, Checkpoint
from medicalgpt.models.vision import Vision, check_same_bounds
from medicalgpt.serving.chat import ChatEngine, load_base
from medicalgpt.serving.generation import AnswerState
from medicalgpt.serving.running_batch import RunningBatch

from loguru import logger
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class NamedEngine(ChatEngine):
    """One of several engines on one model, each of which answers with its own adapter, template and stop tokens.

    Args:
        name: of the adapter, or of the base.
        label: of the adapter in peft; None: the base alone. Also an attribute.
        group: all engines on the model. Also an attribute.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        *,
        name: str,
        label: str | None,
        group: "NamedEngines",
        vision: Vision | None = None,
    ):
        super().__init__(model, tokenizer, generation_config, vision)
        self.name = name
        self.label = label
        self.group = group
        self.siblings = group.by_name

    def extend(
        self,
        states: Sequence[AnswerState],
        pause: Callable[[], bool] = lambda: False,
        batch: RunningBatch | None = None,
    ) -> None:
        with self.group.lock, self._active():
            super().extend(states, pause, batch)

    @contextmanager
    def _active(self) -> Iterator[None]:
        for model in (self.model, *([self.model.get_base_model()] if isinstance(self.model, PeftModel) else [])):
            model.generation_config = self.generation_config
        with self.adapter_on(self.model):
            yield

    @contextmanager
    def adapter_on(self, model: PeftModel) -> Iterator[None]:
        if not isinstance(model, PeftModel):
            yield
        elif self.label is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(self.label, inference_mode=True)
            yield


def engine_from(
    arguments: ChatArguments, *, by_name: bool = False, with_images: bool = False, changeable: bool = False
) -> ChatEngine:
    """Load the model that the flags name.

    Args:
        changeable: adapters can be loaded and unloaded later, so that the engine has `siblings` in any case.
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
    if changeable and combination:
        raise UserError(
            "--allow_lora_updates is for adapters that answer under their own names, and --lora_weights combines those "
            "of --lora_model into one. Leave one of both out."
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
    named_one = changeable or by_name and any(name != base_name(path) for name, path in named.items())
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
        adapter=next(iter(named.values()), None),
        adapter_flag="--lora_model",
        tokenizer=tokenizer,
        **found,
    )
    if adapters:
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
    engines = NamedEngines(checkpoint, adapters, names[0], own_tokenizer=not tokenizer, **placed)
    return next(iter(engines.by_name.values()))


def adapted(engine: ChatEngine) -> list[ChatEngine]:
    """The engines of the adapters, without that of their base; the engine itself if there is only one."""
    return [each for each in engine.siblings.values() if each.label is not None] or [engine]


def base_name(model_name_or_path: str) -> str:
    """The last part of a model's path, or of its name on the hub."""
    path = Path(model_name_or_path)
    return path.resolve().name if path.is_dir() else path.name


class NamedEngines:
    """Engines on one base, each with its own adapter, which can be loaded and unloaded while the others answer.

    Attributes:
        by_name: the engines by the names of their adapters, and that of the base by its own; never empty.
        lock: held while a batch is generated, and while adapters change.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapters: dict[str, Adapter], base: str, *, own_tokenizer: bool, **placed: object
    ):
        model = load_base(checkpoint, **placed)
        self.lock = threading.Lock()
        self.by_name: dict[str, NamedEngine] = {}
        self._checkpoint = checkpoint
        self._own_tokenizer = own_tokenizer
        self._with_images = bool(placed["with_images"])
        self._of_base = model.generation_config
        self._base = base
        self._adapters = dict(adapters)
        self._loaded = itertools.count()
        rows = model.get_input_embeddings().num_embeddings
        grows = any(embedding_rows(adapter, rows) != rows for adapter in adapters.values())
        self._model = combining.attach_adapters(model, adapters) if adapters else model
        labels = combining.peft_names(adapters)
        for name, adapter in adapters.items():
            self._add(name, adapter, labels[name])
        if not grows:
            self._add(base, None, None)
        else:
            # The rows of the adapters' tokens are random in the base, which could say them.
            logger.info(f"{base} itself is not offered: the adapters have more tokens than it")
        logger.info(f"adapters by name: {', '.join(self.by_name)}")

    def _add(self, name: str, adapter: Adapter | None, label: str | None) -> NamedEngine:
        has_tokenizer = adapter is not None and adapter.has_tokenizer
        place = adapter.path if has_tokenizer else self._checkpoint.source
        tokenizer = dataclasses.replace(self._checkpoint, tokenizer=place) if self._own_tokenizer else self._checkpoint
        settings = combining.generation_config_in(adapter.path) if adapter else None
        own = loading.checkpoint_tokenizer(tokenizer)
        checkpoint = dataclasses.replace(self._checkpoint, adapter=adapter)
        engine = NamedEngine(
            self._model,
            own,
            settings or self._of_base,
            name=name,
            label=label,
            group=self,
            vision=Vision.of(checkpoint, own) if self._with_images else None,
        )
        self.by_name[name] = engine
        return engine

    def load(self, name: str, path: str) -> NamedEngine:
        """Load a further adapter, which takes until the batch that is being generated is complete.

        Raises:
            UserError: the name is taken, or the adapter is damaged or does not fit.
        """
        if name in self.by_name or name == self._base:
            raise UserError(f"There is a model {name} already. Unload it, or choose another name.")
        (adapter,) = combining.read_adapters({name: path}, cache_dir=self._checkpoint.cache_dir).values()
        with self.lock:
            rows = self._model.get_input_embeddings().num_embeddings
            if embedding_rows(adapter, rows) != rows:
                raise UserError(f"The adapter {path} needs another number of tokens than the model has here, {rows}.")
            if late := [each for each, own in self._adapters.items() if own.config.get("trainable_token_indices")]:
                raise UserError(
                    f"{late[0]} has rows of tokens, so no adapter can be loaded after it. Restart with both."
                )
            together = {**self._adapters, name: adapter}
            combining.check_bases(together, self._checkpoint, base_given=True)
            if isinstance(self._model, PeftModel):
                label = f"loaded_{next(self._loaded)}"
                combining.attach_further(self._model, adapter, label)
            else:
                label = "default"
                self._use(attach_adapter(self._model, adapter))
            self._adapters[name] = adapter
            return self._add(name, adapter, label)

    def unload(self, name: str) -> None:
        """Drop an adapter, once the batch that is being generated is complete; requests to it fail from then on.

        Raises:
            UserError: there is no such adapter.
        """
        if name not in self._adapters:
            raise UserError(f"There is no adapter {name}; there are {', '.join(self._adapters) or 'none'}.")
        if len(self.by_name) == 1:
            raise UserError(f"{name} is the only model here, so it stays. Load another one first.")
        with self.lock:
            label = self.by_name.pop(name).label
            del self._adapters[name]
            if self._adapters:
                self._model.delete_adapter(label)
                # The one that is switched on may be the one that is gone.
                self._model.set_adapter(next(iter(self._model.peft_config)), inference_mode=True)
            else:
                self._use(self._model.unload())

    def _use(self, model: PreTrainedModel | PeftModel) -> None:
        self._model = model
        for each in self.by_name.values():
            each.model = model
