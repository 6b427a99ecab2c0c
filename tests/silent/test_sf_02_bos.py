"""Each text begins with the BOS that its tokenizer puts before plain text: once, or never where it puts none."""

from unittest.mock import patch

from medicalgpt.data.encoding import encode_chat, encode_document
from medicalgpt.models.loading import load_tokenizer
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from medicalgpt.training.samples import GreedyAnswers
from template import TEMPLATES, apply_template
from tests.helpers import chat, open_stage, save_model, write_jsonl
from tests.silent.chats import PAIRS, conversation
from tests.templates import CASES, CORE, SUPPORTED, TOKENIZERS, repeats_bos

import pytest

# Whether the tokenizer puts a BOS before plain text.
ADDS = {
    "byte_without_bos": False,
    "byte_adds_bos": True,
    "byte_has_bos_adds_none": False,
    "byte_bos_opens_turns": False,
    "byte_bos_opens_turns_and_is_added": True,
    "metaspace": True,
}
WITH_KINDS = [(name, kind) for name in TEMPLATES for kind in (ADDS if name in CORE else ["byte_adds_bos"])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf02")
    return {kind: save_model(root / kind, TOKENIZERS[kind]()) for kind in ADDS}


def assert_start(tokenizer, ids, kind, template=None):
    """One BOS at the start or none, as is right; and nowhere else, unless it is what opens each turn or round."""
    bos = tokenizer.bos_token_id
    opens_turns = kind.startswith("byte_bos_opens_turns")
    expected = ADDS[kind] or (opens_turns and bool(template) and "<|im_start|>" in TEMPLATES[template].tokens)
    shown = tokenizer.convert_ids_to_tokens(ids[:5])
    assert (ids[0] == bos if bos is not None else False) == expected, shown
    assert bos is None or ids[1] != bos, shown
    if bos is not None and not opens_turns and not (template and repeats_bos(template)):
        assert bos not in ids[1:]


@pytest.mark.parametrize("kind", ADDS)
@pytest.mark.parametrize(("name", "case"), SUPPORTED)
def test_chat_in_training_and_in_serving(folders, kind, name, case):
    engine = ChatEngine.from_pretrained(folders[kind])
    apply_template(engine.tokenizer, name)
    messages, tools = CASES[case][:2]
    for sample in encode_chat(engine.tokenizer, chat(messages, tools)):
        assert_start(engine.tokenizer, sample.input_ids, kind, name)
    for turn in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        assert_start(engine.tokenizer, engine.prompt_ids(messages[:turn], tools), kind, name)


@pytest.mark.parametrize("kind", ["byte_has_bos_adds_none", "metaspace"])
@pytest.mark.parametrize(("name", "shape"), [pair for pair in PAIRS if pair[0] not in CORE])
def test_chat_of_the_other_families(folders, kind, name, shape):
    tokenizer = load_tokenizer(folders[kind])
    apply_template(tokenizer, name)
    messages, tools = conversation(shape)
    for sample in encode_chat(tokenizer, chat(messages, tools)):
        assert_start(tokenizer, sample.input_ids, kind, name)


@pytest.mark.parametrize(("name", "kind"), WITH_KINDS)
def test_what_generation_is_given(folders, kind, name):
    engine = ChatEngine.from_pretrained(folders[kind])
    apply_template(engine.tokenizer, name)
    with patch.object(engine.model, "generate", wraps=engine.model.generate) as generate:
        engine.chat([{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=1))
    assert_start(engine.tokenizer, generate.call_args.kwargs["input_ids"][0].tolist(), kind, name)


@pytest.mark.parametrize("kind", ADDS)
def test_document_has_it_once_at_its_beginning(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    pieces = encode_document(tokenizer, {"text": "I have a headache. " * 9}, block_size=10)
    assert len(pieces) > 2
    ids = [token for piece in pieces for token in piece.input_ids]
    assert_start(tokenizer, ids, kind)
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == ADDS[kind]


STAGES = {
    "pretraining.py": ([{"text": "Drink water. " * n} for n in (1, 3, 5)], []),
    "supervised_finetuning.py": (
        [{"prompt": "I have a headache.", "response": "Drink water. " * n} for n in (1, 3, 5)],
        ["--template_name", "vicuna"],
    ),
}


@pytest.mark.parametrize("kind", ["byte_adds_bos", "byte_has_bos_adds_none", "metaspace"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_what_the_program_trains_on(folders, tmp_path, kind, packing, stage):
    rows, more = STAGES[stage]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage(
        stage,
        *("--model_name_or_path", folders[kind], "--train_file_dir", tmp_path / "data", "--packing", packing),
        *("--output_dir", tmp_path / "out", *more),
    )
    sequences = 0
    for batch in opened.trainer.get_train_dataloader():
        for row, ids in enumerate(batch["input_ids"]):
            if packing:
                starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
                parts = [part.tolist() for part in ids.tensor_split(starts[1:])]
            else:
                parts = [ids[batch["attention_mask"][row] == 1].tolist()]
            for part in parts:
                assert_start(opened.tokenizer, part, kind, "vicuna")
                sequences += 1
    assert sequences == len(rows)


@pytest.mark.parametrize("kind", ["byte_adds_bos", "byte_has_bos_adds_none", "metaspace"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_the_samples_during_training_begin_with(folders, tmp_path, kind, stage):
    rows, more = STAGES[stage]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage(
        stage,
        *("--model_name_or_path", folders[kind], "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", *more),
    )
    prompts = list(opened.options["sample_prompts"])
    sampler = GreedyAnswers(opened.trainer, opened.tokenizer, list(opened.options["stop_ids"]), prompts)
    model = opened.trainer.accelerator.unwrap_model(opened.trainer.model)
    with patch.object(model, "generate", wraps=model.generate) as generate:
        sampler.answers(max_new_tokens=1)
    assert len(generate.call_args_list) == len(prompts) > 0
    for call in generate.call_args_list:
        assert_start(opened.tokenizer, call.kwargs["input_ids"][0].tolist(), kind, "vicuna")
