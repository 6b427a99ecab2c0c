"""The tables of docs/resuming.md and docs/resuming_zh.md, written from medicalgpt/training/resume_flags.py."""

import re
from pathlib import Path

from medicalgpt.training.resume_flags import FACTS, TABLE, Group, Policy, WayOut

PAGES = {"en": Path(__file__).parent / "resuming.md", "zh": Path(__file__).parent / "resuming_zh.md"}
TABLES = re.compile(r"(<!-- (\w+): written by docs.build_training_params -->\n).*?(<!-- end -->)", re.DOTALL)
# The tables by the names of their places on the page, with the policies that each shows.
SHOWN = {
    "may_change": (Policy.MAY_CHANGE, Policy.START),
    "same": (Policy.SAME_CONTENT, Policy.SAME_PRODUCT),
    "fixed": (Policy.FIXED,),
}
HEADERS = {
    "en": {
        "may_change": ("flags", "what they change"),
        "same": ("flags", "rule"),
        "fixed": ("flags", "why", "instead"),
    },
    "zh": {"may_change": ("参数", "影响"), "same": ("参数", "规则"), "fixed": ("参数", "原因", "替代办法")},
}
CHINESE = {
    # Facts.
    "the number of processes": "进程数",
    "the program": "程序",
    "the weights of the base model": "基座权重",
    "the adapter that training started from": "训练起点的适配器",
    "the configuration of the model": "模型的配置（config.json）",
    "the configuration of --reference_model": "`--reference_model` 的配置",
    "the configuration of --reward_model_path": "`--reward_model_path` 的配置",
    "the configuration of --value_model_path": "`--value_model_path` 的配置",
    "the engine": "引擎（DDP、DeepSpeed 或 FSDP）",
    "the tokenizer": "分词器",
    "the chat template": "对话模板",
    "the rows": "数据行",
    # Reasons.
    "only what is shown and logged": "只影响显示和日志",
    "only what is saved, and where": "只影响保存的内容和位置",
    "only when training ends": "只影响训练何时结束",
    "the learning rate continues as if the run had been planned that long from the start": "学习率按"
    "“一开始就计划这么长”继续",
    "only what is evaluated, and when": "只影响评估的内容和时间",
    "only which checkpoint is the best": "只影响哪个检查点最好",
    "only speed, memory and rounding": "只影响速度、内存和舍入误差",
    "only how fast rows are loaded": "只影响读取数据的速度",
    "the rows that are trained on are compared themselves": "直接比较参与训练的数据行",
    "weights, tokenizer and chat template are compared by their hashes": "按哈希比较权重、分词器和对话模板",
    "rows are compared by the hashes of their files; packed ones also by their division into shards": "按文件"
    "哈希比较数据；打包的数据还比较分片数",
    "models and files are compared by their hashes": "按哈希比较模型和文件",
    "rows per optimizer step: batch size x accumulation x processes": "每个优化步的行数：批大小 × 累积步数 × 进程数",
    "each stage has its own checkpoints": "每个阶段有自己的检查点",
    "determines which rows come next, so that some would be trained twice and others never": "决定接下来训练哪些行，"
    "改动会使一些行训练两次、另一些从不训练",
    "determines which rows are trained on": "决定哪些行参与训练",
    "determines the tokens of a row": "决定一行的 token",
    "the state of optimizer and learning rate schedule is restored as it was": "优化器和学习率调度的状态按原样恢复",
    "determines the loss": "决定损失",
    "determines how answers are sampled and trained on": "决定回答如何采样、如何训练",
    "determines the rewards": "决定奖励",
    "the checkpoint has either an adapter or all weights": "检查点里要么是适配器，要么是全部权重",
    "determines which weights are trained, and these are restored": "决定训练哪些权重，而这些权重要从检查点恢复",
    "what the trained weights belong to": "参与训练的权重依附于它",
    "determines what a model makes of its weights": "决定模型如何使用它的权重",
    "each engine saves the state of the optimizer in its own form": "每种引擎以自己的格式保存优化器状态",
    "belongs to a single start, or follows from other flags": "只属于一次启动，或由其他参数决定；不比较",
    # Exceptions.
    "the checkpoint has a position for each reader of the rows, as with --streaming": "检查点为每个读取进程各存一个位置"
    "（`--streaming`）",
    "the checkpoint has answers that were sampled in batches of this size, as in GRPO": "检查点里有按这个"
    "批大小采样的回答（GRPO）",
    "the optimizer's state is saved in one part per process, as by DeepSpeed and FSDP": "优化器状态按进程切分保存"
    "（DeepSpeed、FSDP）",
    "each process averages over its own tokens, as with --average_tokens_across_devices False": "每个进程"
    "只对自己的 token 求平均（`--average_tokens_across_devices False`）",
    "the learning rate follows the evaluations, as with reduce_lr_on_plateau and greedy": "学习率取决于评估结果"
    "（`reduce_lr_on_plateau`、`greedy`）",
    "the checkpoint has a best result, of the metric before": "检查点里已有按原指标记录的最好结果",
    # Ways out.
    WayOut.FROM_WEIGHTS.value: "从检查点的权重开始新的训练",
    WayOut.MERGED.value: "合并适配器后，从检查点的权重开始新的训练",
    WayOut.NEW_RUN.value: "开始新的训练",
}


def with_tables(page: str, language: str) -> str:
    """The text of a page with its tables as they are now."""
    return TABLES.sub(lambda place: place[1] + table(place[2], language) + place[3], page)


def table(place: str, language: str) -> str:
    """One of the tables, as Markdown."""
    groups = [group for group in TABLE if group.policy in SHOWN[place]]
    header = HEADERS[language][place]
    rows = [header, ("---",) * len(header), *(row(group, language)[: len(header)] for group in groups)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(group: Group, language: str) -> tuple[str, str, str]:
    """Flags, reason and way out."""
    comma = ", " if language == "en" else "、"
    names = comma.join(in_language(FACTS[name], language) if name in FACTS else f"`--{name}`" for name in group.names)
    reason = in_language(group.reason, language)
    for unless in group.unless:
        text = in_language(unless.reason, language)
        reason += f". Not if {text}" if language == "en" else f"。例外：{text}"
    return names, reason, in_language(group.way_out.value, language)


def in_language(text: str, language: str) -> str:
    """A text of the table in the language of a page.

    Raises:
        KeyError: it has no translation yet; add it to CHINESE.
    """
    return text if language == "en" else CHINESE[text]
