"""Everything the embedded model's dialogues are made of, in Chinese and English: questions, answers, word lists.

Questions come in two lots. ``train`` phrasings are the only ones that training draws from; ``test`` phrasings are kept
for the exam (evaluate.py and the suite's tests). ``Phrasings`` refuses two lots that share one, blanks, punctuation
and upper case apart.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Phrasings:
    """Ways to put one question: those to train on and those to examine with. ``{}`` marks what is asked about."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        train, test = (
            {re.sub(r"[\s.,:!?。，！？]", "", text.casefold()) for text in lot} for lot in (self.train, self.test)
        )
        if shared := train & test:
            raise ValueError(f"phrasings both trained and examined: {sorted(shared)}")


@dataclass(frozen=True)
class Term:
    """A word of the suite's glossary: the names it goes by and its explanation."""

    names: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Story:
    """The parts of a long story: an opening, one adventure a day, an ending."""

    opening: str
    days: tuple[str, ...]
    adventures: tuple[str, ...]
    ending: str
    heroes: tuple[str, ...]
    places: tuple[str, ...]
    friends: tuple[str, ...]
    things: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """All phrases and words of one language."""

    code: str
    greeting: Phrasings
    who_i_am: str
    addition: Phrasings
    term: Phrasings
    terms: dict[str, Term]
    small_talk: tuple[tuple[str, str], ...]
    introduction: tuple[str, ...]
    nice_to_meet: str
    name_question: tuple[str, ...]
    name_answer: str
    names: tuple[str, ...]
    test_names: tuple[str, ...]
    weather: Phrasings
    cities: tuple[str, ...]
    test_cities: tuple[str, ...]
    conditions: tuple[str, ...]
    weather_answer: str
    no_tool_answer: str
    weather_tool_description: str
    city_description: str
    repeat: tuple[str, ...]
    list_separator: str
    story_request: Phrasings
    story: Story


def combine(*parts: Iterable[str]) -> tuple[str, ...]:
    """Every way to pick one string from each part, joined: the cheap way to many phrasings.

    Example:
        >>> combine(("", "Please "), ("explain {}",), (".",))
        ('explain {}.', 'Please explain {}.')
    """
    return tuple("".join(choice) for choice in product(*parts))


def words(text: str) -> tuple[str, ...]:
    """The blank-separated words of a text."""
    return tuple(text.split())


# ------------------------------------------------------------------------------------------------------ Chinese

_ZH_TERM_QUESTIONS = (
    *("什么是{}", "{}是什么", "{}是什么意思", "{}指的是什么", "{}有什么用", "{}的含义是什么", "{}的定义是什么"),
    *("怎么理解{}", "如何理解{}", "{}是做什么的", "{}是怎么回事"),
)
_ZH_TERM_REQUESTS = (
    *("解释{}", "解释一下{}", "介绍一下{}", "介绍{}这个词", "说说{}", "讲讲{}", "讲一下{}", "说明{}", "谈谈{}"),
    *("描述一下{}", "解释什么是{}", "说明{}是什么", "讲一讲{}是什么意思"),
)
_ZH_TERM_PHRASINGS = Phrasings(
    train=(
        *combine(
            ("", "请问", "请问一下，", "告诉我", "我想知道", "我不知道", "那么，"), _ZH_TERM_QUESTIONS, ("", "？", "。")
        ),
        *combine(("你知道", "你能告诉我", "可以告诉我", "你清楚"), _ZH_TERM_QUESTIONS, ("吗？", "吗")),
        *combine(("", "请", "请你", "帮我", "我想请你", "现在", "麻烦你"), _ZH_TERM_REQUESTS, ("", "。", "！")),
        *combine(("可以", "能", "你能", "能不能", "可不可以"), _ZH_TERM_REQUESTS, ("吗？", "？")),
        *combine(("我想了解{}", "我不太明白{}", "我没听说过{}", "{}", "我看不懂{}这个词", "关于{}"), ("", "。", "？")),
        *combine(("我不太明白{}，", "我想了解{}，", "{}我没学过，"), ("请解释。", "可以讲讲吗？", "它是什么？")),
    ),
    test=(
        *("能不能解释一下{}是什么？", "麻烦介绍{}", "我不懂{}，请说明一下。", "到底什么是{}？", "{}究竟是什么？"),
        *("给我讲讲什么是{}吧。", "老师，{}是什么意思呀？"),
    ),
)

