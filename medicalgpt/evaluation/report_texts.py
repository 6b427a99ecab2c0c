"""What the report says, in English and in Chinese: each English text is the key of its twin."""

from collections.abc import Mapping

from markupsafe import Markup, escape

LANGUAGES = {"en": "English", "zh": "中文"}

# What a stage does, by the name that its run.json has.
STAGES = {
    "pretraining": "Pretraining (PT): learns to continue documents of the field; it does not answer questions yet.",
    "supervised_finetuning": "Fine-tuning (SFT): learns from conversations how to answer and where to stop.",
    "reward_modeling": "Reward model (RM): learns to score answers so that the chosen one of a pair is higher.",
    "dpo_training": "DPO: makes the chosen answer of each pair more likely than the rejected one.",
    "orpo_training": "ORPO: fine-tuning and preferences in one stage, without a reference model.",
    "ppo_training": "PPO: generates answers and changes the model toward those that a reward model scores higher.",
    "grpo_training": "GRPO: generates several answers per question and reinforces those with the higher rewards.",
}
# What a row of the table measures. Keys are the labels of the rows.
MEASURES = {
    "correct answers (everyday questions)": "Equal to the reference, for questions as people type them.",
    "declined (was not taught)": "Says that it does not know, when asked what no row teaches; the answer is readable.",
    "declined needlessly (everyday questions)": "Says that it does not know, although it was taught; fewer is better.",
    "perplexity on held-out text": "Between how many tokens it hesitates, on text not trained on; lower is better.",
    "exact match (held-out phrasings)": "Equal to the reference in every character, for phrasings that no row has.",
    "stops by itself": "Ends its answer before the limit of tokens.",
    "preference accuracy (held-out pairs)": "Per token, the chosen answer of a pair is likelier than the rejected one.",
    "good answers": "Contains what the prompt requires, in a readable answer that ends.",
    "reward model score (greedy answers)": "Mean score of its own answers to the held-out prompts, ± standard error.",
    "correct answers (held-out tasks)": "The reward `accuracy` of grpo_training.py judges the reply as correct.",
    "correct format (held-out tasks)": "The reply has the format that grpo_training.py asks for.",
    "reward model accuracy (held-out pairs)": "Gives the chosen answer of a pair the higher score.",
}
_LOSS_OF_TEXT = (
    "How badly the next token is predicted, in nats per token; lower is better. The dots are on held-out text, which "
    "is not trained on."
)
LOSS_OF_STAGE = "What the stage minimizes; lower is better. The dots are measured on held-out rows."
LOSSES = {"pretraining": _LOSS_OF_TEXT, "supervised_finetuning": _LOSS_OF_TEXT}
HIGHER_HELD_OUT = (
    "A held-out loss above the training loss is usual: the training rows were seen several times. What counts is "
    "whether the held-out loss falls; the table above compares each model with the one before it."
)

