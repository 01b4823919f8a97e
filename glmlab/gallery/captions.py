"""What stands under each figure in a text, in both languages: what is shown and how to read it."""

from typing import Any

from glmlab.figures.settings import current_settings

CAPTIONS = {
    "bytes_by_precision": {
        "en": "What ChatGLM3-6B needs in each precision, computed from its config: weights by component, what "
        "quantisation keeps beside them, keys and values of {tokens:,} tokens in 16 bits, and a CUDA context. The "
        "dashed line is the memory of the chapter's card; what the allocator holds idle comes on top.",
        "zh": "ChatGLM3-6B 在各精度下所需的記憶體，由設定檔算出：按成分的權重、量化參數、{tokens:,} 個 token 以 16 位元"
        "存放的鍵與值，以及 CUDA 上下文。虛線為原章節所用顯示卡的記憶體；配置器所留的閒置部分須另計。",
    },
    "class_hierarchy": {
        "en": "Classes of ChatGLM3-6B in transformers, read from the live classes. Hollow arrows point to what is "
        "inherited, filled diamonds stand at the class that holds the other, dashed arrows lead from the model type "
        "of a config to the class that is built. Members in italics are abstract or overridden in the picture.",
        "zh": "ChatGLM3-6B 在 transformers 中的類別，讀自執行中的類別。空心箭頭指向所繼承者，實心菱形位於持有者一端，"
        "虛線箭頭由設定檔的模型類型導向所建立的類別。斜體成員為抽象成員，或在圖中被覆寫。",
    },
    "original_hierarchy": {
        "en": "Classes of the published ChatGLM3-6B code, on transformers 4.38, as far as a chat uses them, read "
        "from source that was not executed. Hollow arrows point to what is inherited, filled diamonds stand at the "
        "class that holds the other, dashed arrows lead from an Auto class to the class that is built.",
        "zh": "已發布的 ChatGLM3-6B 程式碼中聊天所用到的類別（transformers 4.38），讀自未經執行的原始碼。空心箭頭指向"
        "所繼承者，實心菱形位於持有者一端，虛線箭頭由 Auto 類別導向所建立的類別。",
    },
    "module_tree": {
        "en": "Modules of the embedded model with their parameters, bytes and the shape that each returns in one "
        "decode step. Equal layers are one row. Dark bars add up to the whole; a light bar contains the dark ones of "
        "its parts.",
        "zh": "內附模型的模組，附參數數量、位元組數與每個解碼步傳回的形狀。相同的層合為一列。深色長條合計為全部；淺色"
        "長條包含其各部分的深色長條。",
    },
    "decode_steps": {
        "en": "Decode steps of the embedded model, sampled on a CPU. From top to bottom: how surprising the chosen "
        "token was, how many candidates each processor or warper leaves over, the KV cache, and the time of the acts "
        "of a step, which is measured.",
        "zh": "內附模型在 CPU 上取樣生成的解碼步。由上而下：所選 token 的意外程度、每個處理器之後剩餘的候選數、KV 快"
        "取，以及每步各幕的用時（實測）。",
    },
    "decode_step_candidates": {
        "en": "The best candidates of one decode step of the embedded model, before and behind each processor and "
        "warper. A row is the same token in every panel; the hatched orange bar is the token that was drawn in the "
        "end.",
        "zh": "內附模型某個解碼步的最佳候選，在各處理器之前與之後。各圖中同一列為同一 token；帶斜線的橙色長條為最終抽"
        "中的 token。",
    },
    "logit_lens": {
        "en": "Logit lens on one decode step of the embedded model: the best tokens if norm and head were applied "
        "after each layer, darker where they are likelier. The frame marks the token that the step chose.",
        "zh": "內附模型某個解碼步的 logit lens：若在各層之後套用歸一化與輸出層，最佳的 token 為何；顏色越深機率越高。"
        "橙框標出該步選出的 token。",
    },
    "prompt_tokens": {
        "en": "A prompt with all four roles as the embedded model reads it. A chip is a token, its id below; strong "
        "colours are special tokens, tints are text, and the role stands at the left. Blanks are ␣, line breaks ↵; a "
        "character without a glyph is its code point, with the byte that the token holds.",
        "zh": "含全部四種角色的一則提示，如內附模型所讀。每格為一個 token，其編號在下；深色為特殊 token，淺色為文字，"
        "角色列於左側。空格為 ␣，換行為 ↵；沒有字形的字元以碼位表示，並附該 token 所持的位元組。",
    },
    "prompt_roles": {
        "en": "Which role may follow which in a ChatGLM3 prompt: a row is the role that came last, a column the next "
        "one. Computed by asking the checker pair by pair.",
        "zh": "ChatGLM3 提示中各角色之後可接哪些角色：列為上一則的角色，欄為下一則。由檢查程式逐對判定。",
    },
    "prompt_formats": {
        "en": "The same four messages in the chat formats of several model families. Strong colours are what the "
        "format adds, tints are the messages.",
        "zh": "同樣的四則訊息在數個模型家族的聊天格式中的樣子。深色為格式所加，淺色為訊息本身。",
    },
    "prompt_growth": {
        "en": "The prompt of every turn of a chat with the embedded model. The plain part is the prompt of the turn "
        "before and the hatched part its answer: both are in the KV cache. Only the dotted part is read anew.",
        "zh": "與內附模型對話時各輪的提示。素色部分為前一輪的提示，斜線部分為其回答，兩者皆已在 KV 快取中；只有點狀部"
        "分需要重新讀入。",
    },
    "memory_vs_context": {
        "en": "Memory of a chat with the embedded model against the length of its context. Dots are measured, one a "
        "turn: the resident memory of the process on a CPU. The dashed line is the exact KV payload. Hollow marks "
        "are what the chapter reports for ChatGLM3-6B in int4 on an RTX 4060 Laptop, another model: compare the "
        "shape, not the height.",
        "zh": "與內附模型對話時記憶體隨上下文長度的變化。圓點為實測，每輪一點：行程在 CPU 上的常駐記憶體。虛線為精確"
        "的 KV 資料量。空心記號為原章節就 int4 的 ChatGLM3-6B 在 RTX 4060 Laptop 上所述，是另一個模型：請比較形狀，而"
        "非高度。",
    },
    "memory_forecast": {
        "en": "Memory of ChatGLM3-6B for one long answer, forecast without a GPU (solid lines, thicker for fewer "
        "bits): what the replayed allocator takes, and a CUDA context. Dots are the embedded model, measured on a "
        "CPU; hollow marks are what the chapter reports for int4 on an RTX 4060 Laptop.",
        "zh": "ChatGLM3-6B 生成一則長回答時的記憶體，不用 GPU 而預測（實線，位元數越少線越粗）：重播的配置器所取用者"
        "，加上 CUDA 上下文。圓點為內附模型，在 CPU 上實測；空心記號為原章節就 int4 在 RTX 4060 Laptop 上所述。",
    },
    "why_the_curve_bends": {
        "en": "Forecast of the chapter's chat with ChatGLM3-6B in int4, by component. Above, stacked up to what "
        "gpustat would show; below, the change of each part since the first step. Vertical lines are turns. At 2,049 "
        "tokens keys and values leave the small pool for idle blocks of the large one, and the black line stays "
        "level.",
        "zh": "原章節以 int4 的 ChatGLM3-6B 進行的對話，按成分預測。上圖堆疊至 gpustat 所示的使用量；下圖為各成分自第"
        "一步起的變化。垂直線為輪次。到 2,049 個 token 時，鍵與值離開小池，改用大池的閒置區塊，黑線因而持平。",
    },
    "pools": {
        "en": "Segments of the allocator that are not full, in the replay of the chapter's chat, {moment}. A bar is "
        "a segment that the driver gave, its blocks coloured and hatched by what they hold; white is idle. Keys and "
        "values leave the small pool at 2,049 tokens.",
        "zh": "重播原章節的對話時配置器中未滿的區段，{moment}。每條為驅動程式給予的一個區段，其區塊依所存內容著色並加"
        "花紋；白色為閒置。鍵與值在 2,049 個 token 時離開小池。",
    },
    "decode_latency": {
        "en": "Time of a token of the embedded model on one thread of a CPU, against the length of its context. Above, "
        "dots are medians with whiskers from the 10th to the 90th percentile; lines are the floor, bytes and "
        "operations over what this CPU moves and computes, thicker from precision to precision. Below, how many times "
        "the floor each is.",
        "zh": "內附模型在 CPU 單執行緒上每個 token 的用時，隨上下文長度而變。上圖圓點等記號為中位數，鬚線自第 10 至"
        "第 90 百分位；實線為下限，即位元組數與運算數除以此 CPU 的頻寬與算力，各精度依次加粗。下圖為實測對下限的倍"
        "數。",
    },
    "token_parts": {
        "en": "Where the time of one token of the embedded model goes, in each precision, on one thread of a CPU. "
        "Operations are told apart by layer; between them lie Python and the launching of operations.",
        "zh": "內附模型在各精度下一個 token 的時間用在何處（CPU 單執行緒）。運算按所屬的層區分；運算之間為 Python "
        "與啟動運算的時間。",
    },
    "eager_and_compiled": {
        "en": "Time of a token of the embedded model in fp32, in eager mode and through torch.compile, against one "
        "floor, on one thread of a CPU. Marks are medians with whiskers from the 10th to the 90th percentile.",
        "zh": "內附模型 fp32 每個 token 的用時，逐步執行與經 torch.compile 編譯，對照同一下限（CPU 單執行緒）。記號"
        "為中位數，鬚線自第 10 至第 90 百分位。",
    },
    "first_token": {
        "en": "Time to the first token of the embedded model against the length of the prompt, on one thread of a CPU. "
        "On the dashed line a prompt twice as long takes twice the time.",
        "zh": "內附模型首個 token 的用時隨提示長度的變化（CPU 單執行緒）。虛線上，提示加倍則用時加倍。",
    },
    "polling": {
        "en": "What one reading of the memory in use costs in three ways, on a logarithmic scale. Hollow bars got no "
        "answer, since the machine has no NVIDIA driver: a lower bound of what they cost with one.",
        "zh": "以三種方式讀取一次記憶體用量的代價，對數尺度。空心長條未得答覆，因該機沒有 NVIDIA 驅動程式：為有驅動"
        "程式時代價的下界。",
    },
    "account_of_a_token": {
        "en": "An account of the 1.5 s a token that the chapter reports for ChatGLM3-6B in int4 on an RTX 4060 Laptop. "
        "Each bar begins where the one above it ends. The floor and the estimates are computed from the card's "
        "published figures; Python and polling were measured on a CPU without that card; the rest is unexplained.",
        "zh": "原章節所述 int4 的 ChatGLM3-6B 在 RTX 4060 Laptop 上每個 token 1.5 s 的帳目。每條始於上一條的終點。"
        "下限與估計值由該卡公布的數據算得；Python 與讀取用量的時間實測於沒有該卡的 CPU；其餘未能解釋。",
    },
}


def caption(name: str, **fields: Any) -> str:
    """The caption of a figure in the language that is set.

    Example:
        >>> caption("prompt_formats")[:44]
        'The same four messages in the chat formats o'
    """
    return CAPTIONS[name][current_settings().lang].format(**fields)