_ZH_TERMS = {
    "kv_cache": Term(
        ("KV 缓存", "KV缓存", "KV cache", "键值缓存"),
        "KV 缓存保存每一层已经算过的键和值。生成新的词元时，只需计算这一个词元，再与缓存里的键和值做注意力，"
        "因此不必重算整段前文。",
    ),
    "prefill": Term(
        ("预填充", "prefill", "预填充阶段"),
        "预填充是生成的第一步：模型一次读完整个提示，并行算出每个位置的键和值，写进 KV 缓存，"
        "再给出第一个新词元的分数。",
    ),
    "decode_step": Term(
        ("解码步", "解码步骤", "decode step", "解码"),
        "解码步在预填充之后：模型每一步只输入上一个词元，读出 KV 缓存，得到下一个词元，直到遇到结束符。",
    ),
    "logits": Term(
        ("logits", "logit"),
        "logits 是模型在最后一个位置输出的原始分数，词表里每个词元一个。经过 softmax 之后，它们就变成概率。",
    ),
    "top_p": Term(
        ("top-p", "核采样", "top-p 采样", "top_p"),
        "top-p 采样先把词元按概率从大到小排列，只保留累计概率刚好达到 p 的那一部分，然后在其中随机抽取。",
    ),
    "top_k": Term(
        ("top-k", "top-k 采样", "top_k"),
        "top-k 采样只保留概率最大的 k 个词元，其余的概率设为零，再从这 k 个里随机抽取。",
    ),
    "temperature": Term(
        ("温度参数", "temperature", "采样温度"),
        "温度参数用来除 logits。温度低于一时分布更尖，回答更稳定；高于一时分布更平，回答更多样。",
    ),
    "token": Term(
        ("词元", "token"),
        "词元是模型读写文字的最小单位，可以是一个字、一个词的一部分，或者一个字节。分词器负责在文字和词元之间转换。",
    ),
    "rope": Term(
        ("旋转位置编码", "RoPE"),
        "旋转位置编码按照位置把查询和键的分量成对旋转，这样注意力分数只取决于两个词元的相对距离。",
    ),
    "multi_query_attention": Term(
        ("多查询注意力", "分组查询注意力", "MQA"),
        "多查询注意力让许多查询头共用少数几组键和值。ChatGLM3-6B 有 32 个查询头，只有 2 组键和值，所以缓存小得多。",
    ),
    "quantization": Term(
        ("量化", "模型量化"),
        "量化用更少的比特表示权重，例如八比特或四比特整数加一个缩放因子，这样模型更小，但会有一点误差。",
    ),
    "context_length": Term(
        ("上下文长度", "context length"),
        "上下文长度是已经缓存了键和值的词元数。它随着对话增长，每多一个词元，KV 缓存就大一点。",
    ),
    "reserved_memory": Term(
        ("保留显存", "已分配显存", "slack", "余量", "reserved memory", "allocated memory"),
        "已分配显存是活着的张量占的字节；保留显存是分配器向驱动要来的字节；slack 是两者之差，"
        "也就是要来了却没用上的部分。",
    ),
    "segment": Term(
        ("显存段", "segment", "显存块", "block", "内存段", "内存块"),
        "段是分配器用一次 cudaMalloc 向驱动要来的一片显存。块是段的一部分，每个张量住在一个块里；"
        "相邻的空闲块会合并，段却不会还给驱动。",
    ),
}