CHINESE = {
    # Stages.
    STAGES["pretraining"]: "预训练（PT）：学习续写本领域的文本，还不会回答问题。",
    STAGES["supervised_finetuning"]: "有监督微调（SFT）：从对话中学习怎样回答、在哪里结束。",
    STAGES["reward_modeling"]: "奖励模型（RM）：学习给回答打分，使偏好对中较好的回答得分更高。",
    STAGES["dpo_training"]: "DPO：让每个偏好对中较好的回答比较差的回答更可能出现。",
    STAGES["orpo_training"]: "ORPO：微调和偏好在同一阶段完成，不需要参考模型。",
    STAGES["ppo_training"]: "PPO：生成回答，使模型偏向奖励模型打分更高的回答。",
    STAGES["grpo_training"]: "GRPO：每个问题生成多个回答，强化奖励较高的回答。",
    # Measures.
    "correct answers (everyday questions)": "回答正确（日常问题）",
    MEASURES["correct answers (everyday questions)"]: "按人们平时的说法提问，回答与参考答案相同。",
    "declined (was not taught)": "回答不知道（没有教过的问题）",
    MEASURES["declined (was not taught)"]: "问到数据中没有的内容时，说明自己不知道，且回答可读。",
    "declined needlessly (everyday questions)": "学过却回答不知道（日常问题）",
    MEASURES["declined needlessly (everyday questions)"]: "教过的内容也说不知道；越少越好。",
    "perplexity on held-out text": "验证文本的困惑度",
    MEASURES["perplexity on held-out text"]: "在没有训练过的文本上，模型平均在多少个 token 之间犹豫；越低越好。",
    "exact match (held-out phrasings)": "完全匹配（没见过的问法）",
    MEASURES["exact match (held-out phrasings)"]: "用训练数据中没有的问法提问，回答与参考答案逐字相同。",
    "stops by itself": "自行结束",
    MEASURES["stops by itself"]: "在 token 上限之前自己结束回答。",
    "preference accuracy (held-out pairs)": "偏好准确率（验证用的偏好对）",
    MEASURES[
        "preference accuracy (held-out pairs)"
    ]: "按每个 token 平均，较好的回答（chosen）比较差的回答（rejected）更可能。",
    "good answers": "好回答",
    MEASURES["good answers"]: "包含提示词要求的内容，文字可读，并且正常结束。",
    "reward model score (greedy answers)": "奖励模型得分（贪心解码的回答）",
    MEASURES["reward model score (greedy answers)"]: "模型对验证用的提示词的回答的平均得分，± 为标准误差。",
    "correct answers (held-out tasks)": "回答正确（验证用的任务）",
    MEASURES["correct answers (held-out tasks)"]: "由 grpo_training.py 的奖励 `accuracy` 判定为正确。",
    "correct format (held-out tasks)": "格式正确（验证用的任务）",
    MEASURES["correct format (held-out tasks)"]: "回复符合 grpo_training.py 要求的格式。",
    "reward model accuracy (held-out pairs)": "奖励模型准确率（验证用的偏好对）",
    MEASURES["reward model accuracy (held-out pairs)"]: "给偏好对中较好的回答打更高的分。",
    # Verdicts and marks.
    "no measurable change": "没有可测量的变化",
    "higher": "升高",
    "lower": "降低",
    "good": "好回答",
    "correct": "正确",
    "exact": "完全匹配",
    "did not stop": "没有结束",
    "prompt too long": "提示词过长",
    "repeats itself": "重复",
    "broken characters": "乱码",
    "mixes languages": "混杂语言",
    "does not end": "没有说完",
    "(empty)": "（空）",
    "user": "用户",
    "assistant": "助手",
    "system": "系统",
    # Curves.
    _LOSS_OF_TEXT: (
        "预测下一个 token 的误差（每个 token，单位 nat），越低越好。圆点在验证文本上测得，这些文本不参与训练。"
    ),
    LOSS_OF_STAGE: "本阶段最小化的目标，越低越好。圆点在验证数据上测得。",
    HIGHER_HELD_OUT: (
        "验证数据的损失高于训练损失是常见的：训练数据被看过多遍。重要的是它是否下降；上面的表格将每个模型与前一个模型比较。"
    ),
    "loss": "损失",
    "accuracy": "准确率",
    "margin": "差值",
    "score": "得分",
    "reward": "奖励",
    "rewards": "各项奖励",
    "KL": "KL",
    "length": "长度",
    "end rate": "自行结束的比例",
    "no signal": "没有信号的比例",
    "step": "步",
    "no values were logged": "没有记录数值",
    "share of pairs in which the chosen answer has the higher score, implicit reward or log-probability": (
        "较好的回答的得分、隐式奖励或对数概率更高的偏好对所占比例"
    ),
    "mean difference between the chosen and the rejected answer": "较好的回答与较差的回答之差的平均值",
    "mean reward model score of the policy's answers": "策略模型的回答从奖励模型得到的平均分",
    "mean of what training maximizes: in PPO the score less penalties, in GRPO the weighted sum of rewards": (
        "训练所最大化的量的平均值：PPO 为得分减去惩罚，GRPO 为各项奖励的加权和"
    ),
    "mean of each reward function, before weighting": "每个奖励函数加权前的平均值",
    "KL divergence of the policy from its reference in nats: per answer in PPO, per token in GRPO": (
        "策略模型相对参考模型的 KL 散度（nat）：PPO 按回答计，GRPO 按 token 计"
    ),
    "mean number of tokens per answer": "每个回答的平均 token 数",
    "share of answers that end by themselves": "自行结束的回答所占比例",
    "share of groups in which all answers get the same reward: nothing is learned from them": (
        "组内所有回答奖励相同的比例：从这些组学不到东西"
    ),
    "{steps} steps": "{steps} 步",
    "{steps} steps in {duration}": "{steps} 步，用时 {duration}",
    # Warnings.
    "the run's status is “{status}”, not “finished”": "运行状态是“{status}”，不是“finished”",
    "no learning signal: in every group, all answers got the same reward": "没有学习信号：每一组中所有回答的奖励都相同",
    "no learning signal: in every step, all answers got the same score": "没有学习信号：每一步中所有回答的得分都相同",
    "the loss was not finite at step {steps}": "第 {steps} 步的损失不是有限值",
    "the held-out loss rose from {lowest} at step {step} to {last}: trained too long or too fast": (
        "验证数据的损失从第 {step} 步的 {lowest} 升到 {last}：训练过久或学习率过高"
    ),
    "{name}: requested {requested}, observed {observed}": "{name}：要求 {requested}，实际 {observed}",
    "resumed with other settings: {names}": "续训时改变了设置：{names}",
    "{count} of {rows} rows of {file} were skipped": "{file} 的 {rows} 行中跳过了 {count} 行",
    "used and skipped do not add up": "使用与跳过的行数之和不等于总行数",
    "reward model ({path}), held-out pairs: accuracy {share}, mean margin {margin}": (
        "奖励模型（{path}），验证用的偏好对：准确率 {share}，平均差值 {margin}"
    ),
    # Headings and columns.
    "Before and after": "训练前后",
    "Written {written}": "生成于 {written}",
    "Language": "语言",
    "Warnings": "警告",
    "Each model compared with the one before it": "每个模型与前一个模型比较",
    "measure": "指标",
    "Questions as people type them": "日常问题：训练前后的回答",
    "The same questions, before and after": "同样的问题：训练前后的回答",
    "Tasks, before and after": "任务：训练前后的回复",
    "Preference prompts, before and after": "偏好数据的提示词：训练前后的回答",
    "Preference accuracy by category of the rejected answer": "偏好准确率：按较差的回答的类别",
    "Exact match by category": "完全匹配：按类别",
    "Tasks: correct answers by type": "任务：按类型的正确回答",
    "Tasks: correct format by type": "任务：按类型的正确格式",
    "Stages and curves": "各阶段与曲线",
    "Models and checkpoints: what was made from what": "模型与检查点：来源",
    "Data: every row is accounted for": "数据：每一行都有去向",
    "Commands": "命令",
    "Versions": "版本",
    "category": "类别",
    "type": "类型",
    "reward model": "奖励模型",
    "model": "模型",
    "checkpoint": "检查点",
    "parameters": "参数量",
    "made from": "来源",
    "by": "方式",
    "finished": "完成时间",
    "adapter": "适配器",
    "full fine-tuning": "全参数训练",
    "merge": "合并",
    "run": "运行",
    "file": "文件",
    "rows": "行数",
    "used": "使用",
    "skipped": "跳过",
    "prompt": "提示词",
    "before": "训练前",
    "after": "训练后",
    "evaluation": "评估",
    "this report": "本报告",
    " or ": " 或 ",
    ", and ": "，且 ",
    "required: ": "要求：",
    "reference: ": "参考答案：",
    "{name}: answers recorded during training": "{name}：训练时记录的回答",
    "{count} more": "其余 {count} 条",
    "{count} more in {file}": "其余 {count} 条在 {file}",
    "no data files were recorded": "没有记录数据文件",
    # Notes.
    "{count} of its answers were not scored: {reason}": "它的 {count} 个回答没有打分：{reason}",
    "“no measurable change” means that the difference is within the noise of the measurement: the 95% intervals "
    "overlap, or the paired difference per document or prompt is not significant.": (
        "“没有可测量的变化”表示差异在测量噪声之内：95% 区间重叠，或按文档、提示词配对的差异不显著。"
    ),
    "The reward model {path} scores each model's greedy answers to the held-out preference prompts.": (
        "奖励模型 {path} 给每个模型对验证用的偏好提示词的贪心解码回答打分。"
    ),
    "The tasks are in {file}; the rewards of grpo_training.py judge the replies.": (
        "任务在 {file} 中；由 grpo_training.py 的奖励函数判定回复。"
    ),
    "Greedy answers to questions of {file}. A correct answer is the reference; what was not taught, it should "
    "decline.": "对 {file} 中问题的贪心解码回答。正确的回答与参考答案相同；没有教过的应回答不知道。",
    "Fixed rows of {file}, spread over its categories; greedy answers.": "{file} 中固定的几行，覆盖各类别；贪心解码。",
    "Greedy replies to held-out tasks. The reward accuracy decides which are correct.": (
        "对验证用的任务的贪心解码回复，由奖励 accuracy 判定是否正确。"
    ),
    "Greedy answers to held-out prompts. A good answer contains a string of each required group and is readable.": (
        "对验证用的提示词的贪心解码回答。好回答包含每组要求中的至少一项，并且文字可读、正常结束。"
    ),
    "Held-out pairs in {file}.": "验证用的偏好对在 {file} 中。",
    "The reward model {path} gives each answer a score: accuracy {share}, mean margin {margin}.": (
        "奖励模型 {path} 给每个回答打分：准确率 {share}，平均差值 {margin}。"
    ),
    "A trained model can be wrong. Its answers are not medical advice.": "训练后的模型可能出错，它的回答不是医疗建议。",
}


