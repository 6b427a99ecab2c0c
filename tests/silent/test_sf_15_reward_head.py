"""SF 15: the head of a reward model is lost, or the score is read at another token than the end of the answer."""

import json
import shutil

from medicalgpt.errors import UserError
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.rewards.scoring import RewardScorer, choose_padding
from template import apply_template
from tests.families import FAMILIES, family_tokenizer
from tests.helpers import open_stage, read_json, run_here, save_model, write_jsonl
from tests.tiny import TURN_END, tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STAGE = "reward_modeling.py"
PAIRS = [{"prompt": f"Why {n}?", "chosen": "Rest. " * n, "rejected": "A cold, " * (4 - n)} for n in (1, 2, 3)]
CHATS = [
    [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[name]}]
    for pair in PAIRS
    for name in ("chosen", "rejected")
]


def pads_with_its_turn_end():
    """As tokenizers of Llama 2, Mistral and many chat models: padding = end of text = end of a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = TURN_END
    return tokenizer


@pytest.fixture(scope="module", params=["padding of its own", "padding is the turn end"])
def work(request, tmp_path_factory):
    """An adapter and a whole reward model, on a base whose configuration names no padding, or the turn end for it."""
    root = tmp_path_factory.mktemp("sf15")
    same = request.param == "padding is the turn end"
    tokenizer = pads_with_its_turn_end() if same else tiny_tokenizer()
    base = save_model(root / "base", tokenizer)
    config = read_json(root / "base" / "config.json") | {"pad_token_id": tokenizer.pad_token_id if same else None}
    (root / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_jsonl(root / "data" / "rows.jsonl", PAIRS)
    scores = {}
    for name, more in (("adapter", ()), ("whole", ("--use_peft", "False"))):
        opened = open_stage(
            STAGE,
            *("--model_name_or_path", base, "--train_file_dir", root / "data", "--output_dir", root / name, *more),
            *("--max_steps", 2, "--learning_rate", 1e-2, "--save_strategy", "no", "--sample_prompts", 0),
        )
        opened.finish()
        scores[name] = RewardScorer(opened.trainer.model, opened.tokenizer).score(CHATS)
    run_here("merge_peft_adapter.py", "--lora_model", root / "adapter", "--output_dir", root / "merged")
    scores["merged"] = scores["adapter"]
    return root, scores


def plain(folder, ids, mask=None):
    """Scores of a checkpoint as any program with transformers alone gets them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0]


@pytest.mark.parametrize("name", ["adapter", "merged", "whole"])
def test_reloaded_it_gives_the_scores_that_it_gave_when_trained(work, name):
    root, scores = work
    found = RewardScorer.from_pretrained(str(root / name)).score(CHATS)
    assert found == pytest.approx(scores[name], abs=1e-5)
    assert len({round(score, 4) for score in found}) == len(CHATS)


@pytest.mark.parametrize("name", ["merged", "whole"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_transformers_reads_the_same_score_whatever_the_padding(work, name, side):
    root, scores = work
    scorer = RewardScorer.from_pretrained(str(root / name))
    sequences = [scorer.encode(chat) for chat in CHATS]
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    for extra in (0, 1, 9):
        width = max(map(len, sequences)) + extra
        batch = tokenizer.pad({"input_ids": sequences}, padding="max_length", max_length=width, padding_side=side)
        ids, mask = (torch.tensor(batch[column]) for column in ("input_ids", "attention_mask"))
        assert (mask == 0).sum() >= extra * len(CHATS)
        torch.testing.assert_close(plain(root / name, ids, mask), torch.tensor(scores[name]), atol=1e-5, rtol=0)


def test_the_score_is_read_at_the_turn_end(work):
    """The head's number for the last token, computed by hand from the hidden states."""
    root, scores = work
    scorer = RewardScorer.from_pretrained(str(root / "merged"))
    for chat, score in zip(CHATS, scores["merged"], strict=True):
        ids = scorer.encode(chat)
        assert scorer.tokenizer.convert_ids_to_tokens(ids[-1]) == TURN_END
        with torch.no_grad():
            hidden = scorer.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert scorer.model.score(hidden).item() == pytest.approx(score, abs=1e-5)


def test_batch_mates_change_nothing(work):
    root, scores = work
    scorer = RewardScorer.from_pretrained(str(root / "adapter"))
    for size in (1, 2, 5):
        assert scorer.score(CHATS, batch_size=size) == pytest.approx(scores["adapter"], abs=1e-5)
    assert scorer.score(CHATS[::-1]) == pytest.approx(scores["adapter"][::-1], abs=1e-5)


def test_the_head_of_the_adapter_was_trained_and_is_not_the_one_it_began_with(work):
    root, _ = work
    head = load_file(root / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    began = open_stage(
        STAGE,
        *("--model_name_or_path", root / "base", "--train_file_dir", root / "data", "--output_dir", root / "again"),
    )
    start = began.trainer.model.get_base_model().score.modules_to_save["default"].weight
    assert head.dtype == torch.float32 and not torch.allclose(head, start, atol=1e-3)


def test_an_adapter_or_a_model_without_its_head_is_refused(work, tmp_path):
    root, _ = work
    for name, file in (("adapter", "adapter_model.safetensors"), ("whole", "model.safetensors")):
        shutil.copytree(root / name, tmp_path / name)
        weights = load_file(tmp_path / name / file)
        kept = {key: weight for key, weight in weights.items() if "score" not in key}
        assert len(kept) == len(weights) - 1
        save_file(kept, tmp_path / name / file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="would be random"):
            RewardScorer.from_pretrained(str(tmp_path / name))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_pads_with_what_ends_its_answers(name):
    """Where the padding token is the end of a turn, another one is found, or the run stops."""
    tokenizer = family_tokenizer(FAMILIES[name])
    stop = stop_token_ids(tokenizer, apply_template(tokenizer))
    assert choose_padding(tokenizer, stop) == tokenizer.pad_token
    own, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    assert choose_padding(tokenizer, stop) == own
    ids = tokenizer.apply_chat_template(CHATS[0], return_dict=False)
    assert tokenizer.convert_tokens_to_ids(choose_padding(tokenizer, stop)) not in ids
    everything = range(len(tokenizer))
    with pytest.raises(UserError, match="scores would be read before the end of an answer.*tokenizer_name_or_path"):
        choose_padding(tokenizer, everything)