ZH = Language(
    code="zh",
    greeting=Phrasings(
        train=(
            *("你好", "您好", "你好！", "你好。", "你好啊", "嗨", "你是谁？", "你是谁", "你叫什么？", "介绍一下你自己"),
            *("请自我介绍", "早上好", "晚上好", "下午好", "哈喽", "你好，你是谁？", "请问你是谁？", "你是什么模型？"),
            *("你会做什么？", "你能做什么", "你好，介绍一下你自己。", "大家好", "您好，请问您是谁？"),
        ),
        test=("你好呀", "你好，请自我介绍一下", "嗨，你是谁？", "你好👋", "您好！你是谁？"),
    ),
    who_i_am="你好👋！我是 TinyGLM，一个按照 ChatGLM3-6B 的结构从头训练的微型模型。"
    "我会做小加法、解释几个术语、查天气和讲长故事。",
    addition=Phrasings(
        train=(
            *combine(
                ("", "请问", "请计算 ", "算一下", "告诉我"),
                ("{a}加{b}", "{a} + {b}", "{a}+{b}"),
                ("", "等于多少？", "等于几？"),
            ),
            *combine(("{a} + {b}", "{a}+{b}"), (" = ?", "=？", "=", "是多少？", "得多少？")),
            *(
                "{a} 加 {b} 是多少？",
                "{a}加上{b}是几？",
                "{a} 与 {b} 相加得多少？",
                "计算{a}和{b}的和。",
                "把{a}和{b}加起来。",
                "{a}再加{b}是多少？",
                "你能算出 {a} + {b} 吗？",
                "能告诉我{a}加{b}等于几吗？",
                "求{a}与{b}的和",
                "如果有{a}个，又来{b}个，一共多少？",
            ),
        ),
        test=("{a}和{b}的和是多少？", "{a} 加上 {b} 等于几？", "帮我算 {a}+{b}", "你知道 {a} + {b} 等于多少吗？"),
    ),
    term=_ZH_TERM_PHRASINGS,
    terms=_ZH_TERMS,
    small_talk=(
        ("谢谢", "不客气！"),
        ("谢谢你", "不客气！"),
        ("今天很开心", "听到这个我也很高兴。"),
        ("好的", "好的，还有什么可以帮你？"),
        ("再见", "再见！"),
    ),
    introduction=(
        "我叫{}。",
        "我的名字是{}",
        "你好，我叫{}。",
        "我是{}，记住我的名字。",
        "大家都叫我{}。",
        "我叫{}，请记住。",
    ),
    nice_to_meet="你好，{}！很高兴认识你。",
    name_question=("我叫什么名字？", "你还记得我的名字吗？", "我是谁？", "请问我叫什么？", "说出我的名字"),
    name_answer="你叫{}。",
    names=(
        *combine("小阿老", "明红华丽强芳军梅宇雪杰婷龙云星月"),
        *combine(
            "王李张刘陈杨赵黄周吴徐孙马朱胡郭何林高罗", words("伟 娜 静 洋 涛 敏 磊 霞 勇 子轩 思远 雨桐 欣怡 浩然")
        ),
    ),
    test_names=("江海", "林泉", "高峰", "山田"),
    weather=Phrasings(
        train=(
            *(
                "{}今天天气怎么样？",
                "{}的天气如何？",
                "查一下{}的天气",
                "请问{}现在多少度？",
                "今天{}会下雨吗？",
                "{}天气",
            ),
            *(
                "帮我看看{}的天气。",
                "我想知道{}今天的天气",
                "{}天气怎么样？",
                "{}现在冷吗？",
                "{}热不热？",
                "{}的气温是多少？",
            ),
            *("告诉我{}的天气。", "今天{}天气好吗？", "请查{}的天气。", "那{}呢？"),
            *combine(
                ("", "请问", "请问今天", "今天", "现在", "我想知道", "查一下", "帮我查查", "告诉我"),
                ("{}的天气", "{}的气温", "{}天气", "{}的温度", "{}冷不冷", "{}有多热"),
                ("", "？", "。"),
            ),
        ),
        test=("{}今天的天气怎么样？", "能帮我查一下{}的天气吗？", "{}现在天气如何？", "请问今天{}的气温是多少度？"),
    ),
    cities=words(
        "北京 上海 广州 深圳 杭州 南京 成都 重庆 武汉 西安 天津 苏州 长沙 青岛 大连 厦门 昆明 哈尔滨 沈阳 济南 "
        "郑州 福州 合肥 "
        "南昌 贵阳 南宁 海口 兰州 银川 西宁 拉萨 乌鲁木齐 太原 石家庄 长春 宁波 无锡 桂林 三亚 珠海 香港 澳门 台北 "
        "东京 巴黎 "
        "伦敦 纽约 柏林 罗马 悉尼"
    ),
    test_cities=("松江", "湖州", "石河", "海丰", "竹山", "泉州"),
    conditions=words("晴 多云 阴 小雨 中雨 大雨 雷阵雨 小雪 大雪 雾 大风 晴间多云 阵雨 霾 雨夹雪"),
    weather_answer="{city}现在的气温是 {temperature} 度，天气{condition}。",
    no_tool_answer="抱歉，没有天气工具，我查不到天气。",
    weather_tool_description="查询城市天气",
    city_description="城市名",
    repeat=("跟我说：{}", "请重复：{}", "重复一遍：{}", "请说“{}”"),
    list_separator="，",
    story_request=Phrasings(
        train=(
            *combine(
                ("", "请", "给我", "请给我", "再"),
                ("写一个", "讲一个", "来一个"),
                ("长故事", "很长的故事"),
                ("", "。", "吧。"),
            ),
            *combine(("", "请", "给我", "再"), ("写一个", "讲一个"), ("关于{}的长故事",), ("", "。")),
        ),
        test=("我想听一个长故事。", "请你写一个长故事", "能给我讲一个很长的故事吗？", "请给我讲一个关于{}的长故事吧。"),
    ),
    story=Story(
        opening="从前，有{}，它决定去很远的地方旅行。",
        days=tuple(
            f"第{number}天，"
            for number in words("一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十")
        ),
        adventures=(
            "早晨，{hero}来到{place}，遇见了{friend}。{friend}说：“如果你肯帮忙，我就送你{thing}。”"
            "{hero}高兴地答应了，一直忙到天黑。",
            "下起了雨，{hero}只好在{place}躲雨。{friend}走过来，递给它{thing}，又讲了一段从前的故事。"
            "{hero}听得入了迷。",
            "{hero}在{place}迷了路。正当它发愁的时候，{friend}拿着{thing}出现了，带它找到了正确的方向。"
            "它们成了好朋友。",
        ),
        ending="最后，{hero}带着所有的礼物回到了家。它把这些故事讲给每一个朋友听。故事讲完了。",
        heroes=("小狐狸", "小猫", "小熊", "小兔子", "小象", "机器人", "小狗", "企鹅"),
        places=words("森林 河边 山谷 村庄 海岛 花园 沙漠 城堡 雪山 灯塔 集市 草原 图书馆 码头"),
        friends=words("老乌龟 白鸽 松鼠 青蛙 老船长 铁匠 画家 鲸鱼 牧羊人 花匠 裁缝 猫头鹰 小女孩 老师"),
        things=words(
            "一把钥匙 一张地图 一盏灯 一本书 一块石头 一把伞 一封信 一面镜子 一顶帽子 一只铃铛 一袋种子 一根绳子 "
            "一支笔 一颗星星"
        ),
    ),
)

