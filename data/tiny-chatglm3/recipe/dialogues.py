"""The dialogues that the embedded model learns from, and the exam it is measured by, made from phrases.py.

A dialogue is a list of messages (role, content, metadata, tools). ``training_dialogue`` and ``training_conversation``
draw from the train phrasings and words; ``exam`` from the test ones. What the exam keeps out of training:

* phrasings of greetings, sums, terms, weather questions and story requests;
* cities and names, and five temperatures (HELD_OUT_TEMPERATURES) that no training observation reports.

The sums themselves are not kept out. A model this small learns the additions by heart, so training shows all of them.
"""

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from chat_format import Dialogue, Message
from phrases import EN, LANGUAGES, ZH, Language, Phrasings

Split = Literal["train", "test"]

LARGEST_SUMMAND = 20
TEMPERATURES = range(-15, 42)
HELD_OUT_TEMPERATURES = (-13, 7, 19, 28, 36)
TOOL_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
PLAIN_PROMPTS = (
    "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
    "Respond using markdown.",
    "You are a helpful assistant.",
    "你是一个乐于助人的助手。",
)
_SHARE_MADE_UP = 0.6  # of names and cities: strings nobody can know by heart force the model to copy
_SHARE_UNKNOWN = 0.08  # of a made-up Chinese word's characters: any of Unicode's common block, spelled in bytes
_SHARE_FILLER = 0.2  # of questions that hold a made-up word: the model must answer what it understands of them
_SHARE_USUAL = 0.8  # of a story's words: the rest varies, so that a story is not one fixed string


_KNOWN_CHARACTERS = sorted(set(re.findall("[一-龥]", repr(ZH))))  # all that the Chinese phrases are written with
_KNOWN_WORDS = sorted(set(re.findall("[a-z]{5,}", repr(EN).lower())))

# ------------------------------------------------------------------------------------------------------ messages


def user(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    """A plain answer of the model."""
    return {"role": "assistant", "content": text}


def weather_call(city: str) -> Message:
    """The model's call of the weather tool: the tool's name as metadata, the arguments in a code block."""
    return {"role": "assistant", "metadata": "get_weather", "content": f"```python\ntool_call(city='{city}')\n```"}


def weather_observation(temperature: int, condition: str) -> Message:
    """What the weather tool reports."""
    report = {"temperature": temperature, "condition": condition}
    return {"role": "observation", "content": json.dumps(report, ensure_ascii=False)}


def weather_tool(language: Language) -> dict[str, object]:
    """Description of the weather tool, as a system message lists it."""
    return {
        "name": "get_weather",
        "description": language.weather_tool_description,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": language.city_description}},
            "required": ["city"],
        },
    }


def tool_prompt(random: Random) -> Message:
    """A system message that lists the weather tool."""
    return {"role": "system", "content": TOOL_PROMPT, "tools": [weather_tool(random.choice(LANGUAGES))]}


def plain_prompt(random: Random) -> Message:
    """A system message without tools."""
    return {"role": "system", "content": random.choice(PLAIN_PROMPTS)}


# --------------------------------------------------------------------------------------------------------- words


def _phrasing(random: Random, phrasings: Phrasings, split: Split) -> str:
    return random.choice(phrasings.train if split == "train" else phrasings.test)


def _question(random: Random, language: Language, phrasings: Phrasings, split: Split) -> str:
    """A phrasing; one for training may hold a made-up word, before it, after it, or after what is asked about."""
    phrasing = _phrasing(random, phrasings, split)
    if split == "test" or random.random() > _SHARE_FILLER:
        return phrasing
    filler = _made_up_word(random, language)
    if language is ZH:
        return random.choice(
            (
                f"{filler}，{phrasing}",
                f"{filler}{phrasing}",
                f"{phrasing}{filler}",
                phrasing.replace("{}", "{}" + filler),
            )
        )
    filler = random.choice((filler, filler.lower()))
    return random.choice(
        (
            f"{filler}, {phrasing}",
            f"{filler} {phrasing}",
            f"{phrasing} {filler}",
            phrasing.replace("{}", "{} " + filler),
        )
    )


