"""Rows as people have them: each published shape becomes the right conversation, pair or document, or is refused.

A remedy that a refusal prints is applied here: the row is then right.
"""

import gzip
import json
import re
from pathlib import Path

import convert_dataset
import inference
from medicalgpt.args import DataArguments
from medicalgpt.data.cleaning import FileToClean, clean_files
from medicalgpt.data.loading import load_data, row_converter
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import Converter, to_messages, to_preference, to_prompt, to_text
from medicalgpt.formats.presets import PRESETS
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import Place, RowError
from medicalgpt.readers.sources import ignored_fields
from tests.helpers import ROOT, write_jsonl

import pytest

ASKED, SAID = "What helps against a cold?", "Rest and tea."
THOUGHT = "A cold is viral."
USER, REPLY = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
TURNS = [USER, REPLY]
WITH_THOUGHT = [USER, {**REPLY, "reasoning_content": THOUGHT}]
GOOD, BAD = {"role": "assistant", "content": "Call an ambulance."}, {"role": "assistant", "content": "Just wait."}
OPTIONS = {"A": "Antibiotics", "B": "Rest"}
WITH_OPTIONS = {"role": "user", "content": f"{ASKED}\nA. Antibiotics\nB. Rest"}
CHOICE = [WITH_OPTIONS, {"role": "assistant", "content": "B. Rest"}]
EXPLAINED = [WITH_OPTIONS, {"role": "assistant", "content": "B. Rest\nIt is viral."}]
WEATHER = {"name": "weather", "parameters": {}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def turn(**fields) -> dict:
    """A turn of ShareGPT, `from` first."""
    return {name.rstrip("_"): value for name, value in fields.items()}


# Rows in the shapes of published data, and the conversation that each must become.
CHATS = {
    "Alpaca": ({"instruction": ASKED, "input": "", "output": SAID}, TURNS),
    "Alpaca, question in input": ({"instruction": "", "input": ASKED, "output": SAID}, TURNS),
    "Alpaca, null instruction": ({"instruction": None, "input": ASKED, "output": SAID}, TURNS),
    "Alpaca, values in lists": ({"instruction": [ASKED], "input": [], "output": [SAID]}, TURNS),
    "Alpaca, lines in lists": (
        {"instruction": "Sort.", "input": ["b", "a"], "output": ["a, b"]},
        [{"role": "user", "content": "Sort.\nb\na"}, {"role": "assistant", "content": "a, b"}],
    ),
    "Alpaca, numbers": (
        {"instruction": "Half of", "input": 5, "output": 2.5},
        [{"role": "user", "content": "Half of\n5"}, {"role": "assistant", "content": "2.5"}],
    ),
    "Alpaca with a row number": ({"Unnamed: 0": 0, "instruction": ASKED, "input": "", "output": SAID}, TURNS),
    "Alpaca, NaN of a table": ({"instruction": ASKED, "input": float("nan"), "output": SAID}, TURNS),
    "input and output": ({"input": ASKED, "output": SAID}, TURNS),
    "query and answer": ({"query": ASKED, "answer": SAID}, TURNS),
    "dolly": (
        {"instruction": ASKED, "context": "It is viral.", "response": SAID, "category": "closed_qa"},
        [{"role": "user", "content": f"{ASKED}\nIt is viral."}, REPLY],
    ),
    "dolly without context": ({"instruction": ASKED, "context": "", "response": SAID, "category": "open_qa"}, TURNS),
    "OpenOrca": (
        {"id": "1", "system_prompt": "Brief.", "question": ASKED, "response": SAID},
        [system("Brief."), *TURNS],
    ),
    "OpenOrca, empty system": ({"id": "1", "system_prompt": "", "question": ASKED, "response": SAID}, TURNS),
    "Firefly": ({"kind": "QA", "input": ASKED, "target": SAID}, TURNS),
    "Firefly, many turns": (
        {"conversation_id": 1, "category": "Chat", "conversation": [{"human": ASKED, "assistant": SAID}] * 2},
        TURNS * 2,
    ),
    "AdvertiseGen": ({"content": ASKED, "summary": SAID}, TURNS),
    "BELLE, many turns": (
        {"instruction": f"Human:Hi\nAssistant:Hello\nHuman:{ASKED}\nAssistant:", "input": "", "output": SAID},
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TURNS],
    ),
    "a transcript as the question": ({"prompt": f"Human: {ASKED}\n\nAssistant:", "response": SAID}, TURNS),
    "a question that begins like a transcript": (
        {"prompt": "Human: what is that?", "response": SAID},
        [{"role": "user", "content": "Human: what is that?"}, REPLY],
    ),
    "medical-o1": ({"Question": ASKED, "Complex_CoT": THOUGHT, "Response": SAID}, WITH_THOUGHT),
    "medical-o1, verifiable": ({"Open-ended Verifiable Question": ASKED, "Ground-True Answer": SAID}, TURNS),
    "R1 distilled": (
        {"question": ASKED, "reasoning (reasoning_content)": THOUGHT, "response (content)": SAID},
        WITH_THOUGHT,
    ),
    "Huatuo, wordings in lists": ({"questions": [[ASKED, "And a cold?"]], "answers": [SAID]}, TURNS),
    "Huatuo, knowledge graph": ({"questions": [ASKED], "answers": [SAID]}, TURNS),
    "Huatuo-Lite": (
        {"id": 1, "answer": SAID, "score": 5, "label": "内科", "question": ASKED, "related_diseases": "cold"},
        TURNS,
    ),
    "Huatuo-SFT": ({"data": [f"问：{ASKED}", f"答：{SAID}"] * 2}, TURNS * 2),
    "UltraChat": ({"id": "1", "data": [ASKED, SAID, ASKED, SAID]}, TURNS * 2),
    "CMtMedQA": (
        {"id": 1, "cate1": "x", "instruction": ASKED, "output": SAID, "history": [["Hi", "Hello"]]},
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TURNS],
    ),
    "DISC-MedLLM": ({"_id": "1", "source": "meddialog", "conversation": TURNS}, TURNS),
    "PromptCBLUE": (
        {"input": f"{ASKED}\n答：", "target": SAID, "answer_choices": ["x"], "task_type": "cls", "sample_id": "1"},
        [{"role": "user", "content": f"{ASKED}\n答："}, REPLY],
    ),
    "cMedQA": ({"query": ASKED, "positive": [SAID, "More."], "negative": ["Nothing."]}, TURNS),
    "Chinese medical dialogue": (
        {"department": "内科", "title": "Cold", "ask": ASKED, "answer": SAID},
        [{"role": "user", "content": f"Cold\n{ASKED}"}, REPLY],
    ),
    "MedQA": (
        {"question": ASKED, "answer": "Rest", "options": OPTIONS, "meta_info": "step1", "answer_idx": "B"},
        CHOICE,
    ),
    "MedQA of bigbio": (
        {
            "question": ASKED,
            "answer": "Rest",
            "options": [{"key": "A", "value": "Antibiotics"}, {"key": "B", "value": "Rest"}],
            "answer_idx": "B",
        },
        CHOICE,
    ),
    "MedMCQA": (
        {
            **{
                "id": "1",
                "question": ASKED,
                "opa": "Antibiotics",
                "opb": "Rest",
                "opc": "Heat",
                "opd": "Cold",
                "cop": 1,
            },
            **{"choice_type": "single", "exp": "It is viral.", "subject_name": "Medicine", "topic_name": None},
        },
        [
            {"role": "user", "content": f"{WITH_OPTIONS['content']}\nC. Heat\nD. Cold"},
            {"role": "assistant", "content": "B. Rest\nIt is viral."},
        ],
    ),
    "PubMedQA": (
        {
            **{"pubid": 1, "question": ASKED, "context": {"contexts": ["One.", "Two."], "labels": ["A", "B"]}},
            **{"long_answer": SAID, "final_decision": "yes"},
        },
        [{"role": "user", "content": f"One.\nTwo.\n\n{ASKED}"}, {"role": "assistant", "content": f"yes\n{SAID}"}],
    ),
    "CMB": (
        {
            **{
                "exam_type": "医师",
                "exam_class": "x",
                "question": ASKED,
                "option": {**OPTIONS, "C": ""},
                "answer": "B",
            },
            **{"question_type": "单项选择题", "explanation": "It is viral."},
        },
        EXPLAINED,
    ),
    "CMB, two correct": (
        {"question": ASKED, "option": OPTIONS, "answer": "AB", "question_type": "多项选择题"},
        [WITH_OPTIONS, {"role": "assistant", "content": "A. Antibiotics\nB. Rest"}],
    ),
    "CMExam": (
        {"Question": ASKED, "Options": "A Antibiotics\nB Rest", "Answer": "B", "Explanation": "It is viral."},
        EXPLAINED,
    ),
    "CMExam, the hub's copy": (
        {
            **{"Question": ASKED, "Answer": "B", "Explanation": "It is viral.", "Disease Group": "cold"},
            "Options": [{"key": "A", "value": "Antibiotics"}, {"key": "B", "value": "Rest"}],
        },
        EXPLAINED,
    ),
    "MedReason": (
        {
            **{"dataset_name": "medmcqa", "id_in_dataset": 1, "question": ASKED, "reasoning": THOUGHT},
            **{"options": "Answer Choices:\nA. Antibiotics\nB. Rest", "answer": "Rest. Explanation: It is viral."},
        },
        [WITH_OPTIONS, {**EXPLAINED[1], "reasoning_content": THOUGHT}],
    ),
    "MedReason without options": (
        {"dataset_name": "x", "question": ASKED, "answer": SAID, "reasoning": THOUGHT, "options": ""},
        WITH_THOUGHT,
    ),
    "m23k": (
        {
            **{"prompt": WITH_OPTIONS["content"], "question": ASKED, "reasoning": THOUGHT, "source": "medqa"},
            **{"distilled_answer_string": "Answer: B", "answer_letter": "B", "answer_string": "Rest", "answer_idx": 1},
        },
        [WITH_OPTIONS, {"role": "assistant", "content": "Answer: B", "reasoning_content": THOUGHT}],
    ),
    "问 and 答": ({"问": ASKED, "答": SAID}, TURNS),
    "MMLU": ({"question": ASKED, "choices": ["Antibiotics", "Rest"], "answer": 1, "subject": "anatomy"}, CHOICE),
    "C-Eval": (
        {"id": 0, "question": ASKED, "A": "Antibiotics", "B": "Rest", "C": "Heat", "D": "Cold", "answer": "B"},
        [{"role": "user", "content": f"{WITH_OPTIONS['content']}\nC. Heat\nD. Cold"}, CHOICE[1]],
    ),
    "CMMLU": (
        {"Question": ASKED, "A": "Antibiotics", "B": "Rest", "C": "Heat", "D": "Cold", "Answer": "B"},
        [{"role": "user", "content": f"{WITH_OPTIONS['content']}\nC. Heat\nD. Cold"}, CHOICE[1]],
    ),
    "options of no known set": ({"query": ASKED, "choices": OPTIONS, "answerKey": "B"}, CHOICE),
    "guanaco": (
        {"text": f"### Human: {ASKED}### Assistant: {SAID}### Human: {ASKED}### Assistant: {SAID}"},
        TURNS * 2,
    ),
    "guanaco, a line for each turn": ({"text": f"### Human: {ASKED}\n### Assistant: {SAID}\n"}, TURNS),
    "CMB-Clin": (
        {
            **{"id": 0, "title": "A cold", "description": "He is 49."},
            "QA_pairs": [{"question": ASKED, "solution": SAID}, {"question": ASKED, "answer": SAID}],
        },
        [{"role": "user", "content": f"He is 49.\n\n{ASKED}"}, REPLY, *TURNS],
    ),
    "PubMedQA, the authors' files": (
        {
            **{"QUESTION": ASKED, "CONTEXTS": ["One.", "Two."], "LABELS": ["A", "B"], "MESHES": [], "YEAR": "2011"},
            **{"LONG_ANSWER": SAID, "final_decision": "yes", "reasoning_free_pred": "yes"},
        },
        [{"role": "user", "content": f"One.\nTwo.\n\n{ASKED}"}, {"role": "assistant", "content": f"yes\n{SAID}"}],
    ),
    "MedDialog": ({"description": "A cold", "utterances": [f"patient: {ASKED}", f"doctor: {SAID}"] * 2}, TURNS * 2),
    "MedDialog, Chinese": ({"utterances": [f"病人：{ASKED}", f"医生：{SAID}"]}, TURNS),
    "R1 distilled, Chinese": (
        {"input": ASKED, "reasoning_content": THOUGHT, "content": SAID, "repo_name": "x", "score": 9},
        WITH_THOUGHT,
    ),
    "OpenR1-Math": (
        {
            **{"problem": ASKED, "solution": "Otherwise.", "answer": "tea", "source": "x", "generations": ["<think>"]},
            "messages": TURNS,
        },
        TURNS,
    ),
    "DeepScaleR without a solution": ({"problem": ASKED, "solution": "", "answer": SAID}, TURNS),
    "SQuAD": (
        {
            **{"id": "1", "title": "t", "context": "It is viral.", "question": ASKED},
            "answers": {"text": [SAID, "Rest."], "answer_start": [0, 0]},
        },
        [{"role": "user", "content": f"It is viral.\n\n{ASKED}"}, REPLY],
    ),
    "capitals": ({"qtype": "treatment", "Question": ASKED, "Answer": SAID}, TURNS),
    "Alpaca, capitals": ({"Instruction": ASKED, "Input": "", "Output": SAID}, TURNS),
    "问题 and 回答": ({"问题": ASKED, "回答": SAID}, TURNS),
    "options with numbers from 1": (
        {"question": ASKED, "option1": "Antibiotics", "option2": "Rest", "answer": 2},
        CHOICE,
    ),
    "options by number from 1": (
        {"question": ASKED, "options": {"1": "Antibiotics", "2": "Rest"}, "answer": 2},
        CHOICE,
    ),
    "MMLU-Pro without the letter": (
        {"question": ASKED, "options": ["Antibiotics", "Rest"], "answer_index": 1, "category": "health"},
        CHOICE,
    ),
    "the letter as a label": ({"question": ASKED, "options": OPTIONS, "label": "B", "id": "Text-0"}, CHOICE),
    "turns of the question as JSON in a string": ({"prompt": json.dumps([USER]), "response": SAID}, TURNS),
    "Gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
            "contents": [
                {"role": "user", "parts": [{"text": ASKED}]},
                {"role": "model", "parts": [{"text": SAID[:4]}, {"text": SAID[4:]}]},
            ],
        },
        [system("S"), *TURNS],
    ),
    "GSM8K": (
        {"question": "2 bags of 3?", "answer": "2*3 = <<2*3=6>>6.\n#### 6"},
        [{"role": "user", "content": "2 bags of 3?"}, {"role": "assistant", "content": "2*3 = <<2*3=6>>6.\n#### 6"}],
    ),
    "MATH": (
        {"problem": "2*3?", "solution": "It is $\\boxed{6}$.", "answer": "6"},
        [{"role": "user", "content": "2*3?"}, {"role": "assistant", "content": "It is $\\boxed{6}$."}],
    ),
    "KTO, a good answer": ({"prompt": ASKED, "completion": SAID, "label": True}, TURNS),
    "KTO of turns": ({"prompt": [USER], "completion": [REPLY], "label": True}, TURNS),
    "HelpSteer": ({"prompt": ASKED, "response": SAID, "helpfulness": 3, "correctness": 4, "verbosity": 1}, TURNS),
    "HelpSteer2, many turns": (
        {
            "prompt": f"Hi <extra_id_1>Assistant\nHello <extra_id_1>User\n{ASKED}",
            **{"response": SAID, "helpfulness": 3, "correctness": 4},
        },
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TURNS],
    ),
    "HuatuoGPT2-SFT": (
        {"idx": "1", "conversations": [turn(from_="human", value=ASKED), turn(from_="gpt", value=SAID)]},
        TURNS,
    ),
    "ShareGPT": ({"conversations": [turn(from_="human", value=ASKED), turn(from_="gpt", value=SAID)]}, TURNS),
    **{
        f"ShareGPT, {asks} and {says}": (
            {"conversations": [turn(from_=asks, value=ASKED), turn(from_=says, value=SAID)]},
            TURNS,
        )
        for asks, says in (
            *(("user", "chatgpt"), ("human", "bing"), ("user", "bot"), ("Human", "bard")),
            *(("USER", "model"), ("prompter", "ASSISTANT"), (" user ", "ai")),
        )
    },
    "ShareGPT52K, null fields": (
        {
            "id": "a",
            "conversations": [
                {"from": "human", "value": ASKED, "markdown": None, "text": None},
                {"from": "gpt", "value": SAID, "markdown": None, "text": None},
            ],
        },
        TURNS,
    ),
    "ShareGPT, the assistant begins": (
        {"conversations": [turn(from_="gpt", value="Hello."), turn(from_="human", value=ASKED), REPLY]},
        [{"role": "assistant", "content": "Hello.", "train": False}, *TURNS],
    ),
    "conversation in the singular": ({"conversation": TURNS}, TURNS),
    "turns as JSON in a string": ({"messages": json.dumps(TURNS)}, TURNS),
    "dump of an SDK": (
        {
            "messages": [
                USER,
                {
                    **{**REPLY, "refusal": None, "annotations": [], "audio": None, "function_call": None},
                    **{"tool_calls": None, "name": None},
                },
            ]
        },
        TURNS,
    ),
    "dump of an SDK, empty calls": ({"messages": [USER, {**REPLY, "tool_calls": [], "function_call": None}]}, TURNS),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": text} for text in (ASKED[:9], ASKED[9:])]},
                {"role": "assistant", "content": [{"type": "output_text", "text": SAID, "image_url": None}]},
            ]
        },
        TURNS,
    ),
    "a thinking part": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": SAID}],
                },
            ]
        },
        WITH_THOUGHT,
    ),
    **{
        f"thinking in {name}": ({"messages": [{**USER, name: None}, {**REPLY, name: THOUGHT}]}, WITH_THOUGHT)
        for name in ("reasoning_content", "thinking", "reasoning")
    },
    "reasoning in a column": ({"question": ASKED, "reasoning": THOUGHT, "answer": SAID}, WITH_THOUGHT),
    "extra columns": ({"type": "chatml", "messages": TURNS, "source": "x", "parallel_tool_calls": False}, TURNS),
    "developer": ({"messages": [{"role": "developer", "content": "Be kind."}, *TURNS]}, [system("Be kind."), *TURNS]),
    "empty system turn": ({"messages": [system(""), *TURNS]}, [system(""), *TURNS]),
    "system turn in the middle": (
        {"messages": [*TURNS, system("Now in verse."), *TURNS]},
        [*TURNS, system("Now in verse."), *TURNS],
    ),
    "the same system prompt twice": ({"system": "S", "messages": [system("S"), *TURNS]}, [system("S"), *TURNS]),
    **{
        f"an answer with {name} {value!r}": (
            {"messages": [USER, {**REPLY, "content": "bad", name: value}, USER, {**REPLY, name: 1 - value}]},
            [USER, {"role": "assistant", "content": "bad", "train": False}, *TURNS],
        )
        for name, value in (("weight", 0), ("loss", False), ("train", False), ("weight", 0.0), ("loss_mask", 0))
    },
    "weights in every turn": ({"messages": [{**USER, "weight": 1}, {**REPLY, "weight": 1}]}, TURNS),
    "weight of a row": ({"messages": TURNS, "weight": 1.0}, TURNS),
    "the question once more": ({"messages": TURNS, "question": ASKED, "problem": ASKED}, TURNS),
    "history of turns": (
        {
            "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "query": ASKED,
            "response": SAID,
        },
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TURNS],
    ),
}

