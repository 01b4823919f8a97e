"""Plates of notebook 03: what a prompt becomes."""

from typing import Any

from glmlab.figures.prompts import format_figure, growth_figure, prompt_figure, roles_figure
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate, embedded, model_provenance
from glmlab.prompts.families import FORMATS, chat_format, segment_table

EVERY_ROLE: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "巴黎 weather?👋"},
    {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='Paris')\n```"},
    {"role": "observation", "content": '{"temperature": 21}'},
]
_SYSTEM = "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully."
CHAPTER: list[dict[str, Any]] = [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello, I'm ChatGLM3. What can I assist you today?"},
    {"role": "user", "content": "你是誰"},
]
QUESTIONS = ("你好", "3 + 4 = ?", "What is prefill?")


def prompt_tokens() -> Plate:
    """A prompt with all four roles, token by token."""
    from glmlab.prompts.encoding import dissect

    table = dissect(embedded().tokenizer, EVERY_ROLE)
    return Plate(prompt_figure(table), table, {**model_provenance(), "messages": EVERY_ROLE}, caption("prompt_tokens"))


def prompt_roles() -> Plate:
    """Which role may follow which."""
    from glmlab.prompts.encoding import role_transitions

    transitions = role_transitions()
    return Plate(roles_figure(transitions), transitions.reset_index(), {"rules": "ChatGLM3"}, caption("prompt_roles"))


def prompt_formats() -> Plate:
    """One conversation in several chat formats."""
    parts = segment_table({name: chat_format(name).segments(CHAPTER) for name in FORMATS})
    sources = {name: chat_format(name).source for name in FORMATS}
    return Plate(format_figure(parts), parts, {"messages": CHAPTER, "formats": sources}, caption("prompt_formats"))


def prompt_growth() -> Plate:
    """What is new in the prompt of each turn."""
    from glmlab.generation.chat import ChatSession
    from glmlab.prompts.encoding import prompt_growth as growth_of

    session = ChatSession(embedded(), max_new_tokens=100)
    conversation = []
    for question in QUESTIONS:
        *_, turn = session.say(question)
        answer = {"role": "assistant", "metadata": turn.metadata, "content": turn.text}
        conversation += [{"role": "user", "content": question}, answer]
    growth = growth_of(embedded().tokenizer, conversation)
    return Plate(
        growth_figure(growth), growth, {**model_provenance(), "messages": conversation}, caption("prompt_growth")
    )