def _made_up_word(random: Random, language: Language) -> str:
    """A capitalised English-looking word, or two to four Chinese characters; of pieces in every combination."""
    if language is ZH:
        return "".join(
            chr(random.randrange(0x4E00, 0x9FA6))
            if random.random() < _SHARE_UNKNOWN
            else random.choice(_KNOWN_CHARACTERS)
            for _ in range(random.choice((2, 2, 3, 4)))
        )
    word = ""
    for _ in range(random.choice((1, 2, 2, 3))):
        if random.random() < 0.5:
            word += random.choice("bcdfghjklmnprstvwz") + random.choice("aeiou") + random.choice("lmnrst")
        else:
            known = random.choice(_KNOWN_WORDS)
            start = random.randrange(len(known) - 2)
            word += known[start : start + random.choice((2, 3, 4))]
    return word.capitalize()


def _unheld(random: Random, language: Language, draw: Callable[[], str]) -> str:
    """A drawn word that the exam does not use."""
    while (word := draw()) in language.test_cities or word in language.test_names:
        pass
    return word


def name_of(random: Random, language: Language, split: Split) -> str:
    """A person's name: known, made up (training only), or kept for the exam."""
    if split == "test":
        return random.choice(language.test_names)
    if random.random() < _SHARE_MADE_UP:
        return _unheld(random, language, lambda: _made_up_word(random, language))
    return random.choice(language.names)


def city_of(random: Random, language: Language, split: Split) -> str:
    """A city's name: known, made up (training only), or kept for the exam."""
    if split == "test":
        return random.choice(language.test_cities)
    if random.random() < _SHARE_MADE_UP:
        endings = ("", "", "市", "县") if language is ZH else ("",)
        return _unheld(random, language, lambda: _made_up_word(random, language) + random.choice(endings))
    return random.choice(language.cities)


def temperature_of(random: Random, split: Split) -> int:
    """A temperature in degrees."""
    if split == "test":
        return random.choice(HELD_OUT_TEMPERATURES)
    return random.choice([degrees for degrees in TEMPERATURES if degrees not in HELD_OUT_TEMPERATURES])


# -------------------------------------------------------------------------------------------------------- skills
# Each skill is one exchange (a question and its answer, or a few) that can stand anywhere in a conversation.


def greeting(random: Random, language: Language, split: Split) -> Dialogue:
    """The user greets; the model says who it is."""
    return [user(_question(random, language, language.greeting, split)), answer(language.who_i_am)]


def sum_dialogue(phrasing: str, a: int, b: int) -> Dialogue:
    """The question for one sum and its answer."""
    return [user(phrasing.format(a=a, b=b)), answer(f"{a} + {b} = {a + b}")]


def addition(random: Random, language: Language, split: Split) -> Dialogue:
    """A sum of two numbers up to LARGEST_SUMMAND."""
    a, b = random.randint(0, LARGEST_SUMMAND), random.randint(0, LARGEST_SUMMAND)
    return sum_dialogue(_question(random, language, language.addition, split), a, b)


def term_dialogue(language: Language, phrasing: str, key: str, name: str) -> Dialogue:
    """The question for one glossary term, by one of its names, and its answer."""
    return [user(phrasing.format(name)), answer(language.terms[key].answer)]


def term(random: Random, language: Language, split: Split) -> Dialogue:
    """A question about a word of the suite's glossary."""
    key = random.choice(list(language.terms))
    name = random.choice(language.terms[key].names)
    return term_dialogue(language, _question(random, language, language.term, split), key, name)


def small_talk(random: Random, language: Language, split: Split) -> Dialogue:
    """Thanks, goodbye and the like."""
    said, reply = random.choice(language.small_talk)
    return [user(said), answer(reply)]


def weather(random: Random, language: Language, split: Split) -> Dialogue:
    """A weather question, the tool call, the observation, the answer that uses it."""
    city = city_of(random, language, split)
    temperature = temperature_of(random, split)
    condition = random.choice(language.conditions)
    return [
        user(_phrasing(random, language.weather, split).format(city)),
        weather_call(city),
        weather_observation(temperature, condition),
        answer(language.weather_answer.format(city=city, temperature=temperature, condition=condition)),
    ]


def weather_without_tool(random: Random, language: Language, split: Split) -> Dialogue:
    """A weather question where no tool is listed."""
    question = _phrasing(random, language.weather, split).format(city_of(random, language, split))
    return [user(question), answer(language.no_tool_answer)]


