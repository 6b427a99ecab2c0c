"""Named chat templates, and the one function that installs them in a tokenizer.

Text is rendered only by `tokenizer.apply_chat_template`, in training and in serving. This file contains the Jinja
sources. Each has `{% generation %}` markers around exactly the assistant's text and the token that ends its turn, so
the loss mask does not depend on finding the answers in the token ids.

    from medicalgpt.models.templating import stop_token_ids
    from template import apply_template

    stop = apply_template(tokenizer, "qwen")                # or no name: the tokenizer's own template
    model.generation_config.eos_token_id = stop_token_ids(tokenizer, stop)

All templates support the roles system, user, assistant and tool, `tools=`, `message.tool_calls` in OpenAI's format
(arguments as a dict or a JSON string) and `add_generation_prompt`. Contents are strings. What a template cannot render
(an unknown role, content in parts, reasoning in a family without it) raises an error and is never dropped.

To add a template, add one entry to `TEMPLATES`. A family that writes each turn as header + content + closing needs one
call of `_turns`; others have their own Jinja. `{% generation %}` must be outside macros: only there can transformers
locate it in the text.
"""

import copy
import difflib

from medicalgpt.models.templating import (
    BOS,
    EOS,
    REFUSALS,
    REFUSE_TOOLS,
    Template,
    TemplateError,
    fill,
    get_tool_format,
    install_template,
    render_text,
    usable_templates,
)
from medicalgpt.models.tool_formats import TOOL_FORMATS

from transformers import PreTrainedTokenizerBase

