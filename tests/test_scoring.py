"""Scores of conversations and of the rows of a file."""

import json

from medicalgpt.data.encoding import EncodingError
from medicalgpt.errors import UserError
from medicalgpt.rewards.scoring import RewardScorer, check_output_file, read_score_file, score_in_float32, score_rows
from tests.helpers import read_json, save_model, write_jsonl
from tests.tiny import TURN_END, tiny_tokenizer

import pytest
import torch
from transformers import AutoModelForSequenceClassification

PAIR = {"prompt": "Why?", "chosen": "Rest.", "rejected": "Never mind, go on.", "id": 7}
TURNS = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Rest."}], "lang": "en"}
ANSWERED = {"prompt": "为什么？", "response": "休息。"}


def chat(answer, question="Why?"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model of random weights, context 700."""
    root = tmp_path_factory.mktemp("scoring")
    base = save_model(root / "base", tiny_tokenizer(), context=700)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    model.save_pretrained(root / "rm")
    tiny_tokenizer().save_pretrained(root / "rm")
    return root


@pytest.fixture(scope="module")
def scorer(folder):
    return RewardScorer.from_pretrained(str(folder / "rm"))


def one_by_one(folder, conversations):
    """By hand: one text at a time, up to the turn end, the head's number for its last token."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval(), tiny_tokenizer()
    scores = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        assert text.endswith(TURN_END)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            scores.append(model.score(model.model(ids).last_hidden_state[0, -1]).item())
    return scores


# --- conversations ---------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_last_token_in_the_order_given(folder, scorer):
    conversations = [chat("Rest. " * n) for n in (3, 1, 5, 2)]
    found = scorer.score(conversations, batch_size=3)
    assert found == pytest.approx(one_by_one(folder, conversations), abs=1e-5)
    assert len({round(score, 4) for score in found}) == 4


def test_tools_are_part_of_what_is_scored(scorer):
    tools = [{"type": "function", "function": {"name": "look_up", "description": "x", "parameters": {}}}]
    plain, offered = scorer.score([chat("Rest.")] * 2, tools=[None, tools])
    assert abs(plain - offered) > 1e-4


def test_white_space_at_the_start_of_an_answer_is_scored(scorer):
    """A model in training writes such answers, and each needs a score."""
    assert len(set(scorer.score([chat(" Rest."), chat("\n\nRest."), chat("Rest.")]))) == 3


def test_what_cannot_be_scored_is_said(scorer):
    with pytest.raises(EncodingError, match="longer than the 700 of the reward model") as caught:
        scorer.score([chat("Rest."), chat("a" * 700)])
    assert caught.value.too_long
    with pytest.raises(EncodingError, match="special token"):
        scorer.encode(chat(f"Rest.{TURN_END}"))


def test_a_template_without_marks_is_scored_whole(folder):
    """Checkpoints made elsewhere were trained on all that their template writes."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm")
    ids = RewardScorer(model, tokenizer).encode(chat("Rest."))
    assert tokenizer.decode(ids) == "user: Why?\nassistant: Rest.\n"


def test_a_model_that_names_no_padding_is_given_one_that_ends_nothing(folder, scorer):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm")
    model.config.pad_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = TURN_END
    conversations = [chat("Rest. " * n) for n in (1, 4)]
    assert RewardScorer(model, tokenizer).score(conversations) == pytest.approx(scorer.score(conversations), abs=1e-5)


def test_a_score_that_is_no_number_is_an_error(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm")
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        RewardScorer(model, tiny_tokenizer()).score([chat("Rest.")])


def test_scoring_leaves_the_model_in_its_mode(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm").train()
    RewardScorer(model, tiny_tokenizer()).score([chat("Rest.")])
    assert model.training


def test_the_head_computes_in_float32_in_a_bfloat16_model(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm", dtype=torch.bfloat16).eval()
    ids = torch.tensor([range(20)])
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
        exact = model.model(ids).last_hidden_state[0, -1].float() @ model.score.weight[0].float()
        score_in_float32(model)
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                score = model(ids).logits
            assert score.dtype == torch.float32
            assert score.item() == pytest.approx(exact.item(), abs=1e-5)


def test_what_is_no_reward_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is a language model, without a scoring head"):
        RewardScorer.from_pretrained(str(folder / "base"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    model.save_pretrained(tmp_path / "classes")
    tiny_tokenizer().save_pretrained(tmp_path / "classes")
    with pytest.raises(UserError, match="a head with 3 outputs"):
        RewardScorer.from_pretrained(str(tmp_path / "classes"))


def test_a_tokenizer_without_template_is_refused(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template.*--tokenizer_name_or_path"):
        RewardScorer(AutoModelForSequenceClassification.from_pretrained(folder / "rm"), tokenizer)


# --- files -----------------------------------------------------------------------------------------------------------


def run(scorer, tmp_path, rows, **options):
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    summary = score_rows(scorer, *read_score_file(source), str(tmp_path / "out.jsonl"), **options)
    return summary, read_json(tmp_path / "out.jsonl")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_keep_their_fields_and_order(folder, scorer, tmp_path, batch_size):
    rows = [TURNS, PAIR, ANSWERED, {**PAIR, "chosen": "a" * 60}]
    summary, written = run(scorer, tmp_path, rows, batch_size=batch_size)
    assert [{name: row[name] for name in source} for row, source in zip(written, rows, strict=True)] == rows
    texts = [chat("Rest."), chat("Rest."), chat(PAIR["rejected"]), chat("休息。", "为什么？"), chat("a" * 60)]
    turns, chosen, rejected, answered, long = one_by_one(folder, texts)
    assert written[0]["score"] == pytest.approx(turns, abs=1e-5)
    assert written[1]["chosen_score"] == pytest.approx(chosen, abs=1e-5)
    assert written[1]["rejected_score"] == pytest.approx(rejected, abs=1e-5)
    assert written[2]["score"] == pytest.approx(answered, abs=1e-5)
    margins = [chosen - rejected, long - rejected]
    assert [written[1]["margin"], written[3]["margin"]] == pytest.approx(margins, abs=1e-5)
    assert summary["accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert summary["margin"] == pytest.approx(sum(margins) / 2, abs=1e-5)
    assert summary["mean_reward"] == pytest.approx((turns + answered) / 2, abs=1e-5)
    assert (summary["min_reward"], summary["max_reward"]) == pytest.approx(
        (min(turns, answered), max(turns, answered)), abs=1e-5
    )


BROKEN = [
    (PAIR, None),
    ({"prompt": "Why?"}, ":2: "),
    ({**PAIR, "rejected": "Rest."}, ":3: .*the same answer"),
    ({**ANSWERED, "response": "a" * 800}, ":4: .*longer than the 700"),
    ("{", ":5: "),
]


def test_rows_that_cannot_be_scored_are_all_named_and_nothing_is_written(scorer, tmp_path):
    with pytest.raises(UserError, match="4 row.s. cannot be scored; nothing was written") as caught:
        run(scorer, tmp_path, [row for row, _ in BROKEN], long_rows="refuse")
    for _, pattern in BROKEN[1:]:
        assert caught.match(f"in.jsonl{pattern}")
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_are_left_out_only_as_far_as_the_flags_allow(scorer, tmp_path):
    rows = [row for row, _ in BROKEN[:4]]
    with pytest.raises(UserError, match="1 row.s. cannot be scored"):
        run(scorer, tmp_path, rows, skip_bad_rows=True, long_rows="refuse")
    with pytest.raises(UserError, match="2 row.s. cannot be scored") as refused:
        run(scorer, tmp_path, rows, long_rows="skip")
    assert str(refused.value).endswith("skip and count them: --skip_bad_rows True.")
    _, written = run(scorer, tmp_path, rows, skip_bad_rows=True)
    assert [row["id"] for row in written] == [7]
    with pytest.raises(UserError, match="every row was skipped"):
        run(scorer, tmp_path, rows[1:2], skip_bad_rows=True)
    with pytest.raises(UserError, match="2 of 3 rows are too long, more than half; (.|\\n)*--max_long_rows 0.67"):
        run(scorer, tmp_path, [rows[0], rows[3], rows[3]], long_rows="skip")
    assert len(run(scorer, tmp_path, [rows[0], rows[3], rows[3]], max_long_rows=0.67)[1]) == 1


def test_a_field_of_the_row_is_never_replaced(scorer, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{**PAIR, "margin": 1}, {**ANSWERED, "score": 2}])
    found, problems = read_score_file(source, frozenset({"margin", "score"}))
    assert not found and [problem.reason for problem in problems] == [
        "the output would replace the row's own margin",
        "the output would replace the row's own score",
    ]


def test_files_are_checked_before_a_model_is_loaded(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [PAIR])
    with pytest.raises(UserError, match="would overwrite --score_file"):
        check_output_file(source, source, True)
    with pytest.raises(UserError, match="is a folder"):
        check_output_file(source, str(tmp_path), True)
    with pytest.raises(UserError, match="exists already.*--overwrite_output_file"):
        check_output_file(source, write_jsonl(tmp_path / "out.jsonl", []), False)
    check_output_file(source, str(tmp_path / "out.jsonl"), True)
    # Scores that an interrupted run has left.
    write_jsonl(tmp_path / "half.jsonl.partial", [PAIR])
    with pytest.raises(UserError, match="half.jsonl.partial has the scores of a run .*--overwrite_output_file True"):
        check_output_file(source, str(tmp_path / "half.jsonl"), False)
    check_output_file(source, str(tmp_path / "half.jsonl"), True)
    for name in ("none.jsonl", "in.txt"):
        with pytest.raises(UserError, match="must be an existing .jsonl or .json file"):
            read_score_file(str(tmp_path / name))
    with pytest.raises(UserError, match="has no rows"):
        read_score_file(write_jsonl(tmp_path / "empty.jsonl", []))


def test_a_list_in_a_json_file(scorer, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([PAIR, ANSWERED]), encoding="utf-8")
    found, problems = read_score_file(str(tmp_path / "in.json"))
    assert [list(judged.conversations) for judged in found] == [["chosen_score", "rejected_score"], ["score"]]
    assert not problems


def test_options_counted_the_other_way_are_never_skipped(scorer, tmp_path):
    """Of MedMCQA, of which one copy counts from 0 and the other from 1: all other rows would be scored off by one."""
    options = {"question": "Which?", "opa": "iron", "opb": "zinc", "opc": "lead", "opd": "gold", "exp": "So it is."}
    source = write_jsonl(tmp_path / "in.jsonl", [{**options, "cop": 1}, {**options, "cop": 4}])
    rows, problems = read_score_file(source)
    with pytest.raises(UserError, match="in.jsonl:2: `cop` is 4"):
        score_rows(scorer, rows, problems, str(tmp_path / "out.jsonl"), skip_bad_rows=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
