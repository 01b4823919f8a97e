"""The tool that the embedded model was trained to call."""

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