# A row for each kind of refusal, the kind of training, words of the reason, and the flags that the remedy offers, each
# with the row's conversation (or pair, or document) under these flags; None: such rows are skipped.
REFUSED = {
    "KTO, a bad answer": (
        {"prompt": ASKED, "completion": SAID, "label": False},
        to_messages,
        "`label` is false",
        {"--skip_bad_rows True": None},
    ),
    "KTO of conversations": (
        {"messages": TURNS, "label": False},
        to_messages,
        "is false",
        {"--skip_bad_rows True": None},
    ),
    "KTO in capitals": ({"Messages": TURNS, "Label": False}, to_messages, "is false", {"--skip_bad_rows True": None}),
    "images in capitals": (
        {"messages": TURNS, "Images": ["a.png"]},
        to_messages,
        "`images`, and only text",
        {"--skip_bad_rows True": None},
    ),
    "kto_tag": ({"messages": TURNS, "kto_tag": False}, to_messages, "is false", {"--skip_bad_rows True": None}),
    "a label of the subject": (
        {"messages": TURNS, "label": "cardiology"},
        to_messages,
        "`label` may say",
        {"--ignore_fields label": TURNS},
    ),
    "a label that is a number": ({"messages": TURNS, "label": 0}, to_messages, "`label` may say", {}),
    "images": (
        {"messages": TURNS, "images": ["a.png"]},
        to_messages,
        "`images`, and only text",
        {"--skip_bad_rows True": None},
    ),
    "a second answer": (
        {"prompt": ASKED, "response": SAID, "answer": "Tea."},
        to_messages,
        "`answer` is a second answer next to `response`",
        {
            "--ignore_fields answer": TURNS,
            "--columns question=prompt,answer=answer": [USER, {"role": "assistant", "content": "Tea."}],
        },
    ),
    "a context": (
        {"question": ASKED, "context": "It is viral.", "answer": SAID},
        to_messages,
        "`context` may belong to the question in `question`",
        {
            "--columns question=question,answer=answer,input=context": [
                {"role": "user", "content": f"{ASKED}\nIt is viral."},
                REPLY,
            ],
            "--ignore_fields context": TURNS,
        },
    ),
    "another question": (
        {"messages": TURNS, "question": "How are you?"},
        to_messages,
        "`question` may belong to the conversation",
        {"--ignore_fields question": TURNS},
    ),
    "a misspelled field": (
        {"instruction": ASKED, "output": SAID, "histroy": []} | {"histroy": [["Hi", "Hello"]]},
        to_messages,
        "`histroy` is not read; `history` would be",
        {"--ignore_fields histroy": TURNS},
    ),
    "UltraFeedback for fine-tuning": (
        {"prompt": ASKED, "prompt_id": "1", "chosen": TURNS, "rejected": [USER, BAD], "messages": TURNS},
        to_messages,
        "not for this stage",
        {"--columns messages=chosen": TURNS},
    ),
    "hh-rlhf for fine-tuning": (
        {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {SAID}", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: No."},
        to_messages,
        "not for this stage",
        {"--columns messages=chosen": TURNS},
    ),
    "a pair for fine-tuning": (
        {"prompt": ASKED, "chosen": SAID, "rejected": "No."},
        to_messages,
        "two answers",
        {"--columns question=prompt,answer=chosen": TURNS},
    ),
    "a pair of ShareGPT for fine-tuning": (
        {"conversations": [turn(from_="human", value=ASKED)], "chosen": REPLY, "rejected": BAD},
        to_messages,
        "two answers",
        {"--columns question=conversations,answer=chosen": TURNS},
    ),
    "an answer that is not an option": (
        {"question": ASKED, "options": OPTIONS, "answer_idx": "E"},
        to_messages,
        "none of the options",
        {"--skip_bad_rows True": None},
    ),
    "MedMCQA's test set": (
        {"question": ASKED, "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": -1},
        to_messages,
        "`cop` is -1",
        {"--skip_bad_rows True": None},
    ),
    "MedMCQA counted from 1": (
        {"question": ASKED, "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 4},
        to_messages,
        "`cop` is 4",
        {
            "--preset medmcqa-original": [
                {"role": "user", "content": f"{ASKED}\nA. a\nB. b\nC. c\nD. d"},
                {"role": "assistant", "content": "D. d"},
            ]
        },
    ),
    "MedMCQA counted from 1, of a table": (
        {"question": ASKED, "opa": "4", "opb": "3", "opc": "2", "opd": "1", "cop": "4"},
        to_messages,
        "`cop` is 4",
        {
            "--preset medmcqa-original": [
                {"role": "user", "content": f"{ASKED}\nA. 4\nB. 3\nC. 2\nD. 1"},
                {"role": "assistant", "content": "D. 1"},
            ]
        },
    ),
    "a set whose values are of another kind": (
        {"question": ASKED, "choices": [1, {}], "answer": 0},
        to_messages,
        "an option is not text under a letter",
        {},
    ),
    "HelpSteer3 with words": (
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": "better"},
        to_preference,
        "neither answer is better",
        {"--skip_bad_rows True": None},
    ),
    "DAPO for fine-tuning": (
        {"prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}},
        to_messages,
        "not for this stage",
        {},
    ),
    "HelpSteer3, no preference": (
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0},
        to_preference,
        "neither answer is better",
        {"--skip_bad_rows True": None},
    ),
    "a document under another name": (
        {"content": "An article.", "year": 2020},
        to_text,
        "no field `text`",
        {"--columns text=content": "An article."},
    ),
    "a third answer": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "output": "Other."},
        to_preference,
        "`output` is a third answer",
        {"--ignore_fields output": ([USER], GOOD, BAD)},
    ),
    "a prompt next to whole conversations": (
        {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        to_preference,
        "next to a prompt",
        {"--ignore_fields prompt": ([USER], GOOD, BAD)},
    ),
    "two answers in a list": (
        {"instruction": ASKED, "input": "", "output": [SAID, "No."]},
        to_messages,
        "`output` has 2 texts",
        {},
    ),
    "two rejected answers": (
        {"prompt": ASKED, "chosen": SAID, "rejected": ["No.", "Never."]},
        to_preference,
        "`rejected` has 2 texts",
        {},
    ),
    "a rejected answer": (
        {"query": ASKED, "response": SAID, "rejected_answer": "No."},
        to_messages,
        "`rejected_answer` is a second answer",
        {"--ignore_fields rejected_answer": TURNS},
    ),
    "a second rejected answer": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "rejected_2": "Never."},
        to_preference,
        "`rejected_2` is a third answer",
        {"--ignore_fields rejected_2": ([USER], GOOD, BAD)},
    ),
    "a rejected answer of ms-swift for fine-tuning": (
        {"messages": TURNS, "rejected_response": "No."},
        to_messages,
        "not for this stage",
        {"--ignore_fields rejected_response": TURNS},
    ),
    "UltraFeedback's completions for fine-tuning": (
        {"instruction": ASKED, "completions": [{"response": SAID, "overall_score": 8}]},
        to_messages,
        "not for this stage",
        {},
    ),
    "UltraFeedback's completions, all the same": (
        {"instruction": ASKED, "completions": [{"response": text, "overall_score": 8} for text in "ab"]},
        to_preference,
        "no completion is better",
        {"--skip_bad_rows True": None},
    ),
    "UltraFeedback's completions without ratings": (
        {"instruction": ASKED, "completions": [{"response": text, "annotations": {}} for text in "ab"]},
        to_preference,
        "fewer than two completions with a rating",
        {"--skip_bad_rows True": None},
    ),
    "Chatbot Arena, a tie": (
        {"winner": "tie", "conversation_a": [USER, GOOD], "conversation_b": [USER, BAD]},
        to_preference,
        "neither answer is better",
        {"--skip_bad_rows True": None},
    ),
    "rated answers for preferences": (
        {"prompt": ASKED, "response": SAID, "helpfulness": 3, "correctness": 4},
        to_preference,
        "rows of helpsteer are not for this stage",
        {},
    ),
    "SQuAD without an answer": (
        {"context": "It is viral.", "question": ASKED, "answers": {"text": [], "answer_start": []}},
        to_messages,
        "no answer in the text",
        {"--skip_bad_rows True": None},
    ),
    "contexts": (
        {"question": ASKED, "contexts": ["It is viral.", "It passes."], "answer": SAID},
        to_messages,
        "`contexts` may belong to the question",
        {
            "--columns question=question,answer=answer,input=contexts": [
                {"role": "user", "content": f"{ASKED}\nIt is viral.\nIt passes."},
                REPLY,
            ],
            "--ignore_fields contexts": TURNS,
        },
    ),
    "a second answer in capitals": (
        {"Question": ASKED, "Answer": SAID, "Output": "Tea."},
        to_messages,
        "`output` is a second answer",
        {
            "--ignore_fields output": TURNS,
            "--columns question=question,answer=output": [USER, {"role": "assistant", "content": "Tea."}],
        },
    ),
    "turns under another name": (
        {"id": 1, "dialogue": TURNS},
        to_messages,
        "no known chat format",
        {"--columns messages=dialogue": TURNS},
    ),
    "a picture among the parts": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]},
        to_messages,
        "turn 1 (user) has image_url, and only text",
        {"--skip_bad_rows True": None},
    ),
    "a weight of the row": ({"messages": TURNS, "sample_weight": 0.5}, to_messages, "`sample_weight` is 0.5", {}),
    "a table without names of columns": (
        {"头痛怎么办？": "发烧怎么办？", "休息。": "喝水。"},
        to_messages,
        "the names of the fields look like a row",
        {},
    ),
    "calls as text": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "[weather()]"},
                {"role": "tool", "content": "sun"},
                REPLY,
            ]
        },
        to_messages,
        "turn 3 is the result of a tool, and turn 2 has no call",
        {},
    ),
    "a pair under other names": (
        {"question": ASKED, "pos": GOOD["content"], "neg": BAD["content"]},
        to_preference,
        "no field `chosen`",
        {"--columns question=question,chosen=pos,rejected=neg": ([USER], GOOD, BAD)},
    ),
    "rendered text": (
        {"text": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{SAID}<|im_end|>\n"},
        to_messages,
        "rendered with a chat template",
        {},
    ),
    "a second pair": (
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "response_chosen": "Other."},
        to_preference,
        "`response_chosen` next to",
        {"--ignore_fields response_chosen": ([USER], GOOD, BAD)},
    ),
}

