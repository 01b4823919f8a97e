"""What figures say, in traditional Chinese: the English text, as it stands in the code, and its translation.

Fields in braces keep their names. Names of models, modules, classes, precisions, roles and settings are the same in
every language and stand here only where a sentence needs them.
"""

CHINESE = {
    # memory against context
    "memory (MiB)": "記憶體（MiB）",
    "growth since loading (MiB)": "載入後的增長（MiB）",
    "change since the first step (MiB)": "自第一步起的變化（MiB）",
    "context length (tokens)": "上下文長度（token）",
    "conversation length (characters)": "對話長度（字元）",
    "Memory against context length.": "記憶體隨上下文長度的變化。",
    "{label} ({kind}): {first:.0f} MiB at first, {last:.0f} MiB at {length:.0f} {unit}.": (
        "{label}（{kind}）：起初 {first:.0f} MiB，{length:.0f} 個{unit}時 {last:.0f} MiB。"
    ),
    "tokens": " token ",
    "characters": "字元",
    "measured": "實測",
    "forecast": "預測",
    "reported": "引述",
    "unnamed": "未命名",
    "GPU memory used": "顯存使用量",
    "process memory": "行程記憶體",
    "{label}, {what} ({kind})": "{label}，{what}（{kind}）",
    "{label}, KV payload (exact)": "{label}，KV 資料量（精確值）",
    "the chapter": "原章節",
    "original code": "原始程式碼",
    "sdpa": "sdpa",
    "dynamic cache": "動態快取",
    "static cache": "靜態快取",
    "embedded": "內附模型",
    # components of a forecast
    "weights": "權重",
    "quantisation state": "量化參數",
    "KV payload": "KV 資料",
    "KV copies": "KV 副本",
    "activations, workspace": "激活值與工作區",
    "idle, small pool": "閒置，小池",
    "idle, large pool": "閒置，大池",
    "CUDA context": "CUDA 上下文",
    "used (forecast)": "使用量（預測）",
    "{label} (forecast): {first:.0f} MiB after loading, {last:.0f} MiB at {tokens:.0f} tokens, of which {parts} MiB.": (
        "{label}（預測）：載入後 {first:.0f} MiB，{tokens:.0f} 個 token 時 {last:.0f} MiB，其中：{parts} MiB。"
    ),
    # pools of the allocator
    "KV cache": "KV 快取",
    "in flight": "運算中",
    "idle": "閒置",
    "Map of the allocator's pools.": "配置器記憶體池分布圖。",
    "after the step to {tokens:,} tokens": "到 {tokens:,} 個 token 的那一步之後",
    "small pool: {idle:.0f} MiB idle\n{segments} segments, {full} of them full": (
        "小池：閒置 {idle:.0f} MiB\n{segments} 個區段，{full} 個已滿"
    ),
    "large pool: {idle:.0f} MiB idle\n{segments} segments, {full} of them full": (
        "大池：閒置 {idle:.0f} MiB\n{segments} 個區段，{full} 個已滿"
    ),
    "The small pool has {idle:.0f} MiB idle in {open} of {segments} segments.": (
        "小池的 {segments} 個區段中有 {open} 個未滿，共閒置 {idle:.0f} MiB。"
    ),
    "The large pool has {idle:.0f} MiB idle in {open} of {segments} segments.": (
        "大池的 {segments} 個區段中有 {open} 個未滿，共閒置 {idle:.0f} MiB。"
    ),
    "MiB from the segment's start": "距區段起點（MiB）",
    "segments with room": "未滿的區段",
    # precisions against a card
    "MLP": "MLP",
    "attention": "注意力",
    "embedding": "嵌入",
    "head": "輸出層",
    "norms": "歸一化",
    "other": "其他",
    "{card}: {card_mib:,.0f} MiB": "{card}：{card_mib:,.0f} MiB",
    "fits": "放得下",
    "does not fit": "放不下",
    "{precision} {total:,.0f} MiB ({verdict})": "{precision} {total:,.0f} MiB（{verdict}）",
    "Memory by precision: {verdicts}, against {card_mib:,.0f} MiB of {card}.": (
        "各精度所需的記憶體：{verdicts}；{card} 有 {card_mib:,.0f} MiB。"
    ),
    # time of a token
    "time of a token (ms)": "每個 token 的用時（ms）",
    "time of one token (ms)": "一個 token 的用時（ms）",
    "times the floor": "為下限的倍數",
    "floor (computed)": "下限（算得）",
    "eager": "逐步執行",
    "compiled": "編譯後",
    "{name}: {ms:.2f} ms at {tokens:,} tokens": "{name}：{tokens:,} 個 token 時 {ms:.2f} ms",
    "Time of a token against context length. {series}. The measured times are {least:.3g} to {most:.3g} times the "
    "floor.": "每個 token 的用時隨上下文長度的變化。{series}。實測用時為下限的 {least:.3g} 至 {most:.3g} 倍。",
    "in proportion": "成正比",
    "time to the first token (ms)": "首個 token 的用時（ms）",
    "{name}: {ms:.0f} ms for {tokens:,.0f} tokens": "{name}：{tokens:,.0f} 個 token 用 {ms:.0f} ms",
    "Time to the first token against the length of the prompt. {series}.": (
        "首個 token 的用時隨提示長度的變化。{series}。"
    ),
    "norms, activations, rest": "歸一化、激活與其餘",
    "Python and launching": "Python 與啟動",
    "sampling": "取樣",
    "unexplained": "未能解釋",
    " {ms:.2f} ms": " {ms:.2f} ms",
    "{name}: {ms:.2f} ms, of which {shares}": "{name}：{ms:.2f} ms，其中：{shares}",
    "{part} {share:.0%}": "{part} {share:.0%}",
    "Where the time of one token goes. {series}.": "一個 token 的時間用在何處。{series}。",
    "gpustat --json (a process)": "gpustat --json（一個行程）",
    "gpustat.new_query()": "gpustat.new_query()",
    "NVML": "NVML",
    " {ms:,.3g} ms": " {ms:,.3g} ms",
    "{name}: {ms:,.3g} ms": "{name}：{ms:,.3g} ms",
    "{name}: {ms:,.3g} ms, no driver": "{name}：{ms:,.3g} ms，無驅動程式",
    "answered": "有答覆",
    "no answer: no driver there": "無答覆：該機沒有驅動程式",
    "time of one reading (ms)": "讀取一次的用時（ms）",
    "What one reading of the memory costs. {series}.": "讀取一次記憶體用量的代價。{series}。",
    "floor: read the weights once": "下限：讀權重一次",
    "dequantise them to fp16, read those": "還原為 fp16 再讀取",
    "weights in host memory": "主機記憶體中的權重",
    "the log: gpustat --json": "記錄：gpustat --json",
    "floor": "下限",
    "estimated": "估計",
    "measured here": "在此實測",
    "time of a token (ms); the black line is the reported {total_s:.1f} s": (
        "每個 token 的用時（ms）；黑線為所述的 {total_s:.1f} s"
    ),
    "An account of {total_s:.1f} s a token. {parts}.": "每個 token {total_s:.1f} s 的帳目。{parts}。",
    "{part} ({kind}): {ms:.0f} ms": "{part}（{kind}）：{ms:.0f} ms",
    # decode steps
    "surprisal\n(bits)": "意外度\n（位元）",
    "surviving\ncandidates": "剩餘\n候選數",
    "KV cache\n(MiB)": "KV 快取\n（MiB）",
    "time of act\n(ms)": "各幕用時\n（ms）",
    "1 forward pass": "1 前向計算",
    "2 choose": "2 選取",
    "4 stop check": "4 停止判斷",
    "token chosen by each step (the first step is the prefill)": "每一步選出的 token（第一步為預填充）",
    "step (0 is the prefill)": "步（0 為預填充）",
    "{count} decode steps. Tokens in order: {tokens}. Most surprising: {hardest} with {bits:.1f} bits. The cache grows "
    "from {first:.2f} to {last:.2f} MiB. The forward pass takes {share:.0%} of the time.": (
        "{count} 個解碼步。依序的 token：{tokens}。最意外：{hardest}，{bits:.1f} 位元。快取由 {first:.2f} MiB 增至 "
        "{last:.2f} MiB。前向計算佔用時的 {share:.0%}。"
    ),
    "logits": "logits",
    "repetition penalty": "重複懲罰",
    "minimum length": "最小長度",
    "temperature": "溫度",
    "top-k": "top-k",
    "top-p": "top-p",
    "min-p": "min-p",
    "typical-p": "typical-p",
    "{count:,} survive": "剩 {count:,} 個",
    "probability of the candidate (cross: cut, or no longer among the best)": (
        "候選的機率（叉號：已被截去，或不再位居前列）"
    ),
    "Candidates for the next token. ": "下一個 token 的候選。",
    "Behind {stage}: {best}.": "經 {stage} 之後：{best}。",
    "{count} survive, best {best}": "剩 {count} 個，最佳為 {best}",
    "rank of the candidate after this layer (orange frame: the token that was chosen)": (
        "候選在該層之後的名次（橙框：最終選出的 token）"
    ),
    "probability": "機率",
    "Best token after each layer: ": "各層之後的最佳 token：",
    "embeddings": "嵌入",
    "layer {number}": "第 {number} 層",
    "{layer} (normed)": "{layer}（已歸一化）",
    # prompts
    "prefix": "前綴",
    "answer": "回答",
    "role": "角色",
    "metadata": "中繼資料",
    "text": "文字",
    "generation prompt": "生成提示",
    "The {count} tokens of a prompt as chips, coloured by role ({roles}): {tokens}.": (
        "一則提示的 {count} 個 token，依角色（{roles}）著色：{tokens}。"
    ),
    "The same conversation in several chat formats: ": "同一段對話的數種聊天格式：",
    "yes": "可",
    "no": "否",
    "next": "下一則",
    "last": "上一則",
    "start": "開頭",
    "nothing": "無",
    "After {before}: {roles}.": "{before} 之後：{roles}。",
    "Which role may follow which.": "各角色之後可接哪些角色。",
    "old prompt, cached": "舊提示，已在快取中",
    "answer, cached as it was generated": "回答，生成時已快取",
    "new, still to be read": "新增，尚待讀入",
    "prompt (tokens)": "提示（token）",
    "turn": "輪次",
    "The prompt of each of {turns} turns, as a bar of tokens. Turn {turn}: {prompt_tokens} tokens, of which "
    "{kept_tokens} are the old prompt, {answer_tokens} the answer to it and {fed_tokens} are new.": (
        "{turns} 輪對話各輪提示的 token 數長條圖。第 {turn} 輪：{prompt_tokens} 個 token，其中舊提示 {kept_tokens} 個，"
        "對它的回答 {answer_tokens} 個，新增 {fed_tokens} 個。"
    ),
    # classes and modules
    "class": "類別",
    "mixin": "混入類別",
    "PyTorch": "PyTorch",
    "Auto side": "Auto 一側",
    "known by name only": "僅知其名",
    "inherits from": "繼承自",
    "holds": "持有",
    "leads to the class that is built": "導向所建立的類別",
    "is an nn.Module": "是一個 nn.Module",
    "… {count} more": "… 另有 {count} 項",
    "{whole} holds {part}": "{whole} 持有 {part}",
    "Class diagram of {count} classes. {root} inherits from {bases}. {held}": (
        "{count} 個類別的類別圖。{root} 繼承自 {bases}。{held}"
    ),
    "module": "模組",
    "parameters": "參數數量",
    "bytes": "位元組",
    "step returns": "每步傳回",
    "share of bytes": "位元組佔比",
    "Dark: bytes of the module itself; they add up to 100 %. Light: with those of its parts. Returned shapes: "
    "those of a decode step.": "深色：模組自身的位元組，合計 100 %。淺色：連同其各部分。傳回的形狀：一個解碼步的形狀。",
    "Module tree of {name}: {parameters:,} parameters in {size}. The largest share of bytes, {share:.0%}, is in "
    "{module}.": ("{name} 的模組樹：{parameters:,} 個參數，共 {size}。佔位元組最多的是 {module}，為 {share:.0%}。"),
}
