"""A conversation over one kept KV cache: every turn feeds only what is new."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache

from glmlab.core.errors import GlmlabError
from glmlab.generation.decoding import DecodeStep, Keep, decode_steps
from glmlab.generation.preparation import context_limit, crop_cache, ids_of, new_cache
from glmlab.models.chatglm3 import ChatGLMTokenizer
from glmlab.models.compiling import make_room
from glmlab.models.loading import LoadedModel
from glmlab.prompts.encoding import Message, chat_segments, encode_chat, encode_segments
from glmlab.prompts.format import split_answer
from glmlab.prompts.table import common_prefix


class ContextFullError(GlmlabError):
    """A message does not fit behind the history; the text names the limit and the tokens on both sides."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and its answer, as far as it has come."""

    number: int  # from 1
    user_text: str
    text: str = ""  # the answer so far, without metadata and stop token
    metadata: str = ""  # the line before the text: the tool that the answer calls, else empty (ChatGLM3 only)
    new_text: str = ""  # what this token added to the text; empty while a character is not complete
    token_ids: tuple[int, ...] = ()  # all generated ids, the stop token too
    prompt_tokens: int = 0  # that the turn fed before the first generated one
    context_tokens: int = 0  # whose keys and values are cached: the last generated token is not fed yet
    context_characters: int = 0  # of all messages so far, this answer included
    kv_bytes: int = 0
    first_token_s: float | None = None  # from the call to the first token; None for a restored turn
    token_s: float | None = None  # mean of the tokens after the first; None before there is one
    stop_reason: str | None = None
    """None while the answer goes on; then "stop token", "length", "context limit", "interrupted" or "restored"."""

    @property
    def generated_tokens(self) -> int:
        """How many ids were generated."""
        return len(self.token_ids)