PAIRS = {
    "UltraFeedback": (
        {
            **{"prompt": ASKED, "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            **{"messages": [USER, GOOD], "score_chosen": 8.5, "score_rejected": 3.0},
        },
        [USER],
    ),
    "hh-rlhf": (
        {
            "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD['content']}",
            "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD['content']}",
        },
        [USER],
    ),
    "hh-rlhf, many turns": (
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASKED}\n\nAssistant: {GOOD['content']}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASKED}\n\nAssistant: {BAD['content']}",
        },
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER],
    ),
    "hh-rlhf with the prompt apart": (
        {
            "prompt": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASKED}\n\nAssistant:",
            **{"chosen": GOOD["content"], "rejected": BAD["content"]},
        },
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER],
    ),
    "HelpSteer3": (
        {
            **{"domain": "general", "context": [USER], "response1": BAD["content"], "response2": GOOD["content"]},
            "overall_preference": 2,
        },
        [USER],
    ),
    "HelpSteer3, negative": (
        {"context": [USER], "response1": GOOD["content"], "response2": BAD["content"], "overall_preference": -1},
        [USER],
    ),
    "HelpSteer2": (
        {"prompt": ASKED, "response_1": GOOD["content"], "response_2": BAD["content"], "preference_strength": -3},
        [USER],
    ),
    "cMedQA": ({"query": ASKED, "positive": [GOOD["content"]], "negative": [BAD["content"], "x"]}, [USER]),
    "Orca DPO": (
        {"system": "S", "question": ASKED, "chosen": GOOD["content"], "rejected": BAD["content"]},
        [system("S"), USER],
    ),
    "UltraFeedback, all completions": (
        {
            **{"source": "sharegpt", "instruction": ASKED, "models": ["a", "b", "c"], "correct_answers": ["None"]},
            "completions": [
                {
                    **{"model": "m", "custom_system_prompt": "S", "response": text, "overall_score": score},
                    "annotations": {name: {"Rating": rating, "Rationale": "x"} for name in ("honesty", "truthfulness")},
                }
                # The set has a score of 10 next to ratings of 1, where 1 was meant.
                for text, rating, score in ((BAD["content"], "1", 10), ("So so.", "N/A", 5), (GOOD["content"], "5", 8))
            ],
        },
        [USER],
    ),
    "UltraFeedback, all completions, without ratings of aspects": (
        {
            "instruction": ASKED,
            "completions": [
                {"response": message["content"], "overall_score": score} for message, score in ((GOOD, 8), (BAD, 2))
            ],
        },
        [USER],
    ),
    "preferences of OpenAI": (
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            **{"preferred_output": [GOOD], "non_preferred_output": [BAD]},
        },
        [USER],
    ),
    "ms-swift": ({"messages": [USER, GOOD], "rejected_response": BAD["content"]}, [USER]),
    "ms-swift, question and answer": (
        {"query": ASKED, "response": GOOD["content"], "rejected_response": BAD["content"]},
        [USER],
    ),
    "Chatbot Arena": (
        {
            **{"question_id": "1", "model_a": "x", "model_b": "y", "winner": "model_b", "turn": 1},
            **{"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD]},
        },
        [USER],
    ),
    "turns as JSON in strings": ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}, [USER]),
    "scores": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "margin": 2, "score_chosen": 9}, [USER]),
    "messages once more": ({"prompt": ASKED, "messages": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
}

TEXTS = {
    "a line": ("一篇文章。", "一篇文章。"),
    "text with more": ({"text": "An article.", "meta": {"a": 1}, "url": "http://example.org"}, "An article."),
}


def convert(row, to, flags: str = ""):
    """A row under flags of the command line; what is not a flag of the data is an error."""
    words = flags.split()
    given = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    return row_converter(DataArguments(**given), to).convert(row)


def result(row, to, flags: str = ""):
    found = convert(row, to, flags).row
    if to is to_preference:
        return found["messages"], found["chosen"], found["rejected"]
    return found["text"] if to is to_text else found["messages"]


@pytest.mark.parametrize(("row", "messages"), CHATS.values(), ids=CHATS)
def test_conversations(row, messages):
    before = json.dumps(row)
    assert to_messages(row)["messages"] == messages
    assert json.dumps(row) == before


def test_rows_with_the_same_names_are_read_by_their_values():
    """What names alone say is found once for each set of them."""
    empty = {"instruction": "", "input": "", "output": SAID, "system": "", "history": [], "options": "", "answer": ""}
    rows = [
        ({**empty, "instruction": ASKED}, TURNS),
        ({**empty, "input": ASKED}, TURNS),
        ({**empty, "instruction": ASKED, "system": "S", "history": [["Hi", "Hello"]]}, None),
        ({**empty, "instruction": ASKED, "output": "", "options": OPTIONS, "answer": "B"}, CHOICE),
        ({**empty, "instruction": ASKED, "answer": "Tea."}, RowError),
    ]
    for order in (rows, rows[::-1], rows):
        for row, messages in order:
            if messages is RowError:
                with pytest.raises(RowError, match="`answer` is a second answer"):
                    to_messages(row)
            elif messages:
                assert to_messages(row)["messages"] == messages
            else:
                assert [message["content"] for message in to_messages(row)["messages"]] == [
                    *("S", "Hi", "Hello", ASKED, SAID)
                ]


@pytest.mark.parametrize(("row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_preferences(row, prompt):
    assert result(row, to_preference) == (prompt, GOOD, BAD)


@pytest.mark.parametrize(("row", "text"), TEXTS.values(), ids=TEXTS)
def test_documents(row, text):
    assert result(row, to_text) == text


def test_old_function_calls():
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "sun"},
            REPLY,
        ],
        "functions": [WEATHER],
    }
    assert to_messages(row) == {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "sun"},
            REPLY,
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }


@pytest.mark.parametrize(("row", "to", "reason", "flags"), REFUSED.values(), ids=REFUSED)
def test_refusals_and_their_remedies(row, to, reason, flags):
    with pytest.raises(RowError) as refused:
        to(row)
    assert reason in refused.value.reason
    offered = re.findall(r"--(?:columns|ignore_fields|preset|skip_bad_rows) [^\s.]+", refused.value.remedy)
    # A remedy cannot know every name: FIELD stands for one.
    offered = [flag if "FIELD" not in flag else next(iter(flags), flag) for flag in offered]
    assert sorted(offered) == sorted(flags), refused.value.remedy
    for flag, right in flags.items():
        if right is None:
            # Skipped: it is refused with this flag as well, and counted.
            with pytest.raises(RowError):
                to(row)
        else:
            assert result(row, to, flag) == right


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "answers": [{"answer": SAID, "rank": 1.0}]},
        {"instruction": ASKED, "completions": [{"text": SAID}]},
        {"input": ASKED, "content": SAID},
        {"title": ASKED, "content": SAID},
        {"qtext": ASKED, "answers": [{"aid": 1, "atext": SAID}]},
    ],
    ids=lambda row: ", ".join(row),
)
def test_a_field_is_renamed_only_if_its_value_could_be_what_is_meant(row):
    """Renamed, such rows were refused once more, or trained with a field in another's place."""
    with pytest.raises(RowError) as refused:
        to_messages(row)
    assert "Rename" not in refused.value.remedy


