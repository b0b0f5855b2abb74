from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_model.chat import ChatTemplate, Rendered, UnusableConversation
from layerskip_model.errors import UserError
from tests.chats import MARKED, PLAIN, SPACED, THINKING, TRIMMING, UNSTABLE, byte_tokenizer, talk

MERGES = (("Ġ", "a"), ("Ċ", "Ċ"), ("t", "h"), ("th", "e"))
TEMPLATES = {"thinking": THINKING, "trimming": TRIMMING, "plain": PLAIN, "marked": MARKED}
ENDS = {"thinking": "<|im_end|>", "trimming": "<|eot|>", "plain": "</s>", "marked": "<|im_end|>"}


def template(source: str, *merges: tuple[str, str]) -> ChatTemplate:
    return ChatTemplate(byte_tokenizer(*merges), source)


def learnt(chat: ChatTemplate, example: Rendered) -> str:
    """The text of the tokens that are learnt."""
    ids = [token for token, answer in zip(example.ids, example.answers, strict=True) if answer]
    return str(chat.tokenizer.decode(ids))


def naive(chat: ChatTemplate, parts: list[tuple[str, bool]]) -> Rendered:
    """The twin: parts of the text with whether they are learnt, tokenised one by one (tokens are bytes)."""
    ids: list[int] = []
    answers: list[bool] = []
    for text, learns in parts:
        part = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        answers += [learns] * len(part)
    return Rendered(ids, answers)


def test_chatml() -> None:
    for source in (THINKING, MARKED):
        chat = template(source)
        expected = [
            ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
            ("yo<|im_end|>", True),
        ]
        expected += [("\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n", False)]
        expected += [("no<|im_end|>", True), ("\n", False)]
        assert chat.render(talk("hi", "yo", "so?", "no")) == [naive(chat, expected)]


def test_vicuna_and_llama_3() -> None:
    chat = template(PLAIN)
    expected = [("<s>USER: hi ASSISTANT:", False), (" yo</s>", True)]
    expected += [("USER: so? ASSISTANT:", False), (" no</s>", True)]
    assert chat.render(talk("hi", "yo", "so?", "no")) == [naive(chat, expected)]
    chat = template(TRIMMING)
    expected = [("<s><|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n", False)]
    expected += [("yo<|eot|>", True)]
    assert chat.render(talk(" hi", " yo\n")) == [naive(chat, expected)]


words = st.text(st.sampled_from("ab the.\né😀"), min_size=1, max_size=12).map(lambda text: f"x{text}é")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(said=st.lists(words, min_size=2, max_size=7))
def test_what_is_learnt_is_the_answers_with_their_ends(name: str, said: list[str]) -> None:
    chat = template(TEMPLATES[name], *MERGES)
    (example,) = chat.render(talk(*said))
    space = " " if name == "plain" else ""
    assert learnt(chat, example) == "".join(f"{space}{answer}{ENDS[name]}" for answer in said[1::2])
    prompt, answer = chat.last_answer(talk(*said))
    last = len(said) - len(said) % 2
    assert prompt == chat.text(talk(*said)[: last - 1], prompt=True)
    assert answer == said[last - 1]
    ids = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.ids[: len(ids)] == ids
    assert example.answers[len(ids)]
    assert not example.answers[len(ids) - 1]


def test_thinking_that_is_dropped_later_makes_an_example_a_turn() -> None:
    chat = template(THINKING, *MERGES)
    messages = talk("hi", "yo", "so?", "no", "why?")
    messages[1]["thinking"] = "hm"
    messages[3]["thinking"] = "well"
    first, second = chat.render(messages)
    assert learnt(chat, first) == "<think>hm</think>yo<|im_end|>"
    assert learnt(chat, second) == "<think>well</think>no<|im_end|>"
    assert "hm" not in chat.tokenizer.decode(second.ids)
    assert chat.last_answer(messages)[1] == "<think>well</think>no"
    # Several answers to one question keep their thinking, and are one example.
    called = [messages[0], messages[1], {"role": "tool", "content": "4"}, messages[3]]
    (example,) = chat.render(called)
    assert learnt(chat, example) == "<think>hm</think>yo<|im_end|><think>well</think>no<|im_end|>"


def test_what_is_not_stable_is_refused_in_words() -> None:
    with pytest.raises(UnusableConversation, match="writes the prompt before an answer otherwise"):
        template(UNSTABLE).render(talk("hi", "yo"))
    chat = template(SPACED, *MERGES)
    with pytest.raises(UnusableConversation, match="has other tokens alone"):
        chat.render(talk("hi", "a"))
    assert learnt(chat, chat.render(talk("hi", "a", "so?", "b"))[0]) == "b</s>"  # the turn that is stable
    with pytest.raises(UnusableConversation, match="has other tokens alone"):  # \n before and in the answer
        template(THINKING, *MERGES).render(talk("hi", "\na"))


def test_what_a_template_refuses_and_what_has_no_answer() -> None:
    chat = template(PLAIN)
    with pytest.raises(UnusableConversation, match="the chat template refuses it: no role tool"):
        chat.render([{"role": "tool", "content": "4"}, *talk("hi", "yo")])
    with pytest.raises(UnusableConversation, match=r"refuses it: .*content"):
        chat.render([{"role": "user"}, {"role": "assistant", "content": "a"}])
    for answers in (chat.render, chat.last_answer):
        with pytest.raises(UnusableConversation, match="without an answer"):
            answers(talk("hi"))
    with pytest.raises(UnusableConversation, match="marks hold no answer"):
        template(MARKED.replace("== 'assistant'", "== 'robot'")).render(talk("hi", "yo"))


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN)
    tokenizer = byte_tokenizer(template=THINKING)
    assert ChatTemplate.load(tokenizer).source == THINKING
    assert ChatTemplate.load(tokenizer, path).source == PLAIN
    with pytest.raises(UserError, match=r"has no chat template.*name a Jinja file in data\.chat_template"):
        ChatTemplate.load(byte_tokenizer())
    with pytest.raises(UserError, match=r"data\.chat_template='.*none\.jinja' cannot be read"):
        ChatTemplate.load(tokenizer, tmp_path / "none.jinja")
    path.write_text("a\n{% if %}")
    with pytest.raises(UserError, match=r"data\.chat_template='.*', line 2: "):
        ChatTemplate.load(tokenizer, path)
    path.write_text("{{ raise_exception('only of a system') }}")
    ChatTemplate.load(tokenizer, path)  # it may like other messages