_CHECK = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('message ' ~ loop.index ~ ' has the unknown role "' ~ message.role
            ~ '": use system, user, assistant or tool') }}
    {%- endif %}
    {%- if message.content is not string and (message.content or not message.tool_calls) %}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ message.role
            ~ ') has no content, or content that is not a string') }}
    {%- endif %}
{%- endfor %}
"""

_NO_REASONING = """\
{%- for message in messages %}
    {%- if message.reasoning_content %}
        {{- raise_exception('message ' ~ loop.index ~ ' has reasoning_content, which this template cannot render: '
            ~ 'use the template qwen3, or write the reasoning into content') }}
    {%- endif %}
{%- endfor %}
"""

# Consecutive tool results share one user turn.
_RESULT_OPEN = r"""
{{- $user_open if loop.first or loop.previtem.role != 'tool' else '\n' }}
"""
_RESULT_CLOSE = r"""
{{- $user_close if loop.last or loop.nextitem.role != 'tool' }}
"""

# The tool format of Qwen2.5 and Qwen3, for the Jinja of these families.
_TOOL_LIST = TOOL_FORMATS["qwen"].tool_list
_TOOL_CALLS = TOOL_FORMATS["qwen"].calls
_TOOL_RESULT = _RESULT_OPEN + TOOL_FORMATS["qwen"].result + _RESULT_CLOSE

_REFUSE_SYSTEM = r"""
{%- for message in messages if message.role == 'system' and message.content %}
    {{- raise_exception('there is a system message, for which this template has no place: '
        ~ 'put its text into the first user message') }}
{%- endfor %}
"""

# `tool_list`, `tool_calls` and `tool_result` are macros of a tool format, which are put before this text.
_TURNS = (
    _CHECK
    + _NO_REASONING
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else $default_system %}
{%- set head %}
    {%- if tools or system or (system is not none and $system_open) %}
        {{- $system_open }}{{- system or '' }}
        {%- if tools %}
            {{- '\n\n' if system is not none }}{{- tool_list(tools) }}
        {%- endif %}
        {{- $system_close }}
    {%- endif %}
{%- endset %}
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- if $fold and head and (messages | length == first or messages[first].role != 'user') %}
    {{- raise_exception('message ' ~ (first + 1)
        ~ ' is not of the user: this template puts system text and tools into the first user message') }}
{%- endif %}
{{- $prefix }}{{- head if not $fold }}
{%- set count = namespace(round=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {%- if not $system_open or $fold %}
            {{- raise_exception('message ' ~ loop.index
                ~ ' is a system message: this template takes one only as the first') }}
        {%- endif %}
        {{- $system_open ~ message.content ~ $system_close }}
    {%- elif message.role == 'user' %}
        {%- set count.round = count.round + 1 %}
        {{- $user_open }}{{- head if $fold and loop.index0 == first }}
        {{- message.content | trim if $trim else message.content }}{{- $user_close }}
    {%- elif message.role == 'tool' %}"""
    + _RESULT_OPEN
    + "{{- tool_result(message) }}"
    + _RESULT_CLOSE
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '').removeprefix($lead).removesuffix($trail) %}
        {%- set content = content | trim if $trim else content %}
        {{- $assistant_open }}
        {%- generation %}
            {{- $lead }}{{- content }}{{- tool_calls(message, content, loop.index) }}{{- $trail }}
            {{- $end if loop.last or $end_in_history }}
        {%- endgeneration %}
        {{- $assistant_close if not loop.last or $end_in_history }}
    {%- endif %}
{%- endfor %}
{{- $assistant_open if add_generation_prompt else $tail }}
"""
)


def _turns(
    user: tuple[str, str],
    assistant: tuple[str, str],
    end: str = EOS,
    system: tuple[str, str] | None = ("", ""),
    default_system: str | None = None,
    lead: str = "",
    tool_format: str | None = "default",
    *,
    prefix: str = "",
    trail: str = "",
    tail: str = "",
    fold: bool = False,
    trim: bool = False,
    end_in_history: bool = True,
) -> str:
    """Jinja for a family that writes each turn as a header and a closing around its content: (header, closing).

    `end` is the turn end, `assistant[1]` what follows it, outside the supervised span. `lead` comes between the header
    and the text of the assistant and belongs to the span: a space, as tokenizers merge it with the first word. `system`
    with an empty header allows a system message only as the first one. `tool_format` is the family's own tool format,
    in the system text and in user turns; with None tools are refused.

    `prefix` begins the text. `trail` comes between the text and the turn end of the assistant, in the span as well.
    `tail` ends a text that is not a prompt. `fold` puts system text and tools at the start of the first user message;
    with `system` None a system message is refused. `trim` strips whitespace from contents. Without `end_in_history`
    only the last turn has its end, as some families write none between turns. `user[0]` may count turns with "{round}".
    """
    jinja = _TURNS if system else _REFUSE_SYSTEM + _TURNS
    system = system or ("", "")
    if tool_format is None:
        tools = "{%- macro tool_calls(message, content, number) %}{%- endmacro %}\n"
        tools += fill(REFUSE_TOOLS, reason="this template has no place for tools")
    else:
        tools = TOOL_FORMATS[tool_format].macros
    return tools + fill(
        jinja,
        system_open=system[0],
        system_close=system[1],
        default_system=default_system,
        user_open=user[0],
        user_close=user[1],
        assistant_open=assistant[0],
        assistant_close=assistant[1],
        lead=lead,
        end=end,
        prefix=prefix,
        trail=trail,
        tail=tail,
        fold=fold,
        trim=trim,
        end_in_history=end_in_history,
    )


_CHATML = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "assistant": ("<|im_start|>assistant\n", "\n"),
    "end": "<|im_end|>",
    "tool_format": "qwen",
}

# Reasoning is rendered only after the last question of the user; the last turn always has a think block, which may be
# empty. It belongs to the supervised span, except an empty one with enable_thinking=False, which is in the prompt.
_QWEN3 = fill(
    _CHECK
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools or system is not none %}
    {{- '<|im_start|>system\n' }}{{- system or '' }}
    {%- if tools %}
        {{- '\n\n' if system is not none }}"""
    + _TOOL_LIST
    + r"""
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set no_thinking = enable_thinking is defined and enable_thinking is false %}
{%- set question = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- set result = message.role == 'user' and message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not result %}
        {%- set question.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}"""
    + _TOOL_RESULT
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set thinks = loop.index0 > question.last and (loop.last or reasoning) %}
        {%- set prefilled = thinks and no_thinking and not reasoning %}
        {{- '<|im_start|>assistant\n' }}
        {{- '<think>\n\n</think>\n\n' if prefilled }}
        {%- generation %}
            {{- '<think>\n' ~ reasoning.strip('\n') ~ '\n</think>\n\n' if thinks and not prefilled }}
            {{- content.lstrip('\n') if thinks else content }}"""
    + _TOOL_CALLS
    + r"""
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if no_thinking }}
{%- endif %}
""",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
)

# Llama 3, with the tool format of Llama 3.1 (custom tools as JSON in the first user message). The lines of 3.1 with the
# date are always omitted: text that changes from day to day cannot be the same in training and in serving.
_LLAMA3 = (
    _CHECK
    + _NO_REASONING
    + r"""
{{- bos_token }}
{%- set shown = namespace(tools=not tools) %}
{%- if tools and messages[0].role != 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = (message.content or '') | trim %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- set number = loop.index %}
        {%- generation %}
            {{- content }}"""
    + TOOL_FORMATS["llama3"].calls
    + r"""
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ message.content | tojson ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}
        {{- 'Environment: ipython\n' if tools and loop.first and message.role == 'system' }}
        {%- if message.role == 'user' and not shown.tools %}
            """
    + TOOL_FORMATS["llama3"].tool_list
    + r"""
            {{- '\n\n' }}
            {%- set shown.tools = true %}
        {%- endif %}
        {{- content ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if not shown.tools %}
    {{- raise_exception('tools were given, but no user message, which is where Llama 3 reads them') }}
{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}
"""
)

_LLAMA2 = {
    "system": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
    "user": (BOS + "[INST] ", " [/INST]"),
    "assistant": ("", ""),
    "lead": " ",
    "trail": " ",
    "fold": True,
    "trim": True,
}

_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

# Qwen3.5: tools as XML, contents stripped of whitespace, and a prompt that opens the think block or contains an empty
# one. So the opening of a think block belongs to the prompt, and an empty block does so completely.
_QWEN3_5 = (
    _CHECK
    + r"""
{%- set system = messages[0].content | trim if messages[0].role == 'system' else none %}
{%- if tools or system is not none %}
    {{- '<|im_start|>system\n' }}
    {%- if tools %}"""
    + TOOL_FORMATS["qwen3_5"].tool_list
    + r"""
        {{- '\n\n' ~ system if system }}
    {%- else %}
        {{- system }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set question = namespace(last=none) %}
{%- for message in messages %}
    {%- set content = (message.content or '') | trim %}
    {%- set result = content.startswith('<tool_response>') and content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not result %}
        {%- set question.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if question.last is none %}
    {{- raise_exception('there is no user message, and Qwen3.5 needs one') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = (message.content or '') | trim %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('message ' ~ loop.index
            ~ ' is a system message: this template takes one only as the first') }}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' ~ content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}"""
    + _RESULT_OPEN
    + TOOL_FORMATS["qwen3_5"].result
    + _RESULT_CLOSE
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content | trim %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set thinks = loop.index0 > question.last %}
        {{- '<|im_start|>assistant\n' }}
        {{- '<think>\n' if thinks }}
        {{- '\n</think>\n\n' if thinks and not reasoning }}
        {%- generation %}
            {{- reasoning ~ '\n</think>\n\n' if thinks and reasoning }}
            {{- content }}"""
    + TOOL_FORMATS["qwen3_5"].calls
    + r"""
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {{- '\n</think>\n\n' if not (enable_thinking if enable_thinking is boolean else $thinks) }}
{%- endif %}
"""
)


def _qwen3_5(thinks: bool) -> str:
    return fill(_QWEN3_5, user_open="<|im_start|>user\n", user_close="<|im_end|>\n", thinks=thinks)


# GLM ends a turn with the token that opens the next one: the model generates it and stops there.
_GLM = (
    _CHECK
    + _NO_REASONING
    + r"""
{{- $prefix }}
{%- if tools %}
    {{- '<|system|>' ~ $line ~ '你是一个名为 ChatGLM 的人工智能助手。' }}
    {{- '你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n' }}"""
    + TOOL_FORMATS["glm4"].tool_list
    + r"""
{%- endif %}
{%- for message in messages %}
    {%- set answered = not loop.first and loop.previtem.role == 'assistant' %}
    {%- if message.role == 'assistant' %}
        {%- set content = (message.content or '').removeprefix($line) %}
        {%- set number = loop.index %}
        {%- set next = ('tool' if message.tool_calls else 'user') if loop.last else loop.nextitem.role %}
        {%- if next not in ['user', 'tool'] %}
            {{- raise_exception('message ' ~ number ~ ' (assistant) is followed by ' ~ next
                ~ ': GLM ends a turn with the mark of the user or of a tool') }}
        {%- endif %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- $line ~ content if content or not message.tool_calls }}"""
    + TOOL_FORMATS["glm4"].calls
    + r"""
            {{- '<|user|>' if next == 'user' else '<|observation|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|observation|>' if not answered }}{{- $line ~ message.content }}
    {%- elif message.role == 'user' %}
        {{- '<|user|>' if not answered }}{{- $line ~ message.content }}
    {%- else %}
        {{- '<|system|>' ~ $line ~ message.content }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}
