"""Prompts as token ids, and the public names of this room.

:func:`encode_chat` gives the ids, :func:`dissect` says where each of them comes from, :func:`prompt_growth` which of
them are new from turn to turn.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from glmlab.models.chatglm3 import ChatGLMTokenizer
from glmlab.prompts.format import (
    ROLES,
    Message,
    PromptError,
    Segment,
    chat_segments,
    check_messages,
    encode_segments,
    role_transitions,
)
from glmlab.prompts.table import dissect, prompt_growth
from glmlab.prompts.templates import render_chat, template_segments

__all__ = [
    "ROLES",
    "Message",
    "PromptError",
    "Segment",
    "chat_segments",
    "check_messages",
    "dissect",
    "encode_chat",
    "encode_segments",
    "prompt_growth",
    "role_transitions",
    "template_segments",
]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a chat: segment by segment for ChatGLM3, by the tokenizer's own chat template for other models.

    Raises:
        PromptError: the messages break a rule of the format, the tokenizer has no chat template, or its template
            refuses them.

    Example:
        >>> from glmlab import load_model
        >>> tokenizer = load_model("embedded").tokenizer
        >>> ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}])
        >>> tokenizer.convert_ids_to_tokens(ids)[:5]
        ['[gMASK]', 'sop', '<|user|>', '▁', '<0x0A>']
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        segments = chat_segments(messages, tools, add_generation_prompt=add_generation_prompt)
        return [token_id for ids in encode_segments(tokenizer, segments) for token_id in ids]
    rendered = render_chat(tokenizer, messages, tools, add_generation_prompt)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids
