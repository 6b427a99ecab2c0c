"""The one language that a page speaks to a visitor: labels and messages in English and Chinese."""

from typing import Any

import gradio as gr

LANGUAGES = ("en", "zh")
# What components show. The browser chooses, see page.js.
LABELS = {
    "about": (
        "Answers come from a model in training. They may be wrong and do not replace a doctor.",
        "回答来自训练中的模型，可能有误，不能代替医生。",
    ),
    "about_feedback": (
        "Answers may be wrong and do not replace a doctor. A thumb stores the conversation, for training.",
        "回答可能有误，不能代替医生。点赞或点踩会保存对话，用于训练。",
    ),
    "chat": ("Conversation", "对话"),
    "question": ("Ask a question", "输入问题"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤回"),
    "clear": ("New chat", "新对话"),
    "export": ("Export", "导出"),
    "close": ("Close", "关闭"),
    "image": ("Image for the next question", "下一个问题的图片"),
    "settings": ("Settings", "设置"),
    "system_prompt": ("System prompt", "系统提示词"),
    "tools": ("Tools (JSON list)", "工具（JSON 列表）"),
    "thinking": ("Thinking", "思考模式"),
    "max_new_tokens": ("Max new tokens", "最大生成长度（token）"),
    "temperature": ("Temperature (0: greedy)", "温度（0：贪心解码）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k（0：全部）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (empty: random)", "随机种子（空：随机）"),
    "files": ("Files", "文件"),
    "add_files": ("Add files", "添加文件"),
    "remove_files": ("Remove my files", "移除我的文件"),
    "passage": ("Source", "出处"),
    "about_files": (
        "Answers may be wrong and do not replace a doctor. Check the cited passages.",
        "回答可能有误，不能代替医生，请核对引用的原文。",
    ),
}
# What the program says, `{...}` filled in.
MESSAGES = {
    "thoughts": ("Thinking", "思考过程"),
    "tool_call": ("Tool call: {name}", "工具调用：{name}"),
    "tool_result": ("Tool result", "工具返回结果"),
    "call_pending": (
        "The model calls {name}. Send what the tool returns as the next message.",
        "模型调用了 {name}。请把工具的返回结果作为下一条消息发送。",
    ),
    "cut": ("The answer was cut off after {count} tokens.", "回答在 {count} 个 token 处被截断。"),
    "no_answer": ("The model gave no answer.", "模型没有给出回答。"),
    "timeout": ("The answer took too long and was stopped.", "生成超时，已停止。"),
    "failed": ("The model failed; the program's log says why.", "模型出错，原因见程序日志。"),
    "queue_full": (
        "{waiting} requests wait already. Try again in a moment.",
        "已有 {waiting} 个请求在排队，请稍后再试。",
    ),
    "crowding": (
        "The queue is full, others wait, and you have most of its places. Ask for fewer answers at a time.",
        "队列已满，其他人在等，而队列里大多是你的请求。请一次少问几个。",
    ),
    "closing": ("The server is stopping and takes no new requests.", "服务正在停止，不再接受新请求。"),
    "model_failed": (
        "The model has failed and does not recover; the program's log says why.",
        "模型出错且无法恢复，原因见程序日志。",
    ),
    "feedback_kept": ("Recorded.", "已记录。"),
    "sources": ("Sources", "出处"),
    "sources_given": ("Sources given to the model; the answer cites none", "提供给模型的出处（回答未引用）"),
    "invented": ("[?]: the answer cites {marks}, which is not a source.", "[?]：回答引用了 {marks}，并无此出处。"),
    "unsupported": ("Not found in {marks}: “{text}” ({missing})", "{marks} 原文中没有找到：“{text}”（{missing}）"),
    "empty": ("Ask about health, tests or medicines", "可以询问健康、检查和用药问题"),
    "empty_files": ("Add files and ask about them", "添加文件，然后提问"),
}
LABEL = gr.I18n(
    **{language: {name: both[at] for name, both in LABELS.items()} for at, language in enumerate(LANGUAGES)}
)


def text_in(language: str, name: str, /, **values: Any) -> str:
    """One of MESSAGES."""
    return MESSAGES[name][LANGUAGES.index(language)].format(**values)


def language_from(accept_language: str, forced: str = "auto") -> str:
    """The language of a visitor.

    Args:
        accept_language: the browser's header, such as "fr, zh-CN;q=0.9, en;q=0.8".
        forced: --lang.

    Returns:
        The first of LANGUAGES among the browser's, in their order of preference; "en" if it is none of them.
    """
    if forced != "auto":
        return forced
    ranked = []
    for part in accept_language.split(","):
        tag, _, quality = part.partition(";q=")
        try:
            ranked.append((-float(quality or 1), tag.strip()[:2].lower()))
        except ValueError:
            continue
    return next((tag for _, tag in sorted(ranked, key=lambda pair: pair[0]) if tag in LANGUAGES), "en")


def language_of(visitor: gr.Request, forced: str) -> str:
    """The language of the visitor who sends this request."""
    return language_from(visitor.headers.get("accept-language", ""), forced)
