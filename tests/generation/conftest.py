"""A chat in which the embedded model may call a tool."""

import pytest

from glmlab.generation.chat import ChatSession
from glmlab.models.loading import LoadedModel

WEATHER_TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name"}},
        "required": ["city"],
    },
}
TOOL_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


@pytest.fixture
def weather_session(embedded: LoadedModel) -> ChatSession:
    """A session that lists the weather tool, in the words that the embedded model was trained on."""
    return ChatSession(embedded, system=TOOL_PROMPT, tools=[WEATHER_TOOL], max_new_tokens=80)
