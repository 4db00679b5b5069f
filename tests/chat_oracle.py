"""What published chat templates render, written down by hand: pieces of text, and whether the
assistant wrote them. Nothing here comes from the toolkit or looks at a template.

Also random chats, and the bytes of tokens.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]
Piece = tuple[str, bool]

WORDS = (
    "the quick  brown\tfox", "naïve café", "日本語のテキスト", "🙂🙃", "x = {'a': [1, 2]}", "end",
    "assistant\n", "<b>bold</b>", "{{ braces }}", "<|im_end|> inside", "user:", "1 + 1 = 2.", "a",
    "\n\nnew paragraph", "“quoted”",
)  # fmt: skip
QWEN_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{signatures}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def chatml(messages: list[Message], default: str | None) -> Iterator[Piece]:
    if default is not None and messages[0]["role"] != "system":
        yield f"<|im_start|>system\n{default}<|im_end|>\n", False
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def smollm2(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    name = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return chatml(messages, name)


def calls(message: Message) -> str:
    functions = [call["function"] for call in message["tool_calls"]]
    arguments = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    return "".join(
        f'\n<tool_call>\n{{"name": "{function["name"]}", "arguments": {text}}}\n</tool_call>'
        for function, text in zip(functions, arguments)
    )


def qwen_turns(messages: list[Message], said: Callable[[int], str]) -> Iterator[Piece]:
    """The turns of Qwen, which differ between its versions in what an assistant's message says."""
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if messages[i - 1]["role"] != "tool":
                yield "<|im_start|>user", False
            yield f"\n<tool_response>\n{message['content']}\n</tool_response>", False
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                yield "<|im_end|>\n", False
        elif role == "assistant":
            yield "<|im_start|>assistant\n", False
            yield f"{said(i)}<|im_end|>", True
            yield "\n", False
        elif role == "user":
            yield f"<|im_start|>user\n{message['content']}<|im_end|>\n", False


def qwen_system(
    messages: list[Message], tools: list | None, default: str | None
) -> Iterator[Piece]:
    has_system = messages[0]["role"] == "system"
    text = messages[0]["content"] if has_system else default
    if tools:
        signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = ("" if text is None else f"{text}\n\n") + QWEN_TOOLS.format(signatures=signatures)
    if text is not None:
        yield f"<|im_start|>system\n{text}<|im_end|>\n", False


def qwen25(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    def said(i: int) -> str:
        message = messages[i]
        if "tool_calls" not in message:
            return message["content"]
        content = message["content"]
        return content + calls(message) if content else calls(message).removeprefix("\n")

    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    yield from qwen_system(messages, tools, default)
    yield from qwen_turns(messages, said)


def qwen3(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    last_question = max(i for i, message in enumerate(messages) if message["role"] == "user")

    def said(i: int) -> str:
        message, thinking = messages[i], messages[i].get("reasoning_content", "")
        content = text = message["content"]
        if i > last_question and (i + 1 == len(messages) or thinking):
            text = f"<think>\n{thinking.strip(chr(10))}\n</think>\n\n" + content.lstrip("\n")
        if "tool_calls" not in message:
            return text
        return text + (calls(message) if content else calls(message).removeprefix("\n"))

    yield from qwen_system(messages, tools, None)
    yield from qwen_turns(messages, said)


def llama31(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    system, messages = split_system(messages)
    yield "<bos><|start_header_id|>system<|end_header_id|>\n\n", False
    yield "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", False
    yield f"{(system or '').strip()}<|eot_id|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


def gemma2(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    yield "<bos>", False
    for message in messages:
        is_model = message["role"] == "assistant"
        yield f"<start_of_turn>{'model' if is_model else message['role']}\n", False
        yield message["content"].strip() + "<end_of_turn>", is_model
        yield "\n", False


def mistral_nemo(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    system, messages = split_system(messages)
    yield "<bos>", False
    for i, message in enumerate(messages):
        if message["role"] == "user":
            is_last = system is not None and i + 1 == len(messages)
            text = f"{system}\n\n{message['content']}" if is_last else message["content"]
            yield f"[INST]{text}[/INST]", False
        else:
            yield f"{message['content']}<eos>", True


def phi35(messages: list[Message], tools: list | None) -> Iterator[Piece]:
    for message in messages:
        if message["role"] == "system" and not message["content"]:
            continue
        yield f"<|{message['role']}|>\n", False
        yield f"{message['content']}<|end|>", message["role"] == "assistant"
        yield "\n", False
    yield "<eos>", False


def split_system(messages: list[Message]) -> tuple[str | None, list[Message]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def text_of(numbers: random.Random) -> str:
    separators = (" ", "\n", "", "  ")
    text = "".join(
        numbers.choice(WORDS) + numbers.choice(separators) for _ in range(numbers.randint(1, 6))
    )
    return text if text.strip() else "yes"


def random_chat(
    seed: int, *, system: bool, tools: bool, thinking: bool
) -> tuple[list[Message], list | None]:
    """A chat of one to five questions that ends with a reply, and its tools."""
    numbers = random.Random(seed)
    has_tools = tools and numbers.random() < 0.4
    messages: list[Message] = []
    if system and numbers.random() < 0.5:
        messages.append({"role": "system", "content": text_of(numbers)})
    for _ in range(numbers.randint(1, 5)):
        messages.append({"role": "user", "content": text_of(numbers)})
        if has_tools and numbers.random() < 0.6:
            names = [numbers.choice(("look_up", "add")) for _ in range(numbers.randint(1, 2))]
            calls = [
                {
                    "type": "function",
                    "function": {"name": name, "arguments": {"x": text_of(numbers)}},
                }
                for name in names
            ]
            said = numbers.choice(("", text_of(numbers).strip()))
            reply = {"role": "assistant", "content": said, "tool_calls": calls}
            if thinking and numbers.random() < 0.5:
                reply["reasoning_content"] = text_of(numbers)
            messages.append(reply)
            messages += [{"role": "tool", "content": text_of(numbers)} for _ in calls]
        reply = {"role": "assistant", "content": text_of(numbers)}
        if thinking and numbers.random() < 0.5:
            reply["reasoning_content"] = text_of(numbers)
        messages.append(reply)
    signature = {"type": "function", "function": {"name": "look_up", "parameters": {"x": "text"}}}
    return messages, [signature] if has_tools else None


def bytes_of_tokens(ids: list[int], tokenizer: Any) -> list[int]:
    """The number of bytes of text that each token is: special tokens are themselves, and every
    character of another token is one byte (byte-level BPE).
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    return [
        len(added[i].encode()) if i in added else len(tokenizer.convert_ids_to_tokens(i))
        for i in ids
    ]


def expected_mask(pieces: list[Piece], ids: list[int], tokenizer: Any) -> list[bool]:
    """Whether each token is in a piece that the assistant wrote, counted in bytes."""
    written, token_starts, start = [], [], 0
    for text, is_response in pieces:
        written += [is_response] * len(text.encode())
    for num_bytes in bytes_of_tokens(ids, tokenizer):
        token_starts.append(start)
        start += num_bytes
    assert start == len(written)
    return [written[start] for start in token_starts]
