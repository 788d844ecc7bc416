"""A conversation as token ids, and which of them the assistant says.

The mask is built while the ids are: nothing is searched for afterwards. Each answer is encoded by itself, so that no
token reaches across the seam between a question and its answer, and the ids of a generation prompt are the beginning of
the ids that were trained on. Special ids come from the format only, never from what somebody writes; the exceptions are
<think> and its like in what the assistant says, and <image> in what the user says.

    chatml      <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi<|im_end|>\\n
    qwen2, smollm2    the same after a default system message
    qwen2.5, qwen2.5-base    that too; tools answer inside a user's turn
    qwen3       no default; only answers after the last question keep their reasoning, and only these are trained on
    qwen3-instruct    (of July 2025) no default and no reasoning
    llama3, llama3.1    <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|>; 3.1 begins with two dates

    python -m data.chat                                   an example, what is trained on in colour
    python -m data.chat --model DIR --data FILE.jsonl     your first row in your model's format
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data import formats
from data.formats import UserError
from data.tokenizer import Tokenizer, from_hf, tiny

DEFAULT_SYSTEM = {  # of the formats with <|im_start|>
    "chatml": "",
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2.5-base": "You are a helpful assistant.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen3": "",
    "qwen3-instruct": "",
}
FORMATS = (*DEFAULT_SYSTEM, "llama3", "llama3.1")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's template unless told others
OF_ASSISTANT = ("<think>", "</think>", "<tool>", "</tool>", "<tool_call>", "</tool_call>")
OF_USER = ("<image>",)
TOOL = ("<tool_response>", "</tool_response>")


class Row(NamedTuple):
    input_ids: list[int]
    completion_mask: list[int]  # 1 on what the assistant says and on the token that ends its turn


class Part(NamedTuple):
    """A piece of a rendered conversation: the name of one special token, or text, encoded by itself."""

    text: str
    special: bool = False
    trained: bool = False
    names: tuple[str, ...] = ()  # special tokens that the text may hold


def render(messages: Sequence[dict], tokenizer: Tokenizer, *, add_generation_prompt: bool = False,
           chat_format: str | None = None) -> Row:  # fmt: skip
    """The ids of `messages` ({"role", "content"}), and 1 where the assistant speaks.

    With add_generation_prompt the beginning of the assistant's next turn follows. chat_format overrides that of the
    tokenizer; UserError if neither is known, or the tokenizer lacks one of the format's tokens.
    """
    chat_format = chat_format or tokenizer.chat_format
    if chat_format not in FORMATS:
        raise UserError(f"this model's chat template is not one of those known here; choose --chat-format "
                        f"{', '.join(FORMATS)}")  # fmt: skip
    llama = chat_format.startswith("llama3")
    ids, mask = [], []
    if llama and tokenizer.bos_id is not None:
        ids, mask = [tokenizer.bos_id], [0]
    for part in (_llama if llama else _chatml)(messages, chat_format, add_generation_prompt):
        new = [tokenizer.special(part.text)] if part.special else tokenizer.encode_with(part.text, part.names)
        ids += new
        mask += [int(part.trained)] * len(new)
    return Row(ids, mask)


def _chatml(messages: Sequence[dict], chat_format: str, add_generation_prompt: bool) -> Iterator[Part]:
    start, end, newline = Part("<|im_start|>", special=True), Part("<|im_end|>", special=True), Part("\n")
    if DEFAULT_SYSTEM[chat_format] and messages[0]["role"] != "system":
        yield from (start, Part(f"system\n{DEFAULT_SYSTEM[chat_format]}"), end, newline)
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"
                 and not (message["content"].startswith(TOOL[0]) and message["content"].endswith(TOOL[1]))]  # fmt: skip
    last_question = questions[-1] if questions else len(messages) - 1
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            trained = True
            if chat_format == "qwen3":
                trained = i > last_question
                content = _qwen3_content(content, keep_reasoning=trained, is_last=i == len(messages) - 1)
            yield from (start, Part("assistant\n"), Part(content, trained=trained, names=OF_ASSISTANT),
                        end._replace(trained=trained), newline)  # fmt: skip
        elif role == "tool" and chat_format.startswith(("qwen2.5", "qwen3")):
            # consecutive results share one turn of the user
            first = i == 0 or messages[i - 1]["role"] != "tool"
            last = i == len(messages) - 1 or messages[i + 1]["role"] != "tool"
            yield from (start, Part("user")) if first else ()
            names = () if any(tag in content for tag in TOOL) else TOOL
            yield Part(f"\n<tool_response>\n{content}\n</tool_response>", names=names)
            yield from (end, newline) if last else ()
        else:
            yield from (start, Part(f"{role}\n{content}", names=OF_USER if role == "user" else ()), end, newline)
    if add_generation_prompt:
        yield from (start, Part("assistant\n"))


def _qwen3_content(content: str, keep_reasoning: bool, is_last: bool) -> str:
    reasoning, closed, _ = content.partition("</think>")  # of several the first ends the reasoning, the last begins
    reasoning = reasoning.rstrip("\n").rpartition("<think>")[2].strip("\n") if closed else ""  # what is said
    said = content.rpartition("</think>")[2].lstrip("\n") if closed else content
    if not keep_reasoning or not (reasoning or is_last):
        return said
    return f"<think>\n{reasoning}\n</think>\n\n{said.lstrip(chr(10))}"


def _llama(messages: Sequence[dict], chat_format: str, add_generation_prompt: bool) -> Iterator[Part]:
    def header(role: str) -> Iterator[Part]:
        yield from (Part("<|start_header_id|>", special=True), Part(role), Part("<|end_header_id|>", special=True))

    end = Part("<|eot_id|>", special=True)
    if chat_format == "llama3.1":
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"].strip() if has_system else ""
        yield from (*header("system"), Part(f"\n\n{DATES}{system}"), end)
        messages = messages[has_system:]
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "assistant":
            yield from (*header(role), Part("\n\n"), Part(content, trained=True, names=OF_ASSISTANT),
                        end._replace(trained=True))  # fmt: skip
        elif role == "tool" and chat_format == "llama3.1":  # as JSON, since the template takes text for a list
            said = json.dumps(message["content"], ensure_ascii=False)
            yield from (*header("ipython"), Part(f"\n\n{said}"), end)
        else:
            yield from (*header(role), Part(f"\n\n{content}", names=OF_USER if role == "user" else ()), end)
    if add_generation_prompt:
        yield from (*header("assistant"), Part("\n\n"))


def prompt_ids(prompt: str | Sequence[dict], tokenizer: Tokenizer) -> list[int]:
    """What a model reads before it answers `prompt`: what the user says, or a conversation."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return render(messages, tokenizer, add_generation_prompt=True).input_ids