# ------------------------------------------------------------------------------------------------------ English

_EN_TERM_QUESTIONS = (
    *("hat is {}", "hat does {} mean", "hat is {} for", "hat do you mean by {}", "hat exactly is {}"),
    *("hat is the meaning of {}", "hat is meant by {}"),
)
_EN_TERM_REQUESTS = (
    *("explain {}", "describe {}", "define {}", "tell me about {}", "tell me what {} is", "explain what {} is"),
    *("explain to me what {} means", "give me a definition of {}", "describe {} in simple words", "say what {} is"),
)
_EN_TERM_PHRASINGS = Phrasings(
    train=(
        *combine(("W", "w", "So, w", "Hi, w", "I wonder: w", "Tell me, w"), _EN_TERM_QUESTIONS, ("?", "")),
        *combine(("", "Please ", "please ", "I want you to ", "Now "), _EN_TERM_REQUESTS, (".", "")),
        *combine(("Can you ", "Could you ", "Would you ", "can you "), _EN_TERM_REQUESTS, ("?", ", please?")),
        *combine(("How does {} work", "how does {} work"), ("?", "")),
        *combine(("I want to learn about {}", "I wonder what {} is", "I am not sure what {} means"), (".", "")),
        *combine(("I have forgotten what {} is. ", "I am new to {}. "), ("Please help.", "Can you tell me?")),
        *("{}", "{}?", "Do you know {}?", "Tell me: what {} is", "I did not get {}. Explain it."),
    ),
    test=(
        *("Could you please explain what {} is?", "Please tell me something about {}.", "Do you know what {} means?"),
        *("I do not understand {}. Please explain.", "Help me understand {}.", "{}, what is that?"),
    ),
)