def test_what_must_not_be_ignored_is_not():
    """`--ignore_fields label` would train bad examples, `images` the marks of the images."""
    bad = {"prompt": ASKED, "completion": SAID, "label": False}
    marked = {"messages": [{"role": "user", "content": "<image>What is this?"}, REPLY], "images": ["a.png"]}
    in_capitals = {"Prompt": ASKED, "Completion": SAID, "Label": False}
    for row, name in ((bad, "label"), (marked, "images"), (in_capitals, "label"), (in_capitals, "Label")):
        with pytest.raises(RowError) as refused:
            to_messages(row, frozenset({name}))
        assert f"without --ignore_fields {name.lower()}" in refused.value.remedy
    assert to_messages({"messages": TURNS, "images": ["a.png"]}, frozenset({"images"}))["messages"] == TURNS


# --- every preset ----------------------------------------------------------------------------------------------------


def example_of(name: str) -> tuple[dict, str]:
    """A row of CHATS or PAIRS that is recognised as this preset, and its kind."""
    for to, table in ((to_messages, CHATS), (to_preference, PAIRS)):
        for row, _ in table.values():
            if convert(row, to).preset == name:
                return row, to
    return NAMED[name]


# Presets whose shape many sets have, or that have no conversation.
NAMED = {
    "alpaca": (CHATS["Alpaca"][0], to_messages),
    "cmtmedqa": (CHATS["CMtMedQA"][0], to_messages),
    "sharegpt": (CHATS["ShareGPT"][0], to_messages),
    "medmcqa-original": ({**CHATS["MedMCQA"][0], "cop": 2}, to_messages),
    "dapo": ({"prompt": [USER], "data_source": "m", "reward_model": {"ground_truth": "2"}}, to_task),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_reads_its_rows_by_name_and_by_shape(name):
    row, to = example_of(name)
    by_name = convert(row, to, f"--preset {name}")
    assert by_name.preset == name
    if name not in ("dapo", "medmcqa-original"):
        assert by_name.row == convert(row, to).row
    assert (convert(row, to).preset == name) == PRESETS[name].by_shape
    with pytest.raises(RowError, match=f"which rows of {name} have"):
        convert({"nothing": "of it"}, to, f"--preset {name}")


@pytest.mark.parametrize("name", [name for name in PRESETS if "task" in PRESETS[name].kinds])
def test_question_and_options_stand_in_the_prompt_and_the_answer_in_the_reply(name):
    row, _ = example_of(name)
    question = next(
        row[field]
        for field in ("question", "Question", "QUESTION", "problem", "prompt", "问", "Open-ended Verifiable Question")
        if field in row
    )
    question = question[0]["content"] if isinstance(question, list) else question
    task = convert(row, to_task).row
    assert question in task["messages"][-1]["content"] or task["messages"][-1]["content"] in question
    if "chat" not in PRESETS[name].kinds:
        return
    prompt, reply = (message["content"] for message in to_messages(row)["messages"])
    assert question in prompt
    options = task["columns"].get("options")
    if not options:
        return
    for letter, text in options.items():
        assert f"{letter}. {text}" in prompt
        assert (letter in task["columns"]["answer"]) == (f"{letter}. {text}" in reply or f"Answer: {letter}" in reply)


@pytest.mark.parametrize("page", ["docs/datasets.md", "docs/datasets_zh.md"])
def test_the_pages_list_every_preset(page):
    stages = {"SFT": "chat", "RM, DPO, ORPO": "preference", "GRPO": "task"}
    found = {}
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 6 and cells[0].startswith("`"):
            name, source, names, kinds, license_note, flags = cells
            kinds = tuple(stages[kind] for kind in kinds.split("; "))
            found[name.strip("`")] = (source, tuple(re.findall("`([^`]+)`", names)), kinds, license_note)
            preset = re.search(r"--preset ([\w-]+)", flags)
            assert preset is None or f"`{preset[1]}`" == name
    assert found == {
        name: (preset.source, (*preset.needs, *preset.marks), preset.kinds, preset.license)
        for name, preset in PRESETS.items()
    }


@pytest.mark.parametrize(
    ("cop", "flags", "remedy"),
    [(4, {}, "medmcqa-original"), ("4", {}, "medmcqa-original"), (0, {"preset": "medmcqa-original"}, "medmcqa")],
)
@pytest.mark.parametrize("to", [to_messages, to_prompt, to_task])
def test_medmcqa_counted_the_other_way_stops_although_bad_rows_are_skipped(tmp_path, to, cop, flags, remedy):
    """What is left without these rows would be trained, each with the answer next to the right one."""
    rows = [{**CHATS["MedMCQA"][0], "question": f"{number}?", "cop": number} for number in (1, 2, 3)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "question": "4?", "cop": cop}])
    arguments = DataArguments(train_file_dir=path, skip_bad_rows=True, **flags)
    with pytest.raises(UserError) as refused:
        load_data(arguments, to).settle(arguments)
    assert f"a.jsonl:4: `cop` is {cop}" in str(refused.value) and "--skip_bad_rows" not in str(refused.value)
    (preset,) = re.findall(r"--preset ([\w-]+)", str(refused.value))
    assert preset == remedy
    arguments = DataArguments(train_file_dir=path, preset=preset)
    data = load_data(arguments, to)
    data.settle(arguments)
    assert len(data.train) == 4