def completion_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What a completion says up to its first ending token."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    return tokenizer.decode(ids[:end])


EXAMPLE = (
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Please add 14 and 3."},
    {"role": "assistant", "content": "17"},
    {"role": "user", "content": "Write <|im_end|> to me!"},
    {"role": "assistant", "content": "<think>That is text here, not a token.</think>No"},
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--model", metavar="DIR", help="checkpoint whose tokenizer and format are taken")
    parser.add_argument("--data", metavar="FILE", help="JSONL whose first row is rendered")
    parser.add_argument("--map", nargs="+", default=[], metavar="THEIRS=OURS", help="rename fields of --data")
    parser.add_argument("--chat-format", help="one of " + ", ".join(FORMATS))
    args = parser.parse_args(argv)
    tokenizer, messages = from_hf(args.model) if args.model else tiny(), EXAMPLE
    if args.data:
        rows = formats.read_jsonl(args.data, ("chat", "completion"), mapping=formats.parse_map(args.map))
        messages = formats.to_messages(rows[0])
    ids, mask = render(messages, tokenizer, chat_format=args.chat_format)
    for i, trained in zip(ids, mask, strict=True):
        text = tokenizer.decode([i])
        print(f"\033[30;42m{text}\033[0m" if trained else text, end="")
    print(f"\n{len(ids)} tokens, {sum(mask)} of them (green) trained on")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