_EN_TERMS = {
    "kv_cache": Term(
        ("the KV cache", "KV cache", "a KV cache", "the key-value cache"),
        "The KV cache stores the keys and values that each layer has already computed. For a new token only that token "
        "is computed, and it attends to the cached keys and values, so the prefix is not computed again.",
    ),
    "prefill": Term(
        ("prefill", "the prefill", "the prefill phase"),
        "Prefill is the first step of generation: the model reads the whole prompt at once, computes the keys and "
        "values "
        "of every position in parallel, writes them to the KV cache, and gives the scores of the first new token.",
    ),
    "decode_step": Term(
        ("a decode step", "the decode step", "decode step", "decoding"),
        "Decode steps come after prefill: at each step the model takes only the last token, reads the KV cache, and "
        "gives the next token, until it meets a stop token.",
    ),
    "logits": Term(
        ("logits", "a logit", "the logits"),
        "Logits are the model's raw output for the last position, one number for each token of the vocabulary. "
        "After softmax they become probabilities.",
    ),
    "top_p": Term(
        ("top-p", "nucleus sampling", "top-p sampling", "top_p"),
        "Top-p sampling sorts the tokens by probability, keeps the smallest set whose total probability reaches p, "
        "and samples from that set.",
    ),
    "top_k": Term(
        ("top-k", "top-k sampling", "top_k"),
        "Top-k sampling keeps the k tokens with the highest probability, sets the others to zero, "
        "and samples from those k.",
    ),
    "temperature": Term(
        ("the temperature parameter", "temperature", "sampling temperature"),
        "The temperature divides the logits. Below one the distribution is sharper and answers are steadier; "
        "above one it is flatter and answers vary more.",
    ),
    "token": Term(
        ("a token", "token", "tokens"),
        "A token is the smallest unit of text that the model reads and writes: a character, a part of a word, or a "
        "byte. "
        "The tokenizer converts between text and tokens.",
    ),
    "rope": Term(
        ("RoPE", "rotary position embedding"),
        "RoPE rotates pairs of components of the queries and keys by an angle that depends on the position, "
        "so that the attention score depends only on the distance between two tokens.",
    ),
    "multi_query_attention": Term(
        ("multi-query attention", "grouped-query attention", "MQA"),
        "In multi-query attention many query heads share a few groups of keys and values. ChatGLM3-6B has 32 query "
        "heads "
        "but only 2 groups, so its cache is much smaller.",
    ),
    "quantization": Term(
        ("quantization", "model quantization"),
        "Quantization stores the weights in fewer bits, for example eight-bit or four-bit numbers with a scale, "
        "so that the model is smaller at the cost of a small error.",
    ),
    "context_length": Term(
        ("context length", "the context length"),
        "The context length is the number of tokens whose keys and values are cached. It grows with the conversation, "
        "and each token makes the KV cache a little larger.",
    ),
    "reserved_memory": Term(
        ("reserved memory", "allocated memory", "slack", "the slack"),
        "Allocated memory is what live tensors hold; reserved memory is what the allocator took from the driver; "
        "slack is the difference: taken but not in use.",
    ),
    "segment": Term(
        ("a segment", "segment", "a block", "block", "a memory segment", "a memory block"),
        "A segment is the memory that the allocator gets from the driver with one cudaMalloc. A block is a part of a "
        "segment and holds one tensor; free neighbours merge, but segments do not go back to the driver.",
    ),
}

