"""Tokenizers that several tests of prompts share."""

import pytest

from glmlab.models.chatglm3 import ChatGLMTokenizer, build_tokenizer_backend


@pytest.fixture(scope="session")
def published(shared_data):
    """ChatGLM3-6B's own tokenizer."""
    backend = build_tokenizer_backend(shared_data / "chatglm3-tokenizer" / "tokenizer.model")
    return ChatGLMTokenizer(tokenizer_object=backend)


@pytest.fixture(scope="session", params=["embedded", "published"])
def tokenizer(request):
    """ChatGLM3's tokenizer, with the small vocabulary and with its own."""
    loaded = request.getfixturevalue(request.param)
    return loaded if request.param == "published" else loaded.tokenizer