def test_programs_that_skip_rows_by_themselves_stop_at_those_that_are_misread(tmp_path):
    row = {**CHATS["MedMCQA"][0], "cop": 4}
    with pytest.raises(RowError) as found:
        to_messages(row)
    problem = found.value.at(Place("a.jsonl", 1))
    with pytest.raises(UserError, match="--preset medmcqa-original"):
        inference.refuse([problem], skip=True)
    arguments = convert_dataset.ConversionArguments("a", "b", to="sharegpt", skip_bad_rows=True)
    with pytest.raises(UserError, match="--preset medmcqa-original"):
        convert_dataset.settle(arguments, [problem], converted=1)
    path = Path(write_jsonl(tmp_path / "a.jsonl", [{**row, "cop": 1}, row]))
    file = FileToClean(path, tmp_path / "fixed" / "a.jsonl", to_messages, answered=True)
    with pytest.raises(UserError, match="a.jsonl:2: .*--preset medmcqa-original"):
        clean_files([file], tmp_path / "fixed", tmp_path / "list.jsonl")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_presets_differ_in_what_they_need():
    for preset in PRESETS.values():
        assert set(preset.kinds) <= {"text", "chat", "preference", "task"} and preset.license and preset.source
        assert (preset.convert is None) == bool(preset.columns)