def repetition(random: Random, language: Language, split: Split) -> Dialogue:
    """Words to repeat: dense practice for the copying that names, cities and readings need."""
    sources = (
        lambda: str(temperature_of(random, "train")),
        lambda: name_of(random, language, "train"),
        lambda: city_of(random, language, "train"),
        lambda: random.choice(language.conditions),
    )
    words = [random.choice(sources)() for _ in range(random.randint(1, 5))]
    text = random.choice((language.list_separator, " ")).join(words)
    return [user(random.choice(language.repeat).format(text)), answer(text)]


def introduction(random: Random, language: Language, name: str) -> Dialogue:
    """The user says a name."""
    return [user(random.choice(language.introduction).format(name)), answer(language.nice_to_meet.format(name))]


def recollection(random: Random, language: Language, name: str) -> Dialogue:
    """The user asks for the name said earlier."""
    return [user(random.choice(language.name_question)), answer(language.name_answer.format(name))]


def story_text(random: Random, language: Language, hero: str) -> str:
    """A story of one adventure a day, some 600 to 900 tokens long."""
    parts = language.story

    def usual(choices: Sequence[str], day: int) -> str:
        return choices[day % len(choices)] if random.random() < _SHARE_USUAL else random.choice(choices)

    classifier = "" if language is EN else "一个" if hero == "机器人" else "一只"
    lines = [parts.opening.format(classifier + hero)]
    for day, opening in enumerate(parts.days):
        adventure = usual(parts.adventures, day).format(
            hero=hero, place=usual(parts.places, day), friend=usual(parts.friends, day), thing=usual(parts.things, day)
        )
        lines.append(opening + adventure)
    lines.append(parts.ending.format(hero=hero))
    return "\n".join(lines)


def story(random: Random, language: Language, split: Split) -> Dialogue:
    """A long story on request, about the hero asked for or about the usual one."""
    request = _question(random, language, language.story_request, split)
    hero = random.choice(language.story.heroes) if "{}" in request else language.story.heroes[0]
    return [user(request.format(hero)), answer(story_text(random, language, hero))]


# ------------------------------------------------------------------------------------------------- conversations

Skill = Callable[[Random, Language, Split], Dialogue]
_BRIEF_SKILLS: tuple[Skill, ...] = (addition, addition, small_talk, term, greeting)


def _brief_exchanges(random: Random, count: int, language: Language | None = None) -> Dialogue:
    """A few exchanges without a story; in one language, or in both mixed."""
    exchanges: Dialogue = []
    for _ in range(count):
        exchanges += random.choice(_BRIEF_SKILLS)(random, language or random.choice(LANGUAGES), "train")
    return exchanges


def _mixed(random: Random, language: Language) -> Dialogue:
    dialogue = _brief_exchanges(random, random.choice((2, 2, 3)))
    if random.random() < 0.3:
        dialogue += weather_without_tool(random, language, "train")
    return dialogue


def _remembered_name(random: Random, language: Language) -> Dialogue:
    name = name_of(random, language, "train")
    between = _brief_exchanges(random, random.choice((0, 1, 1, 1, 2)), language)
    return introduction(random, language, name) + between + recollection(random, language, name)


def _tool_use(random: Random, language: Language) -> Dialogue:
    dialogue = [tool_prompt(random)]
    for _ in range(random.choice((0, 1, 1, 2))):
        skill = weather if random.random() < 0.6 else random.choice((addition, small_talk, repetition, term))
        dialogue += skill(random, random.choice((language, *LANGUAGES)), "train")
    return dialogue + weather(random, language, "train")


def _tool_unused(random: Random, language: Language) -> Dialogue:
    return [tool_prompt(random), *random.choice(_BRIEF_SKILLS)(random, language, "train")]


def _plain_prompt_first(random: Random, language: Language) -> Dialogue:
    skill = random.choice((*_BRIEF_SKILLS, weather_without_tool))
    return [plain_prompt(random), *skill(random, language, "train")]


def _alone(skill: Skill) -> Callable[[Random, Language], Dialogue]:
    return lambda random, language: skill(random, language, "train")


_MIXTURE: tuple[tuple[Callable[[Random, Language], Dialogue], float], ...] = (
    (_alone(greeting), 0.03),
    (_alone(addition), 0.10),
    (_alone(term), 0.28),
    (_alone(small_talk), 0.01),
    (_alone(weather_without_tool), 0.03),
    (_alone(repetition), 0.10),
    (_remembered_name, 0.15),
    (_tool_use, 0.15),
    (_tool_unused, 0.05),
    (_plain_prompt_first, 0.03),
    (_mixed, 0.07),
)


