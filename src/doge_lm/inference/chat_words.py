"""What `doge-lm chat` says in its own words, in English and Chinese: one table."""

import locale
import os
from collections.abc import Mapping

from ..errors import UserError

LANGUAGES = ("en", "zh")

TEXTS: Mapping[str, Mapping[str, str]] = {
    "banner": {
        "en": "{model}: {parameters:,} parameters, {device}, {dtype}, {positions} positions.\n"
        "/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves.",
        "zh": "{model}：{parameters:,} 个参数，{device}，{dtype}，{positions} 个位置。\n"
        "/help 列出命令，Ctrl-C 停止回答，/exit 或 Ctrl-D 退出。",
    },
    "no_limit": {"en": "any number of", "zh": "不限数目的"},
    # ------------------------------------------------------------------------------------------------- /help
    "help_head": {"en": "Type a message and Enter. Commands:", "zh": "输入一条消息，按回车发送。命令："},
    "help_help": {"en": "this list", "zh": "显示这个列表"},
    "help_system": {
        "en": 'show the system prompt, or set it; /system "" removes it',
        "zh": '显示或设置系统提示词；/system "" 删除它',
    },
    "help_set": {
        "en": "show the settings, or change one of: {names}",
        "zh": "显示设置，或更改其中之一：{names}",
    },
    "help_retry": {"en": "answer the last question again", "zh": "重新回答上一个问题"},
    "help_undo": {"en": "take back the last question and its answer", "zh": "撤回上一个问题及其回答"},
    "help_reset": {
        "en": "begin a new conversation; the system prompt stays",
        "zh": "开始新的对话；保留系统提示词",
    },
    "help_save": {
        "en": "save the conversation as a line of JSON (.jsonl); --overwrite replaces a file",
        "zh": "把对话存为一行 JSON（.jsonl）；--overwrite 替换已有的文件",
    },
    "help_load": {
        "en": "go on with the first conversation of a file",
        "zh": "读入文件中的第一个对话，接着谈",
    },
    "help_exit": {"en": "leave", "zh": "退出"},
    "help_tail": {
        "en": 'Several lines: end each but the last in \\, or put """ before the first and after the last.\n'
        "A message that begins with / is sent with // in front.",
        "zh": '多行消息：除最后一行外，每行以 \\ 结尾；或在开头和结尾各写 """。\n以 / 开头的消息，请写成以 // 开头。',
    },
    # ------------------------------------------------------------------------------------------------- notices
    "left_out": {
        "en": "(The conversation outgrew the {limit} positions; the model no longer sees its beginning. Questions left "
        "out with their answers: {count}.)",
        "zh": "（对话超出了 {limit} 个位置，模型不再看到它的开头。省去的问题及其回答：{count} 个。）",
    },
    "stopped": {"en": "(Stopped; what was said is kept.)", "zh": "（已停止；已经说出的部分会保留。）"},
    "stopped_empty": {
        "en": "(Stopped before a word was said; the question is not kept.)",
        "zh": "（还没有说出一个字就停止了；这个问题不保留。）",
    },
    "cut_off": {
        "en": "(Stopped after max_new_tokens, {tokens} tokens; /set max_new_tokens changes that.)",
        "zh": "（达到 max_new_tokens，即 {tokens} 个词元，已停止；可用 /set max_new_tokens 更改。）",
    },
    "empty_answer": {"en": "(The answer is empty.)", "zh": "（回答是空的。）"},
    "interrupt_hint": {
        "en": "(Ctrl-C once more, /exit or Ctrl-D leaves.)",
        "zh": "（再按一次 Ctrl-C，或用 /exit、Ctrl-D 退出。）",
    },
    "message_dropped": {"en": "(The unfinished message is dropped.)", "zh": "（未写完的消息已丢弃。）"},
    "system_now": {"en": "System prompt:\n{text}", "zh": "系统提示词：\n{text}"},
    "system_none": {"en": "There is no system prompt.", "zh": "没有系统提示词。"},
    "system_set": {
        "en": "The system prompt is set; it holds from the next answer on, for the whole conversation.",
        "zh": "系统提示词已设置；从下一个回答起，对整个对话生效。",
    },
    "system_removed": {"en": "The system prompt is removed.", "zh": "系统提示词已删除。"},
    "setting": {"en": "{name} = {value}", "zh": "{name} = {value}"},
    "value_none": {"en": "none", "zh": "none"},
    "same_answer": {
        "en": "(temperature is 0: the likeliest answer is always the same.)",
        "zh": "（temperature 为 0：最可能的回答总是相同的。）",
    },
    "undone": {"en": "Taken back: {question}", "zh": "已撤回：{question}"},
    "reset": {"en": "A new conversation begins.", "zh": "新的对话开始了。"},
    "saved": {"en": "Saved: {path}", "zh": "已保存：{path}"},
    "loaded": {
        "en": "Loaded; questions with their answers: {count}. The last:\n{question}\n{answer}",
        "zh": "已读入 {count} 个问题及其回答。最后一个：\n{question}\n{answer}",
    },
    # ------------------------------------------------------------------------------------------------- refusals
    "unknown_command": {
        "en": "There is no command /{name}; did you mean /{nearest}? To send it as a message, begin it with //.",
        "zh": "没有命令 /{name}；您是想用 /{nearest} 吗？要把它作为消息发送，请以 // 开头。",
    },
    "no_argument": {"en": "/{name} takes nothing behind it.", "zh": "/{name} 后面不能有内容。"},
    "no_file_name": {
        "en": "Name a file: /{name} FILE.jsonl",
        "zh": "请给出文件名：/{name} 文件.jsonl",
    },
    "unknown_setting": {
        "en": "There is no setting {name}; did you mean {nearest}?",
        "zh": "没有设置 {name}；您是想用 {nearest} 吗？",
    },
    "bad_max_new_tokens": {
        "en": "max_new_tokens cannot be {value}: it must be a whole number of at least 1.",
        "zh": "max_new_tokens 不能是 {value}：必须是不小于 1 的整数。",
    },
    "bad_temperature": {
        "en": "temperature cannot be {value}: it must be 0, or a number of at least {least}.",
        "zh": "temperature 不能是 {value}：必须是 0，或不小于 {least} 的数。",
    },
    "bad_top_k": {
        "en": "top_k cannot be {value}: it must be a whole number of at least 0.",
        "zh": "top_k 不能是 {value}：必须是不小于 0 的整数。",
    },
    "bad_top_p": {
        "en": "top_p cannot be {value}: it must be above 0 and at most 1.",
        "zh": "top_p 不能是 {value}：必须大于 0 且不大于 1。",
    },
    "bad_repetition_penalty": {
        "en": "repetition_penalty cannot be {value}: it must be a number of at least 1e-6.",
        "zh": "repetition_penalty 不能是 {value}：必须是不小于 1e-6 的数。",
    },
    "bad_seed": {
        "en": "seed cannot be {value}: it must be none, or a whole number of at least 0 and below 2**63.",
        "zh": "seed 不能是 {value}：必须是 none，或不小于 0 且小于 2**63 的整数。",
    },
    "no_room": {
        "en": "max_new_tokens {tokens} leaves no room for a question in {limit} positions; choose a smaller number.",
        "zh": "max_new_tokens 为 {tokens}，在 {limit} 个位置中没有给问题留下空间；请选小一些的数。",
    },
    "too_long": {
        "en": "The question with the system prompt has {tokens} tokens; with max_new_tokens {new} that is more than "
        "the {limit} positions. Shorten it, or lower max_new_tokens.",
        "zh": "问题连同系统提示词有 {tokens} 个词元；加上 max_new_tokens 的 {new} 个，超过了 {limit} 个位置。"
        "请缩短问题，或减小 max_new_tokens。",
    },
    "too_large": {
        "en": "The message has more than {limit} bytes; shorten it.",
        "zh": "消息超过 {limit} 字节；请缩短。",
    },
    "no_memory": {
        "en": "The memory of the device does not hold so long a conversation; /reset it, or take a smaller "
        "--context_length.",
        "zh": "设备内存装不下这么长的对话；请用 /reset 重新开始，或选小一些的 --context_length。",
    },
    "nothing_said": {"en": "Nothing has been said yet.", "zh": "还没有任何对话。"},
    "not_jsonl": {
        "en": "{path} must end in .jsonl, by which the data commands know such files.",
        "zh": "{path} 必须以 .jsonl 结尾，数据命令靠它认出这种文件。",
    },
    "exists": {
        "en": "{path} is there already; /save --overwrite {path} replaces it.",
        "zh": "{path} 已经存在；/save --overwrite {path} 会替换它。",
    },
    "cannot_save": {
        "en": "{path} cannot be written: {reason}; choose another place.",
        "zh": "{path} 无法写入：{reason}；请换一个位置。",
    },
    "cannot_load": {"en": "It cannot be loaded: {reason}", "zh": "无法读入：{reason}"},
    "no_conversation": {"en": "{path} holds no conversation.", "zh": "{path} 中没有对话。"},
    "not_in_turns": {
        "en": "{place}: after a system text or none, questions and answers must take turns and end in an answer.",
        "zh": "{place}：在系统提示词（可以没有）之后，问题和回答必须交替，并以回答结束。",
    },
    "no_system_role": {
        "en": "The chat template of this model has no place for a system prompt.",
        "zh": "这个模型的对话模板没有系统提示词的位置。",
    },
    "template": {
        "en": "The chat template of this model refuses the conversation: {reason}",
        "zh": "这个模型的对话模板不接受这个对话：{reason}",
    },
    "not_utf8": {
        "en": "The message is not UTF-8 ({reason}); convert it first.",
        "zh": "消息不是 UTF-8（{reason}）；请先转换。",
    },
    "unclosed": {
        "en": 'A block that """ begins is never closed; put """ behind its last line.',
        "zh": '以 """ 开始的块没有结束；请在最后一行之后写 """。',
    },
    "line": {
        "en": "standard input, line {number}: {reason}",
        "zh": "标准输入，第 {number} 行：{reason}",
    },
}
"""Each text by its key, in all `LANGUAGES`, with the same fields in each."""


class Words:
    """The texts in one language."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, key: str, **fields: object) -> str:
        """A text with its fields filled in."""
        return TEXTS[key][self.language].format(**fields)

    def refusal(self, refusal: "RefusedError") -> str:
        """Why something was refused."""
        return self(refusal.key, **refusal.fields)


class RefusedError(UserError):
    """Something that the conversation does not take; it goes on as it was.

    Args:
        key: of its text.
        fields: of the text.
    """

    def __init__(self, key: str, **fields: object) -> None:
        super().__init__(Words("en")(key, **fields))
        self.key = key
        self.fields = fields


def pick_language(name: str) -> str:
    """A language by name; "auto" goes by the locale, and is English where that is not Chinese."""
    if name != "auto":
        return name
    variables = (os.environ.get(variable) for variable in ("LC_ALL", "LC_MESSAGES", "LANG"))
    # Windows has none of them, and names the language in full.
    chosen = next(filter(None, variables), None) or locale.getlocale()[0] or ""
    return "zh" if chosen.lower().startswith(("zh", "chinese")) else "en"