def test_flags_that_cannot_be_understood(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": ASKED, "a": SAID}])

    def load(**flags):
        return load_data(DataArguments(train_file_dir=path, **flags), to_messages)

    for flags, part in (
        ({"preset": "medqua"}, "Did you mean medqa?"),
        ({"preset": "zzz"}, "It is one of medical-o1"),
        ({"columns": "question"}, "'question' is not NAME=FIELD"),
        ({"columns": "ask=q"}, "'ask' is not one of question"),
        ({"columns": "question=q,question=a"}, "question is given twice"),
        ({"columns": ","}, "--columns is empty"),
        ({"columns": "question=q,answer=a", "preset": "medqa"}, "Give one of them"),
        ({"columns": "question=q,answer=a,system=sytsem"}, "no row has the field sytsem"),
    ):
        with pytest.raises(UserError, match=re.escape(part)):
            load(**flags)
    (problem,) = load(columns="question=q,answer=reply").problems
    assert "no field `reply`, which --columns names (fields: q, a)" in problem.reason
    assert [row["messages"] for row in load(columns="question=q, answer=a").train] == [TURNS]


def test_columns_map_every_common_name():
    row = {"q": ASKED, "c": "It is viral.", "t": THOUGHT, "r": SAID, "s": "S", "h": [["Hi", "Hello"]], "label": False}
    found = convert(row, to_messages, "--columns question=q,input=c,reasoning=t,answer=r,system=s,history=h")
    assert found.row["messages"] == [
        system("S"),
        *[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        {"role": "user", "content": f"{ASKED}\nIt is viral."},
        WITH_THOUGHT[1],
    ]
    assert found.unused == ("label",)
    row = {"q": ASKED, "o": ["Antibiotics", "Rest"], "right": "B", "why": "It is viral."}
    assert (
        convert(row, to_messages, "--columns question=q,options=o,answer=right,explanation=why").row["messages"]
        == EXPLAINED
    )
    row = {"p": ASKED, "good": GOOD, "bad": BAD}
    assert result(row, to_preference, "--columns question=p,chosen=good,rejected=bad") == ([USER], GOOD, BAD)
    assert result({"log": TURNS, "fn": [WEATHER]}, to_messages, "--columns messages=log,tools=fn") == TURNS
    assert result({"body": "t"}, to_text, "--columns text=body") == "t"


# --- files -----------------------------------------------------------------------------------------------------------

ROW = {"prompt": ASKED, "response": SAID}
OTHER = {"prompt": "What helps against thirst?", "response": "Water."}
SPANISH = "síntomas y diagnóstico de la infección"


def as_lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# Files as people have them: their content by name, and the rows or documents that are read, or words of the refusal.
FILES = {
    "JSON Lines named .json": ({"a.json": as_lines(ROW, OTHER)}, [ROW, OTHER]),
    "a list named .jsonl": ({"a.jsonl": json.dumps([ROW, OTHER], indent=2).encode()}, [ROW, OTHER]),
    "a list under a name": ({"a.json": json.dumps({"data": [ROW, OTHER]}).encode()}, [ROW, OTHER]),
    "two formats": (
        {"a.jsonl": as_lines(ROW), "b.csv": f"prompt,response\n{OTHER['prompt']},{OTHER['response']}\n".encode()},
        [ROW, OTHER],
    ),
    "compressed": ({"a.jsonl.gz": gzip.compress(as_lines(ROW, OTHER))}, [ROW, OTHER]),
    "Chinese in GBK": (
        {
            "a.jsonl": as_lines({"prompt": "感冒了怎么办？", "response": "多休息，多喝水，高烧不退请就医。"})
            .decode()
            .encode("gbk")
        },
        [{"prompt": "感冒了怎么办？"}],
    ),
    "a split by folders": (
        {"train/a.jsonl": as_lines(ROW), "validation/a.jsonl": as_lines(OTHER), "test/a.jsonl": b"not read"},
        [ROW],
    ),
    "Latin-1": ({"a.txt": SPANISH.encode("latin_1")}, [SPANISH]),
    "JSON Lines named .txt": ({"a.txt": as_lines(ROW, OTHER)}, "has rows of JSON.*Rename it: a.jsonl"),
    "a list under each name": (
        {"a.json": json.dumps({"prompt": ["1?", "2?"], "response": ["1", "2"]}).encode()},
        "a list under each key",
    ),
    "rows under their ids": ({"a.json": json.dumps({"21645374": ROW, "16418930": OTHER}).encode()}, [ROW, OTHER]),
    "compressed, without saying so": (
        {"a.jsonl": gzip.compress(as_lines(ROW, OTHER))},
        "packed with gzip.*rename it: a.jsonl.gz",
    ),
}


@pytest.mark.parametrize(("files", "rows"), FILES.values(), ids=FILES)
def test_files(tmp_path, files, rows):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    is_text = all(name.endswith(".txt") for name in files)
    arguments, to = DataArguments(train_file_dir=str(tmp_path)), to_text if is_text else to_messages
    if isinstance(rows, str):
        with pytest.raises(UserError, match=rows):
            load_data(arguments, to)
        return
    data = load_data(arguments, to)
    assert not data.problems
    read = [row["text"] if is_text else row["messages"][0]["content"] for row in data.train]
    assert read == [row if is_text else row["prompt"] for row in rows]


# --- what is not used ------------------------------------------------------------------------------------------------


def test_fields_that_are_not_used_are_counted_in_one_line(tmp_path, log):
    rows = [{"prompt": f"{n}?", "response": SAID, "id": n, **({"source": "x"} if n < 3 else {})} for n in range(1, 6)]
    rows += [{"prompt": "6?", "response": SAID, "url": None, "tags": []}]
    write_jsonl(tmp_path / "a.jsonl", rows[:4])
    write_jsonl(tmp_path / "b.jsonl", rows[4:])
    data = load_data(DataArguments(train_file_dir=str(tmp_path)), to_messages)
    assert log[1:] == ["5 row(s) hold fields that are not used: id, source (2)"]
    assert [account.as_dict().get("unused_fields") for account in data.account["train"]] == [
        {"id": 4, "source": 2},
        {"id": 1},
    ]


def test_what_a_turn_holds_and_is_not_used_is_counted():
    row = {"messages": [{**USER, "emotion": "sad", "ts": None}, REPLY], "id": 1}
    assert convert(row, to_messages).unused == ("id", "turn.emotion")


def test_the_shape_that_was_recognised_is_printed(tmp_path, log):
    write_jsonl(tmp_path / "a.jsonl", [CHATS["MedQA"][0], CHATS["medical-o1"][0]])
    data = load_data(DataArguments(train_file_dir=str(tmp_path)), to_messages)
    shapes = [line for line in log if "have the shape of" in line]
    assert "1 row(s) have the shape of GBaker/MedQA-USMLE-4-options, bigbio/med_qa" in shapes[0]
    assert "(--preset medqa)" in shapes[0] and "(--preset medical-o1)" in shapes[1]
    assert data.account["train"][0].as_dict()["presets"] == {"medqa": 1, "medical-o1": 1}


def test_names_of_ignored_fields_may_hold_spaces():
    assert ignored_fields("Unnamed: 0, label") == {"Unnamed: 0", "label"}


def test_a_prompt_needs_no_answer():
    for row, messages in (
        (CHATS["MedQA"][0], [WITH_OPTIONS]),
        ({"question": ASKED, "options": OPTIONS}, [WITH_OPTIONS]),
    ):
        assert to_prompt(row)["messages"] == messages
    assert "train" not in json.dumps(to_prompt({"messages": [{**REPLY, "weight": 0}, USER]}))
    assert Converter(to_prompt)("Q")["messages"] == [{"role": "user", "content": "Q"}]
