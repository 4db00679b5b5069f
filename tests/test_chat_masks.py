"""Which tokens of a chat are the assistant's, against what templates render, written by hand."""

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
from chat_oracle import expected_mask, random_chat
from chat_templates import CHATML, MARKED, PUBLISHED, published_template, tokenizer_with

from train.chats.masks import Chat, Refused, mark_responses, special_ids

QUESTION, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}


def responses(chat: Chat, template: str) -> list[str]:
    """The responses in a chat, each as one text."""
    tokenizer = tokenizer_with(template)
    ids, is_response = mark_responses(chat, tokenizer, special_ids(tokenizer))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        chat.messages, tools=chat.tools, tokenize=False
    )
    marked = "".join(
        f"\x01{token}\x02" if of_response else token
        for token, of_response in zip(map(tokenizer.decode, ids), is_response)
    )
    return re.findall("\x01(.*?)\x02", marked.replace("\x02\x01", ""), re.DOTALL)


def test_only_what_the_assistant_says_is_a_response():
    messages = [{"role": "system", "content": "Be kind."}, QUESTION, REPLY, QUESTION]
    assert responses(Chat(messages), CHATML) == ["Yo<|im_end|>"]
    assert responses(Chat([*messages, REPLY]), CHATML) == ["Yo<|im_end|>"] * 2
    assert responses(Chat([QUESTION, REPLY, REPLY]), CHATML) == ["Yo<|im_end|>"] * 2


def test_a_template_says_which_tokens_are_the_assistants():
    chat = Chat([QUESTION, REPLY, QUESTION, {"role": "assistant", "content": "No A: here"}])
    assert responses(chat, MARKED) == ["Yo<|im_end|>", "No A: here<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_prompt_is_not_learned_even_where_the_assistant_speaks_in_it(template):
    messages = [QUESTION, REPLY, QUESTION, {"role": "assistant", "content": "later"}]
    assert responses(Chat(messages, first_response=3), template) == ["later<|im_end|>"]


def test_a_turn_is_found_although_it_changes_once_others_follow():
    """The last turn gets empty thinking, as in Qwen3's template."""
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
        "{{ message.content }}",
    )
    chat = Chat([QUESTION, REPLY, QUESTION, REPLY])
    assert responses(chat, template) == ["Yo<|im_end|>", "<think></think>Yo<|im_end|>"]


def test_a_turn_ends_before_what_ends_every_chat():
    """The chat ends with <eos>, and a prompt with a header that begins alike."""
    ending = "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
    template = CHATML[: CHATML.index("{% if add")] + ending
    assert responses(Chat([QUESTION, REPLY] * 2), template) == ["Yo<|im_end|>"] * 2


MOVED = (
    "{% for message in messages %}{% if loop.last %}[{{ messages[0].content }}]{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
CUT = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message.content if loop.last or message.role == 'user' else message.content[:1] }}",
)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, [QUESTION], "it has no message of the assistant"),
        (MOVED, [QUESTION, REPLY] * 2, "renders messages differently once others follow them"),
        (MARKED.replace("generation %}", "if true %}", 1).replace("endgeneration", "endif"),
         [REPLY], "the chat template fails: Cannot apply chat template to an empty"),
        ("yy{% generation %}{% endgeneration %}x", [QUESTION, REPLY],
         "no token of it is a response"),
        ("{{ raise_exception('no system turns') }}", [QUESTION, REPLY],
         "the chat template fails: no system turns"),
        (CUT, [QUESTION, {"role": "assistant", "content": "Yo yo"}] * 2,
         "does not render what the assistant says as it is"),
        (CHATML, [QUESTION, {"role": "assistant", "content": ""}, QUESTION], None),
    ],
)  # fmt: skip
def test_a_chat_whose_responses_cannot_be_found_is_refused(template, messages, reason):
    if reason is None:
        assert responses(Chat(messages), template) == ["<|im_end|>"]
        return
    with pytest.raises(Refused, match=reason):
        responses(Chat(messages), template)


def may_be_refused(name: str, messages: list[dict]) -> bool:
    """Whether a template renders a chat so that a prefix is not rendered as the whole."""
    has_system = messages[0]["role"] == "system"
    if name in ("gemma2", "mistral-nemo"):
        # Gemma has no system turns. Mistral puts the system's text where a question is last.
        return has_system
    # Qwen3 removes the thinking before a tool call once there is another question, and the reply
    # after the tool was given with it.
    last_question = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return name == "qwen3" and any(
        "tool_calls" in message and "reasoning_content" in message
        for message in messages[:last_question]
    )


def check_published(name: str, num_chats: int) -> None:
    published = PUBLISHED[name]
    tokenizer = tokenizer_with(published_template(name), published.specials)
    specials, num_refused = special_ids(tokenizer), 0
    for seed in range(num_chats):
        messages, tools = random_chat(
            seed, system=published.system, tools=published.tools, thinking=published.thinking
        )
        pieces = list(published.pieces(messages, tools))
        if may_be_refused(name, messages):
            num_refused += 1
            with pytest.raises(Refused):
                mark_responses(Chat(messages, tools), tokenizer, specials)
            continue
        ids, is_response = mark_responses(Chat(messages, tools), tokenizer, specials)
        assert tokenizer.decode(ids) == "".join(text for text, _ in pieces), seed
        assert is_response == expected_mask(pieces, ids, tokenizer), (seed, messages)
    assert num_refused < 0.7 * num_chats


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_of_published_templates_are_those_written_by_hand(name):
    check_published(name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_of_a_thousand_chats_are_those_written_by_hand(name):
    check_published(name, 1000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_are_those_that_were_checked_by_hand(name):
    """Fifty chats whose responses, in brackets, somebody has read one by one."""
    published = PUBLISHED[name]
    tokenizer = tokenizer_with(published_template(name), published.specials)
    path = Path(__file__).with_name("chats_checked_by_hand.jsonl")
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(examples) == 50
    for example in examples:
        if example["template"] != name:
            continue
        chat = Chat(example["messages"], example["tools"])
        ids, is_response = mark_responses(chat, tokenizer, special_ids(tokenizer))
        runs = groupby(zip(ids, is_response), key=lambda pair: pair[1])
        texts = [(of, tokenizer.decode([token for token, _ in run])) for of, run in runs]
        assert "".join(f"⟦{text}⟧" if of else text for of, text in texts) == example["marked"]