def in_language(text: str, language: str) -> str:
    """Return a text of the report in a language; one that comes from a model or a file stays as it is."""
    return CHINESE.get(text, text) if language == "zh" else text


def both(text: str, **values: object) -> Markup:
    """Return a text of the report in both languages, one of which the page shows.

    Args:
        values: fill the places of the text and are escaped.

    Raises:
        KeyError: the text has no twin.
    """
    return Markup("").join(
        Markup('<span class="{0}" lang="{0}">{1}</span>').format(language, Markup(escape(said)).format(**values))
        for language, said in (("en", text), ("zh", CHINESE[text]))
    )


def either(text: str) -> Markup:
    """Return a text in both languages if it is one of the report, and otherwise as it is, escaped."""
    return both(text) if text in CHINESE else escape(text)


def chart_texts(name: str, label: str) -> Mapping[str, str]:
    """Return the Chinese texts of a chart of `label` of the run `name`, by the English ones."""
    chinese = CHINESE[label]
    return {
        f"{name}: {label}": f"{name}：{chinese}",
        f"train {label}": f"训练数据的{chinese}",
        f"held-out {label}": f"验证数据的{chinese}",
        label: chinese,
        "step": CHINESE["step"],
        "no values were logged": CHINESE["no values were logged"],
    }