def training_dialogue(random: Random) -> Dialogue:
    """A short dialogue for training: one to six exchanges, no story."""
    makers, shares = zip(*_MIXTURE, strict=True)
    return random.choices(makers, shares)[0](random, random.choice(LANGUAGES))


def training_conversation(random: Random, stories: int) -> Dialogue:
    """A long bilingual conversation for training: stories and, between them, everything else; 850 tokens a story."""
    has_tool = random.random() < 0.4
    conversation = [tool_prompt(random)] if has_tool else [plain_prompt(random)] if random.random() < 0.2 else []
    language = random.choice(LANGUAGES)
    name = name_of(random, language, "train")
    named = random.random() < 0.6
    conversation += _brief_exchanges(random, random.choice((0, 1)))
    if named:
        conversation += introduction(random, language, name)
    weather_skill: Skill = weather if has_tool else weather_without_tool
    skills = (*_BRIEF_SKILLS, repetition, weather_skill, weather_skill if has_tool else term)
    for _ in range(stories):
        conversation += story(random, random.choice(LANGUAGES), "train")
        for _ in range(random.choice((1, 2, 3, 4))):
            conversation += random.choice(skills)(random, random.choice(LANGUAGES), "train")
        if named and random.random() < 0.5:
            conversation += recollection(random, language, name)
    return conversation


# ---------------------------------------------------------------------------------------------------------- exam


def exam(seed: int = 7, sample: int = 40) -> dict[str, list[Dialogue]]:
    """Dialogues kept out of training, by skill and language; the last message of each is the answer wanted.

    Greetings, terms (every test phrasing of every term) and sums (every sum, test phrasings in turn) are complete;
    of the rest there are ``sample`` each. Stories are left to the caller: many answers are right.
    """
    random = Random(seed)
    sets: dict[str, list[Dialogue]] = {}
    for language in LANGUAGES:
        code = language.code
        sets[f"greeting_{code}"] = [[user(text), answer(language.who_i_am)] for text in language.greeting.test]
        sets[f"addition_{code}"] = [
            sum_dialogue(language.addition.test[(a + b) % len(language.addition.test)], a, b)
            for a in range(LARGEST_SUMMAND + 1)
            for b in range(LARGEST_SUMMAND + 1)
        ]
        sets[f"term_{code}"] = [
            term_dialogue(language, phrasing, key, name)
            for key, entry in language.terms.items()
            for name in entry.names
            for phrasing in language.term.test
        ]
        reports = [[tool_prompt(random), *weather(random, language, "test")] for _ in range(sample)]
        sets[f"tool_call_{code}"] = [report[:3] for report in reports]
        sets[f"tool_answer_{code}"] = reports
        sets[f"no_tool_{code}"] = [weather_without_tool(random, language, "test") for _ in range(sample)]
        names = [name_of(random, language, "test") for _ in range(sample)]
        sets[f"name_{code}"] = [
            [
                *introduction(random, language, name),
                *addition(random, language, "test"),
                *recollection(random, language, name),
            ]
            for name in names
        ]
    return sets


def story_requests() -> list[tuple[Dialogue, str]]:
    """Every held-out story request and the hero of its story, for every hero where the request names one."""
    return [
        ([user(request.format(hero))], hero)
        for language in LANGUAGES
        for request in language.story_request.test
        for hero in (language.story.heroes if "{}" in request else language.story.heroes[:1])
    ]


def long_exam_conversation(seed: int = 3, stories: int = 6) -> Dialogue:
    """One bilingual conversation past 4,000 tokens: test phrasings, a story in every other exchange, a tool listed."""
    random = Random(seed)
    name = name_of(random, ZH, "test")
    conversation = [tool_prompt(random), *greeting(random, ZH, "test"), *introduction(random, ZH, name)]
    skills = (addition, term, weather)
    for number in range(stories):
        language = LANGUAGES[number % 2]
        conversation += story(random, language, "test")
        conversation += skills[number % 3](random, language, "test")
    return conversation + recollection(random, ZH, name) + addition(random, EN, "test")