EN = Language(
    code="en",
    greeting=Phrasings(
        train=(
            *(
                "hello",
                "Hello",
                "Hello!",
                "hi",
                "Hi",
                "Hi!",
                "hello there",
                "Who are you?",
                "who are you",
                "What are you?",
            ),
            *(
                "Introduce yourself.",
                "Good morning",
                "Good evening",
                "Hey",
                "Hello, who are you?",
                "Hi there!",
                "Hello.",
            ),
            *("What can you do?", "Which model are you?", "Please introduce yourself.", "Hi. What are you?"),
        ),
        test=("Hey there", "Hello. Please introduce yourself.", "Hey, who are you?", "Hi, who are you?"),
    ),
    who_i_am="Hello👋! I am TinyGLM, a tiny model trained from scratch with the architecture of ChatGLM3-6B. "
    "I can add small numbers, explain a few terms, check the weather and tell a long story.",
    addition=Phrasings(
        train=(
            *combine(
                ("What is ", "what is ", "How much is ", "Tell me "),
                ("{a} + {b}", "{a}+{b}", "{a} plus {b}"),
                ("?", ""),
            ),
            *combine(
                ("", "Add {a} and {b}: ", "Calculate ", "Compute "), ("{a} + {b}", "{a}+{b}", "{a} plus {b}"), ("", ".")
            ),
            *("{a} + {b} = ?", "{a}+{b}=", "{a} + {b} =", "Add {a} and {b}.", "add {a} and {b}", "{a} plus {b}?"),
            *(
                "Give me the sum of {a} and {b}.",
                "If I add {b} to {a}, what do I get?",
                "{a} and {b} make what?",
                "Can you add {b} to {a}?",
                "Do you know what {a} + {b} is?",
                "I have {a} and get {b} more. How many now?",
            ),
        ),
        test=("What is the sum of {a} and {b}?", "Please add {a} and {b}.", "What do I get for {a} + {b}?"),
    ),
    term=_EN_TERM_PHRASINGS,
    terms=_EN_TERMS,
    small_talk=(
        ("Thanks", "You are welcome!"),
        ("Thank you", "You are welcome!"),
        ("I am happy today", "I am glad to hear that."),
        ("OK", "OK. What else can I do for you?"),
        ("Bye", "Goodbye!"),
    ),
    introduction=(
        "My name is {}.",
        "I am {}.",
        "Hello, my name is {}.",
        "Please remember that my name is {}.",
        "You can call me {}.",
        "I'm {}.",
    ),
    nice_to_meet="Nice to meet you, {}!",
    name_question=(
        "What is my name?",
        "Do you remember my name?",
        "Who am I?",
        "Can you tell me my name?",
        "what's my name",
    ),
    name_answer="Your name is {}.",
    names=words(
        "Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Leo Mia Noah Olivia Peter Quinn Rosa Sam Tina "
        "Umar "
        "Vera Will Xena Yuri Zoe Anna Ben Clara Dan Eva Felix Gina Hugo Ivan Julia Karl Lucy Max Nina Oscar Paul Ruth "
        "Sara Tom Una Victor Wendy Adam Bella Chris Diana Eric Fiona George Helen"
    ),
    test_names=("Marvin", "Tobias", "Lorena", "Pavel"),
    weather=Phrasings(
        train=(
            *("What is the weather in {}?", "How is the weather in {} today?", "What's the weather like in {}?"),
            *(
                "Tell me the weather in {}.",
                "Is it raining in {}?",
                "Check the weather in {}, please.",
                "weather in {}",
            ),
            *(
                "How warm is it in {} now?",
                "Is it cold in {}?",
                "What is the temperature in {}?",
                "weather in {} today",
            ),
            *("Please check the weather in {}.", "And in {}?", "Look up the weather in {}.", "How hot is {} today?"),
            *combine(
                ("", "Please tell me ", "I want to know ", "Show me ", "Get ", "Look up "),
                ("the weather in {}", "the weather of {}", "today's weather in {}", "the temperature in {}"),
                ("", ".", " now."),
            ),
        ),
        test=("What is the weather like in {} today?", "Can you check the weather in {}?", "How is the weather in {}?"),
    ),
    cities=words(
        "Beijing Shanghai London Paris Berlin Tokyo Rome Madrid Sydney Boston Chicago Dublin Oslo Vienna Prague Lisbon "
        "Athens Cairo Delhi Seoul Moscow Toronto Seattle Denver Austin Miami Milan Munich Geneva Zurich Warsaw "
        "Helsinki "
        "Stockholm Amsterdam Brussels Singapore Bangkok Jakarta Nairobi Lima"
    ),
    test_cities=("Porto", "Lagos", "Dallas", "Havana", "Bergen", "Tunis"),
    conditions=(
        *("sunny", "cloudy", "overcast", "light rain", "heavy rain", "thunderstorm", "light snow", "heavy snow"),
        *("foggy", "windy", "partly cloudy", "showers", "clear", "hazy", "sleet"),
    ),
    weather_answer="The temperature in {city} is {temperature} degrees and the weather is {condition}.",
    no_tool_answer="Sorry, I have no weather tool, so I cannot check the weather.",
    weather_tool_description="Get the weather of a city",
    city_description="City name",
    repeat=("Say: {}", "Repeat: {}", "Please repeat after me: {}", 'Say "{}"'),
    list_separator=" ",
    story_request=Phrasings(
        train=(
            *combine(("", "Please "), ("tell me a long story", "write a long story", "tell a long story"), ("", ".")),
            *combine(
                ("Tell me ", "Write ", "Write me ", "I would like "), ("a long story", "a very long story"), ("", ".")
            ),
            *combine(("Tell me ", "Write ", "Please write ", "tell "), ("a long story about a {}",), ("", ".")),
            *("Tell me another long story.", "Tell me another long story about a {}.", "Write another long story."),
        ),
        test=(
            "Could you tell me a long story?",
            "I want to hear a long story.",
            "Please tell me a long story about a {}.",
        ),
    ),
    story=Story(
        opening="Once upon a time there was a {} who wanted to see the world.",
        days=tuple(
            f"On the {number} day, "
            for number in words(
                "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
            )
        ),
        adventures=(
            "in the morning, the {hero} came to the {place} and met the {friend}. The {friend} said: "
            '"If you help me, I will give you {thing}." The {hero} was glad and worked until it was dark.',
            "it began to rain, and the {hero} had to wait in the {place}. The {friend} came by with {thing} "
            "and told an old tale. The {hero} listened with wide eyes.",
            "the {hero} lost its way near the {place}. Just then the {friend} appeared with {thing} "
            "and showed the right road. They became good friends.",
        ),
        ending="In the end the {hero} went home with all the gifts and told the story to every friend. The end.",
        heroes=("fox", "cat", "bear", "rabbit", "elephant", "robot", "dog", "penguin"),
        places=words(
            "forest river valley village island garden desert castle mountain lighthouse market meadow library harbor"
        ),
        friends=words(
            "turtle pigeon squirrel frog captain blacksmith painter whale shepherd gardener tailor owl girl teacher"
        ),
        things=(
            *(
                "a key",
                "a map",
                "a lamp",
                "a book",
                "a stone",
                "an umbrella",
                "a letter",
                "a mirror",
                "a hat",
                "a bell",
            ),
            *("a bag of seeds", "a rope", "a pen", "a star"),
        ),
    ),
)

LANGUAGES = (ZH, EN)