class ChatSession:
    """A chat whose keys and values stay cached between turns.

    Args:
        loaded: from ``load_model``.
        system: text of the system message; none without it.
        tools: tool descriptions, listed in the system message.
        max_new_tokens: longest answer; without it, what the context has left.
        generation_config: sampling as in transformers; the model's own without it.
        static_tokens: keep keys and values in a StaticCache of this length from the first turn on; the conversation
            ends where it is full. Without it the cache grows: a DynamicCache, or what a compiled model decodes with.

    Raises:
        DecodeError: ``static_tokens`` below 1 or beyond the model's limit.

    Example:
        >>> from glmlab import load_model
        >>> session = ChatSession(load_model("embedded", precision="fp32", device="cpu"), max_new_tokens=60)
        >>> *_, turn = session.say("你好")
        >>> turn.number, turn.stop_reason
        (1, 'stop token')
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        static_tokens: int | None = None,
    ) -> None:
        self.loaded, self.generation_config, self.static_tokens = loaded, generation_config, static_tokens
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._tools, self._max_new_tokens = tools, max_new_tokens
        self.clear()

    def clear(self) -> None:
        """Forget the conversation and free its cache; the system message stays."""
        self._messages: list[Message] = list(self._opening)
        self._ids: list[int] = []  # every id of the conversation, fed or not
        self._cache = new_cache(self.loaded, self.static_tokens)
        self.turns: list[Turn] = []

    @property
    def context_tokens(self) -> int:
        """Tokens whose keys and values are cached."""
        return int(self._cache.get_seq_length())

    @property
    def context_characters(self) -> int:
        """Characters of all messages, as the chapter's log counted them."""
        return sum(len(message["content"]) for message in self._messages)

    @property
    def context_limit(self) -> int:
        """Most tokens of context: what the model's positions reach, or the static cache where it is shorter."""
        return self.static_tokens or context_limit(self.loaded.model.config)

    @property
    def _said_limit(self) -> str:
        if self.context_limit < context_limit(self.loaded.model.config):
            return f"the static cache's limit is {self.context_limit} tokens (static_tokens)"
        return f"the model's limit is {self.context_limit} tokens (max_position_embeddings)"

    def say(
        self, text: str, *, role: str = "user", max_new_tokens: int | None = None, stops: bool = True
    ) -> Iterator[Turn]:
        """Send a message and stream the answer: one growing :class:`Turn` a token, the last with a ``stop_reason``.

        A turn that is left before its end is kept as far as it came ("interrupted"), and the chat can go on.

        Args:
            text: the message.
            role: "user", or "observation" for the result of a tool that the last answer called.
            max_new_tokens: longest answer, instead of the session's.
            stops: False lets no stop token end the answer, which then has all the tokens that it may have.

        Raises:
            ContextFullError: history and message leave no room for an answer.
            PromptError: the message breaks a rule of the chat format.
        """
        message = {"role": role, "content": text}
        prompt_ids = self._prompt_with(message)
        limit = self.context_limit
        room = limit - len(prompt_ids) + 1  # the last generated token is not fed
        if room < 1:
            raise ContextFullError(
                f"the context is full: {self._said_limit}, the history "
                f"holds {self.context_tokens} and this message adds {len(prompt_ids) - self.context_tokens}. "
                "Clear the conversation, or shorten the message."
            )
        asked = max_new_tokens or self._max_new_tokens or room
        return self._answer(message, prompt_ids, min(asked, room), asked >= room, stops)

    def restore(self, pairs: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Take up a conversation of earlier turns: (user text, generated ids), all prefilled in one forward pass.

        Raises:
            ContextFullError: the turns are longer than the context limit.
        """
        self.clear()
        for number, (text, generated) in enumerate(pairs, start=1):
            message = {"role": "user", "content": text}
            prompt_ids = self._prompt_with(message)
            metadata, answer = self._split(self._decode(generated))
            turn = Turn(
                number=number,
                user_text=text,
                text=answer,
                metadata=metadata,
                token_ids=tuple(generated),
                context_tokens=len(prompt_ids) + len(generated) - 1,
                context_characters=self.context_characters + len(text) + len(answer),
                stop_reason="restored",
            )
            self._finish(message, prompt_ids, turn)
        if not self._ids:
            return
        if len(self._ids) - 1 > self.context_limit:
            raise ContextFullError(f"the turns to restore have {len(self._ids)} tokens, but {self._said_limit}.")
        model = self.loaded.model
        if isinstance(self._cache, StaticCache):
            make_room(self._cache, len(self._ids) - 1, self.context_limit, model.device)
        fed = torch.tensor([self._ids[:-1]], device=model.device)
        with torch.no_grad():
            model(fed, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _prompt_with(self, message: Message) -> list[int]:
        """Ids of the whole conversation with a new message and the opening of its answer."""
        tokenizer = self.loaded.tokenizer
        messages = [*self._messages, message]
        if not isinstance(tokenizer, ChatGLMTokenizer) or not self._ids:
            return encode_chat(tokenizer, messages, self._tools)
        # generated ids stay as they are: encoding their text anew could cut it into other pieces
        ended = self._ids[-1] in ids_of(self.loaded.model.generation_config.eos_token_id)
        new = chat_segments(messages, self._tools)[-4:]  # role, metadata and text of the message, the generation prompt
        return [*self._ids[: -1 if ended else None], *(i for ids in encode_segments(tokenizer, new) for i in ids)]

    def _answer(
        self, message: Message, prompt_ids: list[int], max_new_tokens: int, ends_at_limit: bool, stops: bool
    ) -> Iterator[Turn]:
        started = time.perf_counter()
        cached = self._ids[: self.context_tokens]
        kept = min(common_prefix(cached, prompt_ids), len(prompt_ids) - 1)  # something must be left to feed
        crop_cache(self._cache, kept)
        steps = decode_steps(
            self.loaded,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            generation_config=self.generation_config,
            keep=Keep(top_k=0),
            cache=self._cache,
            stops=stops,
        )
        turn = Turn(
            number=len(self.turns) + 1,
            user_text=message["content"],
            prompt_tokens=len(prompt_ids) - kept,
            context_tokens=kept,
            context_characters=self.context_characters + len(message["content"]),
        )
        stream = _TextStream(self._decode)
        try:
            for step in steps:
                turn = self._with_token(turn, step, stream, time.perf_counter() - started)
                if turn.stop_reason == "length" and ends_at_limit:
                    turn = replace(turn, stop_reason="context limit")
                if turn.stop_reason is not None:
                    self._finish(message, prompt_ids, turn)
                yield turn
        finally:
            if turn.stop_reason is None:
                self._finish(message, prompt_ids, replace(turn, stop_reason="interrupted"))

    def _with_token(self, turn: Turn, step: DecodeStep, stream: "_TextStream", elapsed_s: float) -> Turn:
        token_ids = (*turn.token_ids, step.token_id)
        stream.add(step.token_id)
        ended = step.stop_reason is not None
        # at the end, bytes of a character that never became complete show as U+FFFD
        metadata, text = self._split(self._decode(token_ids) if ended else stream.text, complete=ended)
        first_token_s = elapsed_s if turn.first_token_s is None else turn.first_token_s
        later_tokens = len(token_ids) - 1
        return replace(
            turn,
            text=text,
            metadata=metadata,
            new_text=text[len(turn.text) :],
            token_ids=token_ids,
            context_tokens=step.context_length,
            context_characters=turn.context_characters - len(turn.text) + len(text),
            kv_bytes=step.kv_bytes,
            first_token_s=first_token_s,
            token_s=(elapsed_s - first_token_s) / later_tokens if later_tokens else None,
            stop_reason=step.stop_reason,
        )

    def _finish(self, message: Message, prompt_ids: list[int], turn: Turn) -> None:
        self._ids = [*prompt_ids, *turn.token_ids]
        self._messages += [message, {"role": "assistant", "metadata": turn.metadata, "content": turn.text}]
        self.turns.append(turn)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _split(self, answer: str, *, complete: bool = True) -> tuple[str, str]:
        """Metadata line and text; only ChatGLM3 writes the line, and random weights not even then."""
        if not isinstance(self.loaded.tokenizer, ChatGLMTokenizer):
            return "", answer
        return split_answer(answer if complete or "\n" in answer else f"{answer}\n")


class _TextStream:
    """The text of the tokens so far; a character spelled in several tokens comes with its last one.

    tokenizers' DecodeStream raises where bytes never become a character, as they do with random weights.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the last token that completed a text
        self._said = ""  # the beginning of their text that is in ``text`` already
        self.text = ""

    def add(self, token_id: int) -> None:
        """Lengthen the text, unless a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith("\ufffd") and len(text) > len(self._said):
            self.text += text[len(self._said) :]
            self._ids = [token_id]
            self._said = self._decode(self._ids)