"""
)

# ChatGLM-6B: rounds are numbered if there are several, and only the last answer has its special tokens.
_CHATGLM = (
    _CHECK
    + _NO_REASONING
    + _REFUSE_SYSTEM
    + fill(REFUSE_TOOLS, reason="this template has no place for tools")
    + r"""
{%- set rounds = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set count = namespace(round=0) %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant have to take turns in this template') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[Round ' ~ count.round ~ ']\n问：' if rounds > 1 }}{{- message.content }}{{- '\n答：' if rounds > 1 }}
        {%- set count.round = count.round + 1 %}
    {%- else %}
        {{- '[gMASK]<sop>' if loop.last }}
        {%- generation %}
            {{- message.content }}
            {{- '<eop>' if loop.last }}
        {%- endgeneration %}
        {{- '\n' if not loop.last }}
    {%- endif %}
{%- endfor %}
{{- '[gMASK]<sop>' if add_generation_prompt }}
"""
)

# Mistral 7B v0.3: system text and tools are at the last user message, where the published template has them in prompts.
# It drops the system text of a conversation that ends with an answer, and text next to a call; this one keeps both.
_MISTRAL = (
    _CHECK
    + _NO_REASONING
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set question = namespace(last=none) %}
{%- for message in messages if message.role == 'user' %}
    {%- set question.last = loop.index %}
{%- endfor %}
{%- if (tools or system) and question.last is none %}
    {{- raise_exception('there is no user message, which is where Mistral reads system text and tools') }}
{%- endif %}
{{- bos_token }}
{%- set count = namespace(user=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('message ' ~ loop.index
            ~ ' is a system message: this template takes one only as the first') }}
    {%- elif message.role == 'user' %}
        {%- set count.user = count.user + 1 %}
        {%- if count.user == question.last and tools %}"""
    + TOOL_FORMATS["mistral"].tool_list
    + r"""
        {%- endif %}
        {{- '[INST] ' }}{{- system ~ '\n\n' if system and count.user == question.last }}
        {{- message.content ~ '[/INST]' }}
    {%- elif message.role == 'tool' %}"""
    + TOOL_FORMATS["mistral"].result
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '') | trim %}
        {%- generation %}
            {{- ' ' ~ content if content or not message.tool_calls }}"""
    + TOOL_FORMATS["mistral"].calls
    + r"""
            {{- eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
)

# DeepSeek-V3. The published template has no list of tools, and removes the reasoning from the last turn as well.
_DEEPSEEK3 = (
    _CHECK
    + r"""
{{- bos_token }}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') %}
{{- system }}
{%- if tools %}
    {{- '\n\n' if system }}"""
    + TOOL_FORMATS["deepseek3"].tool_list
    + r"""
{%- endif %}
{%- set question = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set question.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' ~ message.content }}
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁outputs▁begin｜>' if loop.first or loop.previtem.role != 'tool' }}"""
    + TOOL_FORMATS["deepseek3"].result
    + r"""
        {{- '<｜tool▁outputs▁end｜>' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set thinks = loop.index0 > question.last %}
        {{- '<｜Assistant｜>' if loop.first or loop.previtem.role != 'tool' }}
        {%- generation %}
            {{- '<think>\n' ~ message.reasoning_content.strip('\n') ~ '\n</think>\n\n'
                if thinks and message.reasoning_content }}
            {{- content if thinks else content.split('</think>')[-1] }}"""
    + TOOL_FORMATS["deepseek3"].calls
    + r"""
            {{- '<｜end▁of▁sentence｜>' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{{- '<｜Assistant｜>' if add_generation_prompt and messages[-1].role != 'tool' }}
"""
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="chatml",
            jinja=_turns(**_CHATML),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="qwen",
            jinja=_turns(
                **_CHATML,
                default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            ),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="qwen3",
            jinja=_QWEN3,
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen3-8B/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
            tool_format="qwen",
        ),
        Template(
            name="llama3",
            jinja=_LLAMA3,
            stop=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
            source="https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1",
            tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            tool_format="llama3",
        ),
        Template(
            name="vicuna",
            jinja=_turns(
                system=("", " "),
                user=("USER: ", " "),
                assistant=("ASSISTANT:", ""),
                lead=" ",
                default_system=(
                    "A chat between a curious user and an artificial intelligence assistant. "
                    "The assistant gives helpful, detailed, and polite answers to the user's questions."
                ),
            ),
            stop=(EOS,),
            source="https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md",
        ),
        # Published for a single turn; further turns repeat the two blocks. The line break after "### Response:" is from
        # Alpaca-LoRA and MedicalGPT: without it tokenizers may merge the colon with the first word of the answer.
        Template(
            name="alpaca",
            jinja=_turns(
                system=("", "\n\n"),
                user=("### Instruction:\n", "\n\n"),
                assistant=("### Response:\n", "\n\n"),
                default_system=(
                    "Below is an instruction that describes a task. "
                    "Write a response that appropriately completes the request."
                ),
            ),
            stop=(EOS,),
            source="https://github.com/tatsu-lab/stanford_alpaca#data-release",
        ),
        # No roles: question, line break, answer. The line break keeps tokens from spanning question and answer.
        Template(
            name="base",
            jinja=_turns(system=("", "\n\n"), user=("", "\n"), assistant=("", "")),
            stop=(EOS,),
            source="https://github.com/shibing624/MedicalGPT/blob/main/template.py",
        ),
        Template(
            name="mistral",
            jinja=_MISTRAL,
            stop=(EOS,),
            source="https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3/blob/main/tokenizer_config.json",
            tool_format="mistral",
        ),
        Template(
            name="glm4",
            jinja=fill(_GLM, prefix="[gMASK]<sop>", line="\n"),
            stop=("<|user|>", "<|observation|>", "<|endoftext|>"),
            source="https://huggingface.co/THUDM/glm-4-9b-chat/blob/main/tokenizer_config.json",
            tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
            tool_format="glm4",
        ),
        # Gemma 1 and 2 refuse a system message; Gemma 3 puts it in the first user message.
        Template(
            name="gemma",
            jinja=_turns(
                prefix=BOS,
                system=("", "\n\n"),
                user=("<start_of_turn>user\n", "<end_of_turn>\n"),
                assistant=("<start_of_turn>model\n", "\n"),
                end="<end_of_turn>",
                fold=True,
                trim=True,
            ),
            stop=("<end_of_turn>", "<eos>"),
            source="https://huggingface.co/google/gemma-3-1b-it/blob/main/tokenizer_config.json",
            tokens=("<start_of_turn>", "<end_of_turn>"),
        ),
        Template(
            name="phi3",
            jinja=_turns(
                system=("<|system|>\n", "<|end|>\n"),
                user=("<|user|>\n", "<|end|>\n"),
                assistant=("<|assistant|>\n", "\n"),
                end="<|end|>",
                tail="<|endoftext|>",
            ),
            stop=("<|end|>", "<|endoftext|>"),
            source="https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/tokenizer_config.json",
            tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        ),
        Template(
            name="llama2",
            jinja=_turns(**_LLAMA2),
            stop=(EOS,),
            source="https://huggingface.co/meta-llama/Llama-2-7b-chat-hf/blob/main/tokenizer_config.json",
        ),
        Template(
            name="llama2-zh",
            jinja=_turns(**_LLAMA2, default_system="You are a helpful assistant. 你是一个乐于助人的助手。"),
            stop=(EOS,),
            source="https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/blob/main/scripts/inference/inference_hf.py",
        ),
        Template(
            name="deepseek3",
            jinja=_DEEPSEEK3,
            stop=("<｜end▁of▁sentence｜>",),
            source="https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/tokenizer_config.json",
            tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
            tool_format="deepseek3",
        ),
        Template(
            name="qwen3_nothink",
            jinja=_turns(**_CHATML),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen3-4B-Instruct-2507/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="qwen3_5",
            jinja=_qwen3_5(thinks=True),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen3.5-4B/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
            tool_format="qwen3_5",
        ),
        Template(
            name="qwen3_5_nothink",
            jinja=_qwen3_5(thinks=False),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen3.5-2B/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
            tool_format="qwen3_5",
        ),
        Template(
            name="qwen2_vl",
            jinja=_turns(**_CHATML, default_system="You are a helpful assistant."),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/chat_template.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="baichuan",
            jinja=_turns(system=None, user=("<reserved_102>", ""), assistant=("<reserved_103>", ""), tool_format=None),
            stop=(EOS,),
            source="https://huggingface.co/baichuan-inc/Baichuan-13B-Chat/blob/main/modeling_baichuan.py",
            tokens=("<reserved_102>", "<reserved_103>"),
        ),
        Template(
            name="baichuan2",
            jinja=_turns(user=("<reserved_106>", ""), assistant=("<reserved_107>", ""), end_in_history=False),
            stop=(EOS,),
            source="https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat/blob/main/generation_utils.py",
            tokens=("<reserved_106>", "<reserved_107>"),
        ),
        Template(
            name="ziya",
            jinja=_turns(system=None, user=("<human>:", "\n"), assistant=("<bot>:", "\n"), tool_format=None),
            stop=(EOS,),
            source="https://huggingface.co/IDEA-CCNL/Ziya-LLaMA-13B-v1/blob/main/README.md",
        ),
        Template(
            name="linly",
            jinja=_turns(system=("", "\n"), user=("User: ", "\n"), assistant=("Bot:", "\n"), lead=" "),
            stop=(EOS,),
            source="https://github.com/CVI-SZU/Linly",
        ),
        Template(
            name="chatglm",
            jinja=_CHATGLM,
            stop=("<eop>",),
            source="https://huggingface.co/THUDM/chatglm-6b/blob/main/modeling_chatglm.py",
            tokens=("[gMASK]", "<sop>", "<eop>"),
        ),
        Template(
            name="chatglm2",
            jinja=_turns(
                prefix="[gMASK]sop",
                system=None,
                user=("[Round {round}]\n\n问：", "\n\n"),
                assistant=("答：", "\n\n"),
                end_in_history=False,
                tool_format=None,
            ),
            stop=(EOS,),
            source="https://huggingface.co/THUDM/chatglm2-6b/blob/main/tokenization_chatglm.py",
            tokens=("[gMASK]", "sop"),
        ),
        Template(
            name="chatglm3",
            jinja=fill(REFUSE_TOOLS, reason="this template has no place for tools")
            + fill(_GLM, prefix="[gMASK]sop", line="\n "),
            stop=("<|user|>", "<|observation|>", "</s>"),
            source="https://huggingface.co/THUDM/chatglm3-6b/blob/main/tokenizer_config.json",
            tokens=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
        ),
        Template(
            name="phoenix",
            jinja=_turns(
                system=("", ""),
                user=("Human: <s>", "</s>"),
                assistant=("Assistant: <s>", ""),
                end="</s>",
                default_system=_HUMAN + "\n\n",
            ),
            stop=("</s>",),
            source="https://github.com/FreedomIntelligence/LLMZoo/blob/main/llmzoo/deploy/cli.py",
            tokens=("<s>", "</s>"),
        ),
        Template(
            name="belle",
            jinja=_turns(system=("", "\n\n"), user=("Human: ", "\n\n"), assistant=("Belle:", "\n\n"), lead=" "),
            stop=(EOS,),
            source="https://huggingface.co/BelleGroup/BELLE-LLaMA-EXT-13B",
        ),
        # Earlier answers end with "###" only; the last one ends with the EOS that the model learns.
        Template(
            name="aquila",
            jinja=_turns(
                system=("", "###"),
                user=("Human: ", "###"),
                assistant=("Assistant:", "###"),
                lead=" ",
                default_system=_HUMAN,
                end_in_history=False,
            ),
            stop=(EOS,),
            source="https://github.com/FlagAI-Open/FlagAI/blob/master/examples/Aquila/Aquila-chat/cyg_conversation.py",
        ),
        Template(
            name="intern",
            jinja=_turns(
                prefix=BOS,
                system=None,
                user=("<|User|>:", "<eoh>\n"),
                assistant=("<|Bot|>:", "\n"),
                end="<eoa>",
                tool_format=None,
            ),
            stop=("<eoa>", "</s>"),
            source="https://huggingface.co/internlm/internlm-chat-7b/blob/main/modeling_internlm.py",
            tokens=("<eoh>", "<eoa>"),
        ),
        Template(
            name="intern2",
            jinja=_turns(**_CHATML, prefix=BOS),
            stop=("<|im_end|>", "</s>"),
            source="https://huggingface.co/internlm/internlm2-chat-7b/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        # In the published prompts the model generates the line break after the assistant's header.
        Template(
            name="starchat",
            jinja=_turns(
                system=("<|system|>\n", "<|end|>\n"),
                user=("<|user|>\n", "<|end|>\n"),
                assistant=("<|assistant|>", "\n"),
                end="<|end|>",
                lead="\n",
                default_system="",
            ),
            stop=("<|end|>", "<|endoftext|>"),
            source="https://github.com/bigcode-project/starcoder/blob/main/chat/dialogues.py",
            tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ),
        Template(
            name="xverse",
            jinja=_turns(
                system=None, user=("Human: ", "\n\n"), assistant=("Assistant:", ""), lead=" ", tool_format=None
            ),
            stop=(EOS,),
            source="https://huggingface.co/xverse/XVERSE-13B-Chat/blob/main/modeling_xverse.py",
        ),
        Template(
            name="deepseek",
            jinja=_turns(
                prefix=BOS, system=("", "\n\n"), user=("User: ", "\n\n"), assistant=("Assistant:", ""), lead=" "
            ),
            stop=(EOS,),
            source="https://huggingface.co/deepseek-ai/deepseek-llm-7b-chat/blob/main/tokenizer_config.json",
        ),
        Template(
            name="deepseekcoder",
            jinja=_turns(
                prefix=BOS,
                user=("### Instruction:\n", "\n"),
                assistant=("### Response:\n", "\n"),
                end="<|EOT|>",
                trail="\n",
                default_system=(
                    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek "
                    "Company, and you only answer questions related to computer science. For politically sensitive "
                    "questions, security and privacy issues, and other non-computer science questions, "
                    "you will refuse to answer\n"
                ),
            ),
            stop=("<|EOT|>",),
            source="https://huggingface.co/deepseek-ai/deepseek-coder-6.7b-instruct/blob/main/tokenizer_config.json",
            tokens=("<|EOT|>",),
        ),
        Template(
            name="yi",
            jinja=_turns(**_CHATML),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/01-ai/Yi-34B-Chat/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        # The model begins its answer after the EOS that follows "Assistant: ".
        Template(
            name="orion",
            jinja=_turns(
                prefix=BOS,
                system=None,
                user=("Human: ", "\n\nAssistant: " + EOS),
                assistant=("", ""),
                tool_format=None,
            ),
            stop=(EOS,),
            source="https://huggingface.co/OrionStarAI/Orion-14B-Chat/blob/main/tokenizer_config.json",
        ),
        Template(
            name="cohere",
            jinja=_turns(
                prefix=BOS,
                system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
                user=("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
                assistant=("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", ""),
                end="<|END_OF_TURN_TOKEN|>",
                trim=True,
            ),
            stop=("<|END_OF_TURN_TOKEN|>",),
            source="https://huggingface.co/CohereLabs/aya-expanse-8b/blob/main/tokenizer_config.json",
            tokens=(
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
            ),
        ),
    )
}


def get_template(name: str) -> Template:
    """The template called `name`. Raises TemplateError, with the most similar names, if there is none."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name.lower(), TEMPLATES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(TEMPLATES)}"
    raise TemplateError(f"there is no chat template called {name!r}: {hint}")


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    system_prompt: str | None = None,
    tool_format: str | None = None,
) -> tuple[str, ...]:
    """Install a chat template in `tokenizer`, check it, and return the stop strings, the turn end first.

    name: one of `TEMPLATES`. None takes the tokenizer's own template, which is kept if it has generation markers and
        otherwise replaced by the shipped one that renders the same text.
    system_prompt: the default for conversations without a system message; it replaces a family's own default. It
        becomes part of the template and is saved with it, until another one is given. None and "" keep the default
        (for qwen, Qwen's own sentence); for no system text at all, pass a system message with empty content.
    tool_format: one of `medicalgpt.models.tool_formats.TOOL_FORMATS`, instead of the template's own tool format. It
        becomes part of the template, until another format or another template is given.

    Sets `tokenizer.chat_template`, and `tokenizer.eos_token` to the turn end. The text begins with one BOS if the
    tokenizer puts one before plain text, and with none otherwise. Only a tokenizer's own template may write one if the
    tokenizer does not: some chat models were published like this. Applying a template twice changes nothing.

    Raises TemplateError, and leaves the tokenizer unchanged, if the name is unknown, the vocabulary lacks tokens, the
    tokenizer's own template is missing or not recognised, it does not support other tool formats, or training on it
    would go wrong.
    """
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{type(tokenizer).__name__} gives no token offsets, which the loss mask needs: use a fast tokenizer"
        )
    if tool_format is not None:
        get_tool_format(tool_format)
    previous = tokenizer.chat_template, tokenizer.eos_token
    try:
        template = None if name is None else get_template(name)
        return install_template(tokenizer, template, TEMPLATES, system_prompt, tool_format)
    except REFUSALS as error:
        tokenizer.chat_template, tokenizer.eos_token = previous
        if name is None and previous[0]:
            names = usable_templates(tokenizer, TEMPLATES)
            error = f"the tokenizer's own chat template cannot be used: {error}\nUse --template_name: {names}"
        raise TemplateError(str(error)) from None


def check_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Check that a tokenizer's own template is the named one, which front ends do not install.

    Raises TemplateError if it renders a conversation differently.
    """
    if name is None:
        return
    named = copy.deepcopy(tokenizer)
    apply_template(named, name)
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    # Without a system message, a default that training has saved in the template would make a difference.
    for system in ([{"role": "system", "content": "system"}], []):
        texts = [
            render_text(each, [*system, question, answer, question], add_generation_prompt=True)
            for each in (named, tokenizer)
        ]
        if texts[0] is not None and texts[0] == texts[1]:
            return
    raise TemplateError(
        f"--template_name {name} is not the chat template saved with the model. Omit it to use the model's own; "
        "supervised_finetuning.py installs another one."
    )
