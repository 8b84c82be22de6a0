"""How people put a question: frames, spellings, slips. Turns one phrasing into many.

The grammar is `{a|b|}`: one of the alternatives, which may be empty or contain braces again.
"""

from __future__ import annotations

import random
import re

_GROUP = re.compile(r"\{([^{}]*)\}")
_KEEP = re.compile(r"[\d_/`\-]|[^\x00-\x7f]")  # words that a typo or a dropped letter would ruin

BEFORE = (
    "hi, ", "hello, ", "hey, ", "hello! ", "please tell me, ", "quick question: ", "question: ",
    "i am new here. ", "sorry, ", "ok, ", "and ", "so ", "well, ", "one more question: ",
    "i have a question: ", "can you help? ", "a question about kt_async: ", "now ", "by the way, ",
    "for my setup: ", "i am confused. ", "i read the readme, but ", "dear helper, ", "um, ",
    "can you tell me ", "could you tell me ", "do you know ", "i would like to know ",
    "please explain ", "tell me ", "i wonder ", "i want to know ", "i do not understand ",
    "i just installed it. ", "i have a laptop with 16 gb. ", "my colleague asks: ", "my boss asks ",
    "i am writing a script. ", "i am a beginner. ", "for a talk i need to know: ", "a short one: ",
    "we run this at work. ", "i have two gpus. ", "i use debian. ", "i read about it, but ",
    "thanks! and ", "next question: ", "something else: ", "again: ", "just curious, ", "oh, ",
    "let us say i run it at home. ", "one thing is unclear: ", "it is my first day. ", "say, ",
    "i could not find it in the docs: ", "before i go: ", "my question is ", "is it known ",
)  # fmt: skip
AFTER = (
    " please", ", please", " thanks", " exactly", " in kt_async", " with kt_async", " here",
    " in short", " in one sentence", " for a beginner", " again", " by the way", ", do you know",
    " with this server", " in simple words", " right now", " on my machine", ", can you help",
)  # fmt: skip
TOPIC = (
    "tell me about {t}", "what about {t}", "explain {t}", "explain {t} to me", "{t}", "what is {t}",
    "describe {t}", "can you explain {t}", "please explain {t}", "i want to know about {t}",
    "give me information on {t}", "i have a question about {t}", "information about {t}",
    "how about {t}", "i need help with {t}", "help me with {t}", "what should i know about {t}",
    "what can you tell me about {t}", "what do you know about {t}", "a few words on {t}",
    "how does {t} work", "i do not understand {t}", "could you describe {t}", "define {t}",
    "what do you mean by {t}", "i keep reading about {t}", "what exactly is {t}", "and {t}",
)  # fmt: skip
FLAG_PURPOSE = (
    "what does {f} do", "what is {f}", "what is {f} for", "explain {f}", "{f}", "tell me about {f}",
    "what does {f} mean", "what is the meaning of {f}", "what does the flag {f} do", "flag {f}",
    "what is the flag {f} for", "why would i set {f}", "when do i need {f}", "describe {f}",
    "what happens with {f}", "what happens when i set {f}", "what is {f} good for", "what about {f}",
    "can you explain {f}", "i do not understand {f}", "what does the option {f} do",
    "what effect does {f} have", "how does {f} work", "what can i do with {f}", "should i set {f}",
    "what is the purpose of {f}", "what does {f} change", "what is the option {f}",
    "what does {f} control", "is there a {f} flag", "i saw {f}, what is it",
    "i found {f} in the help, what is it about", "the help mentions {f}", "somebody mentioned {f}",
    "what is {f} there for", "could you say what {f} is there for", "what does {f} limit",
    "what does {f} have to do with", "what would {f} change", "for what reason is there {f}",
    "where would i use {f}", "why is there {f}", "what is the use of {f}", "what is {f} about",
    "let me know what {f} does", "please clarify {f}", "a word on {f}", "the meaning of {f}",
    "does {f} change anything", "what can be done with {f}", "my colleague uses {f}, what is it",
    "in the readme there is {f}", "when is {f} useful", "does {f} matter", "{f} explained",
    "{f} meaning", "{f} purpose", "what is affected by {f}", "what role does {f} play",
    "what do i get from {f}", "would {f} change something", "who needs {f}", "remind me what {f} is",
)  # fmt: skip
FLAG_USE = (
    "how do i use {f}", "how is {f} used", "give me an example of {f}", "example for {f}",
    "show me how to use {f}", "how do i set {f}", "how do i write {f}", "how do i pass {f}",
    "what does {f} look like on the command line", "an example with {f}",
)  # fmt: skip
FLAG_DEFAULT = (
    "what is the default of {f}", "what is the default for {f}", "default of {f}", "{f} default",
    "what is the default value of {f}", "what is {f} by default", "which default does {f} have",
    "what value does {f} have by default", "what happens without {f}", "what if i do not set {f}",
    "what if i leave out {f}", "what is the standard value of {f}", "does {f} have a default",
    "how is {f} set by default", "what is used when {f} is not given", "default value for {f}",
    "to which value is {f} set at the start", "what is {f} unless i change it",
    "which {f} does the server take by default", "which {f} is used by default",
    "which {f} is active if i say nothing", "what {f} do i get if i change nothing",
    "with which {f} does it run by default", "how large is {f} unless i change it",
    "what is {f} if nobody sets it", "the default {f}", "the usual {f}", "initial value of {f}",
    "what does {f} start with", "{f} is what by default", "how much is {f} by default",
    "what is the preset of {f}", "if {f} is missing, what is taken", "what is {f} normally",
    "i did not set {f}, what is it", "what {f} is used if i leave it out", "standard {f}",
    "value of {f} when not given", "what if i start without {f}", "what is in {f} as a default",
)  # fmt: skip
FLAG_GOAL = (
    "how do i {g}", "how can i {g}", "which flag do i need to {g}", "i want to {g}", "how to {g}",
    "what flag do i use to {g}", "is there a flag to {g}", "is it possible to {g}", "can i {g}",
    "flag to {g}", "which flag lets me {g}", "which option do i need to {g}", "i need to {g}",
    "what do i have to do to {g}", "i would like to {g}", "what is the flag to {g}",
    "i'd like to {g}", "what is the option to {g}", "what must i type to {g}", "help me {g}",
    "which setting do i change to {g}", "what is the way to {g}", "can the server {g}",
    "by which flag can i {g}", "by which flag does one {g}", "with which flag do i {g}",
    "how could i {g}", "what lets me {g}", "i have to {g}", "my boss wants me to {g}",
    "is there a way to {g}", "is there an option to {g}", "{g}", "{g}, how", "please {g}",
    "i must {g}, which flag is it", "what is the command line to {g}", "where do i {g}",
    "what do i add to the command to {g}", "i am trying to {g}", "i'd love to {g}", "let me {g}",
    "which parameter is there to {g}", "what would let me {g}", "the flag to {g}", "may i {g}",
    "what should i set to {g}", "which switch do i need to {g}", "i wish to {g}", "we need to {g}",
)  # fmt: skip
REWORD = {
    "how do i": ("how can i", "how would i", "how could i", "how should i", "how does one",
                 "what must i do to", "what do i do to", "how may i", "in which way do i",
                 "what is the way to", "what is needed to", "how do we", "how am i supposed to"),
    "what is": ("what's", "what would be", "what exactly is", "what actually is", "what was",
                "please say what is", "let me know what is", "what might be"),
    "what does": ("what would", "what exactly does", "what will", "say what does"),
    "what happens": ("what would happen", "what will happen", "what goes on", "what is done"),
    "does it": ("will it", "would it", "is it going to", "does the server", "does kt_async",
                "does this thing", "could it", "does your server", "will kt_async"),
    "can i": ("could i", "am i able to", "may i", "is it possible to", "can we", "can one",
              "am i allowed to", "would it be possible to", "is there a way to", "might i"),
    "can it": ("could it", "is it able to", "would it", "can the server", "can kt_async"),
    "is there": ("do you have", "does it have", "is there any", "does kt_async offer"),
    "do i need": ("must i have", "should i have", "do i have to have", "would i need", "is there "
                  "any need for", "do we need", "will i need"),
    "why do i": ("why would i", "what is the reason that i", "how come i", "why should i"),
    "i want to": ("i'd like to", "i would love to", "i need to", "we want to", "i plan to"),
    "which": ("what", "which of the", "what kind of", "exactly which"),
    "show me": ("give me", "let me see", "i want to see", "please show"),
    "explain": ("clarify", "describe", "tell me about", "please explain", "give details on"),
    "start": ("launch", "run", "begin", "bring up", "fire up", "boot"),
    "the server": ("kt_async", "this server", "your server", "my server", "it", "the program"),
    "my model": ("the model", "our model", "a model of mine", "my own model"),
    "use": ("employ", "work with", "make use of", "try", "utilise"),
    "change": ("modify", "alter", "adjust", "switch", "move", "edit"),
    "set": ("choose", "configure", "define", "fix", "select", "pick", "specify"),
    "limit": ("restrict", "cap", "bound", "reduce", "control"),
    "turn off": ("disable", "switch off", "deactivate", "get rid of", "stop", "avoid"),
    "supported": ("possible", "available", "accepted", "allowed", "handled", "understood"),
    "support": ("accept", "handle", "know", "allow", "understand", "work with", "take"),
    "several": ("many", "multiple", "a few", "some", "five", "two", "lots of"),
    "users": ("people", "clients", "friends", "colleagues", "persons", "customers"),
    "requests": ("calls", "queries", "questions", "users"),
    "get": ("receive", "obtain", "see", "have", "fetch"),
    "see": ("view", "look at", "find out", "check", "find", "inspect"),
    "large": ("big", "huge", "long"),
    "broken": ("damaged", "bad", "truncated", "corrupt", "incomplete"),
    "full": ("filled", "at its limit", "exhausted", "used up"),
    "computed": ("calculated", "processed", "done", "run"),
    "work": ("function", "operate", "go", "behave"),
    "mean": ("stand for", "signify", "say", "tell me"),
    "by default": ("as a default", "if i say nothing", "unless i change it", "at the start",
                   "when i change nothing", "normally", "from the beginning", "initially"),
    "gpu": ("graphics card", "video card", "gpu", "nvidia card", "cuda device", "card"),
    "vram": ("gpu memory", "video memory", "graphics memory", "memory of the gpu"),
    "cpu": ("processor", "cpu", "cores", "host processor"),
    "ram": ("memory", "main memory", "host memory", "system memory"),
    "machine": ("computer", "pc", "laptop", "host", "box", "workstation"),
    "speed": ("performance", "throughput", "rate", "tempo"),
    "fast": ("quick", "speedy", "rapid"),
    "slow": ("sluggish", "not fast", "lagging"),
    "stop": ("end", "halt", "shut down", "terminate", "quit"),
    "tests": ("test suite", "unit tests", "checks"),
    "command": ("line", "call", "invocation", "command line"),
    "client": ("app", "program", "script", "browser", "tool", "front end"),
    "prompt": ("text", "input", "message", "question"),
    "prompts": ("texts", "inputs", "messages", "questions"),
    "answer": ("reply", "response", "output", "result"),
    "answers": ("replies", "responses", "outputs", "results"),
    "file": ("document", "data file"),
    "model": ("network", "llm", "language model", "checkpoint"),
    "models": ("networks", "llms", "language models", "checkpoints"),
    "error": ("failure", "problem", "code", "message"),
    "request": ("call", "query", "message", "post"),
    "flag": ("option", "switch", "parameter", "argument", "setting"),
    "flags": ("options", "switches", "parameters", "arguments", "settings"),
    "queue": ("waiting line", "waiting list", "line", "queue"),
    "weights": ("parameters", "tensors", "weight data"),
    "memory": ("ram", "space", "room"),
    "needed": ("required", "necessary", "mandatory", "a must"),
    "need": ("require", "want", "have to have"),
    "allowed": ("permitted", "ok", "possible"),
    "written": ("programmed", "coded", "implemented", "made"),
    "list": ("enumerate", "name", "show", "print"),
    "decide": ("determine", "choose", "settle"),
    "cache": ("store", "keep", "remember"),
    "thread": ("worker", "thread"),
    "threads": ("workers", "cores", "cpu threads"),
    "choose": ("pick", "select", "set", "decide on"),
    "disable": ("turn off", "switch off", "deactivate", "stop", "kill"),
    "allow": ("permit", "accept", "let through"),
    "longer": ("bigger", "larger", "extended"),
    "larger": ("bigger", "greater", "higher"),
    "more": ("additional", "extra", "more"),
    "default": ("standard", "preset", "usual value", "initial value"),
}  # fmt: skip
SOUP = 0.25  # share of questions that keep only their telling words
FILLER_WORDS = set(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "be",
        "been",
        "do",
        "does",
        "did",
        "i",
        "you",
        "we",
        "it",
        "he",
        "she",
        "they",
        "me",
        "my",
        "your",
        "our",
        "its",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "to",
        "of",
        "in",
        "on",
        "at",
        "for",
        "with",
        "by",
        "from",
        "as",
        "if",
        "when",
        "what",
        "how",
        "why",
        "who",
        "whose",
        "which",
        "where",
        "can",
        "could",
        "would",
        "should",
        "will",
        "shall",
        "may",
        "might",
        "must",
        "have",
        "has",
        "had",
        "and",
        "or",
        "so",
        "but",
        "then",
        "please",
        "tell",
        "say",
        "let",
        "one",
        "any",
        "some",
        "also",
        "just",
        "only",
        "very",
        "really",
        "about",
        "into",
        "over",
        "again",
        "get",
        "give",
        "want",
        "like",
        "need",
        "know",
        "see",
        "make",
        "use",
        "exactly",
        "kt_async",
        "server",
        "thing",
        "things",
        "mean",
        "happens",
        "d'you",
        "i'd",
        "i'm",
        "what's",
        "it's",
    ]
)
FILLER_START = (
    "could you tell me", "i would like to know", "is there", "what about", "how is it that",
    "how would i", "which", "what is", "what was", "how does", "where does", "does the server",
    "will it", "would the server", "my", "i have", "we have", "suppose that", "imagine that", "if",
    "when", "say", "let me ask:", "in kt_async,", "by which", "with which", "for which", "on which",
    "to what", "in what way", "am i right that", "is it true that", "i heard that", "please",
    "what would be", "what do i do about", "how do people", "how could", "who", "whose", "why would",
    "can all of us", "are", "is my", "were", "must i", "should i", "may i", "shall i", "do you",
    "give me", "help me with", "i am not sure about", "explain in a few words", "after", "before",
    "during", "while", "instead of", "without", "there is", "it says", "the docs say", "i see",
    "i got", "my friend has", "our team", "somebody", "a newcomer", "in a few words", "as a user",
    "roughly", "do i understand that", "tell a beginner", "in my case", "at home", "at work",
)  # fmt: skip
FILLER_MIDDLE = (
    "the", "a", "of the", "with the", "for the", "in the", "on the", "that", "which", "and", "is",
    "are", "was", "to", "to the", "from the", "my", "of my", "in my", "when the", "if the", "as",
    "by the", "into", "at the", "it", "this", "that is", "be", "will be", "would be", "has", "have",
    "there", "do", "does", "can", "i", "we", "you", "one", "some", "any", "then", "also", "really",
    "over the", "between", "about", "about the", "because of", "so that", "and the", "or", "not",
    "of kt_async", "the server", "while", "after", "before", "without", "being", "gets", "kept",
    "still", "ever", "always", "so", "such", "all", "each", "every", "other", "no", "up", "out",
)  # fmt: skip
FILLER_END = (
    "right", "or not", "then", "now", "today", "for me", "here", "in kt_async", "please", "at all",
    "somehow", "in general", "usually", "for this", "with it", "of it", "like that", "any more",
    "in practice", "on my side", "by the server", "or what", "is it", "does it", "too", "together",
    "at the moment", "when it runs", "if possible", "in this project", "for us", "and why",
)  # fmt: skip
CHINESE = {
    "是什么意思": ("是怎么回事", "什么意思", "代表什么", "说明什么", "是什么情况", "的含义是什么"),
    "怎么办": ("该怎么办", "应该怎么处理", "怎么处理", "如何解决", "要怎么做"),
    "为什么": ("为何", "怎么会", "为啥", "什么原因"),
    "怎么": ("如何", "怎样", "要怎么", "该怎么", "应该怎么", "怎么才能", "怎样才能", "可以怎么"),
    "如何": ("怎么", "怎样", "要如何", "应该如何", "该如何", "怎样才能"),
    "是多少": ("是几", "是什么", "是哪个", "等于多少", "有多大"),
    "有什么用": ("是做什么的", "的作用是什么", "干什么用", "用来做什么", "有什么作用"),
    "启动": ("运行", "开启", "打开", "跑起来", "启动起来", "开动"),
    "加载": ("载入", "使用", "导入", "运行", "打开", "添加"),
    "介绍一下": ("解释一下", "讲讲", "说说", "说明一下", "讲一下", "请解释", "描述一下"),
    "需要": ("必须要", "一定要", "要", "非要"),
    "支持": ("能用", "兼容", "可以运行", "能跑", "接受"),
    "可以": ("能", "能不能", "能够", "是否可以", "可不可以"),
    "什么是": ("解释一下", "请问什么是", "介绍", "说明什么是", "说说"),
    "显卡": ("GPU", "独立显卡", "显卡", "英伟达显卡"),
    "服务器": ("服务", "程序", "这个服务器", "kt_async"),
    "模型": ("大模型", "模型", "语言模型"),
    "自己的": ("我的", "自己的", "本地的", "下载的"),
    "测试": ("检验", "测试一下", "测试"),
    "参数": ("选项", "设置", "命令行参数", "标志"),
}  # fmt: skip
CHINESE_BEFORE = (
    "请问，", "你好，", "请告诉我，", "我想知道，", "请问", "请教一下，", "麻烦问一下，", "能告诉我",
    "我想问一下，", "能不能告诉我", "能否解释一下，", "帮我看看，", "我不明白，", "顺便问一下，", "那么",
    "我是新手，", "我有个问题，", "想请教一下", "在 kt_async 里，", "我刚装好，", "我的电脑上，",
)  # fmt: skip
# How names and abbreviations are really written; people use both forms.
CASED = {
    word.lower(): word
    for word in [
        "OpenAI",
        "KTransformers",
        "DeepSeek",
        "Qwen",
        "Qwen2",
        "Qwen3",
        "Qwen3-30B",
        "Qwen3-235B",
        "Qwen2MoE",
        "Qwen3MoE",
        "Kimi",
        "K2",
        "Kimi-K2",
        "Moonlight",
        "R1",
        "V2",
        "V3",
        "Llama",
        "Mistral",
        "Gemma",
        "Phi",
        "GGUF",
        "GGUFs",
        "GPU",
        "GPUs",
        "CPU",
        "CPUs",
        "CUDA",
        "RAM",
        "VRAM",
        "KV",
        "API",
        "HTTP",
        "HTTPS",
        "REST",
        "URL",
        "SDK",
        "JSON",
        "YAML",
        "TLS",
        "SSL",
        "SSE",
        "MoE",
        "AMX",
        "AVX2",
        "AVX-512",
        "VNNI",
        "NUMA",
        "PCIe",
        "Python",
        "C++",
        "Rust",
        "Linux",
        "Ubuntu",
        "Debian",
        "Docker",
        "LangChain",
        "ChatGPT",
        "NVIDIA",
        "AMD",
        "Intel",
        "Xeon",
        "Ryzen",
        "FCFS",
        "TCP",
        "ID",
        "IDs",
        "SIGTERM",
        "Ctrl-C",
        "Apache",
        "MIT",
        "GPL",
        "PyPI",
        "GB",
        "MB",
        "FlashInfer",
        "Makefile",
        "README",
        "Jinja",
        "LAN",
        "Bearer",
        "Chinese",
        "English",
        "German",
        "French",
        "Mandarin",
        "Q4_K_M",
        "Q8_0",
        "Q6_K",
        "Q4_K",
        "Q5_K",
        "Q2_K",
        "Q5_K_M",
        "Q3_K",
        "BF16",
        "F16",
        "F32",
        "IQ4_XS",
        "MXFP4",
        "AI",
        "LLM",
        "LLMs",
        "WebUI",
    ]
}
# Everyday words that say nothing about the question; they teach the model to ignore the unknown.
ORDINARY = [
    "good",
    "bad",
    "new",
    "old",
    "long",
    "short",
    "little",
    "great",
    "small",
    "big",
    "young",
    "early",
    "late",
    "near",
    "far",
    "high",
    "low",
    "open",
    "easy",
    "hard",
    "simple",
    "clear",
    "strange",
    "nice",
    "fine",
    "free",
    "busy",
    "quiet",
    "loud",
    "warm",
    "cold",
    "dark",
    "bright",
    "soft",
    "strong",
    "weak",
    "clean",
    "dirty",
    "dry",
    "wet",
    "empty",
    "heavy",
    "light",
    "deep",
    "wide",
    "narrow",
    "sharp",
    "flat",
    "round",
    "straight",
    "sweet",
    "fresh",
    "house",
    "home",
    "office",
    "desk",
    "room",
    "table",
    "door",
    "window",
    "wall",
    "floor",
    "garden",
    "street",
    "road",
    "city",
    "town",
    "village",
    "school",
    "shop",
    "market",
    "bridge",
    "station",
    "train",
    "bus",
    "bicycle",
    "boat",
    "plane",
    "trip",
    "journey",
    "holiday",
    "weekend",
    "morning",
    "evening",
    "night",
    "week",
    "month",
    "year",
    "hour",
    "minute",
    "moment",
    "summer",
    "winter",
    "spring",
    "autumn",
    "weather",
    "family",
    "friend",
    "child",
    "children",
    "mother",
    "father",
    "brother",
    "sister",
    "uncle",
    "neighbour",
    "teacher",
    "student",
    "boss",
    "doctor",
    "artist",
    "writer",
    "engineer",
    "scientist",
    "manager",
    "customer",
    "visitor",
    "guest",
    "stranger",
    "expert",
    "crowd",
    "book",
    "page",
    "paper",
    "letter",
    "pencil",
    "picture",
    "photo",
    "music",
    "song",
    "game",
    "sport",
    "ball",
    "team",
    "party",
    "dinner",
    "lunch",
    "breakfast",
    "bread",
    "cheese",
    "apple",
    "coffee",
    "tea",
    "water",
    "milk",
    "sugar",
    "salt",
    "bottle",
    "cup",
    "plate",
    "knife",
    "spoon",
    "money",
    "price",
    "cost",
    "gift",
    "job",
    "career",
    "project",
    "plan",
    "idea",
    "dream",
    "hope",
    "wish",
    "fear",
    "joy",
    "trouble",
    "luck",
    "chance",
    "walk",
    "talk",
    "read",
    "write",
    "play",
    "sing",
    "dance",
    "eat",
    "drink",
    "sleep",
    "sit",
    "stand",
    "jump",
    "fall",
    "climb",
    "carry",
    "hold",
    "push",
    "pull",
    "throw",
    "catch",
    "build",
    "break",
    "cut",
    "grow",
    "buy",
    "sell",
    "pay",
    "send",
    "bring",
    "leave",
    "arrive",
    "return",
    "visit",
    "meet",
    "help",
    "learn",
    "teach",
    "think",
    "believe",
    "remember",
    "forget",
    "understand",
    "decide",
    "hope",
    "try",
    "finish",
    "happen",
    "become",
    "often",
    "never",
    "sometimes",
    "maybe",
    "perhaps",
    "almost",
    "nearly",
    "quite",
    "rather",
    "enough",
    "together",
    "alone",
    "away",
    "back",
    "forward",
    "inside",
    "outside",
    "above",
    "below",
    "left",
    "right",
    "first",
    "second",
    "third",
    "last",
    "next",
    "previous",
    "important",
    "interesting",
    "useful",
    "curious",
    "serious",
    "special",
    "normal",
    "typical",
    "usual",
    "possible",
    "different",
    "similar",
    "situation",
    "reason",
    "detail",
    "step",
    "part",
    "piece",
    "kind",
    "sort",
    "group",
    "number",
    "point",
    "line",
    "end",
    "start",
    "middle",
    "top",
    "side",
    "corner",
    "edge",
    "front",
    "surface",
    "world",
    "life",
    "story",
    "history",
    "science",
    "nature",
    "animal",
    "bird",
    "horse",
    "tree",
    "flower",
    "river",
    "mountain",
    "sea",
    "island",
    "forest",
    "field",
    "stone",
    "sand",
    "fire",
    "wind",
    "rain",
    "snow",
    "sun",
    "star",
    "sky",
    "earth",
]
_REWORD = re.compile(r"\b(" + "|".join(sorted(REWORD, key=len, reverse=True)) + r")\b")
_DROP = {"the", "a", "an", "do", "i", "is", "does", "can", "of", "to", "me", "my", "for", "it"}


def expand(text: str, rng: random.Random) -> str:
    """Resolve every `{a|b}` of a phrasing at random, innermost first."""
    while match := _GROUP.search(text):
        choice = rng.choice(match.group(1).split("|"))
        text = text[: match.start()] + choice + text[match.end() :]
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """Lower case without punctuation: how questions are compared with the held-out ones."""
    text = re.sub(r"[`'\"?!.,;:]", "", text.lower()).replace("-", "_")
    return re.sub(r"\s+", " ", text).strip()


def flag_spelling(name: str, rng: random.Random) -> str:
    """A flag as people write it."""
    dashed = "--" + name.replace("_", "-")
    spaced = name.replace("_", " ") if "_" in name else "--" + name
    return rng.choice((f"--{name}", f"--{name}", f"`--{name}`", name, f"`{name}`", dashed, spaced))


def reword(question: str, rng: random.Random) -> str:
    """Replace common words by near synonyms; flags and code in back-quotes stay."""

    def swap(match: re.Match[str]) -> str:
        around = question[max(0, match.start() - 1)] + question[match.end() : match.end() + 1]
        if any(mark in around for mark in "`-_/.") or rng.random() < 0.4:
            return match.group(0)
        return rng.choice(REWORD[match.group(0)])

    return _REWORD.sub(swap, question)


def soup(question: str, rng: random.Random) -> str:
    """Keep the telling words of a question and put them into new filler, so that a model learns
    to listen to the words rather than to the frame."""
    words = [word for word in question.split(" ") if word.lower().strip(",:") not in FILLER_WORDS]
    if len(words) < 2:
        return question
    groups = [[words[0]]]
    for word in words[1:]:
        if rng.random() < 0.6:
            groups[-1].append(word)
        else:
            groups.append([word])
    if rng.random() < 0.35:
        rng.shuffle(groups)
    out = [rng.choice(FILLER_START)] if rng.random() < 0.85 else []
    for number, group in enumerate(groups):
        if number and rng.random() < 0.8:
            out.append(rng.choice(FILLER_MIDDLE))
        if rng.random() < 0.12:
            out.append(rng.choice(ORDINARY))
        out += group
    if rng.random() < 0.4:
        out.append(rng.choice(FILLER_END))
    return " ".join(out)


def dress(question: str, rng: random.Random, plain: bool = False) -> str:
    """Put a phrasing into a frame, then make the slips that typing makes.

    plain: small words carry the meaning here ("before", "from"), so they are left alone.
    """
    is_chinese = bool(re.search(r"[\u4e00-\u9fff]", question))
    if is_chinese:
        return _dress_chinese(question, rng)
    if not plain and rng.random() < 0.45:
        question = reword(question, rng)
    draw = rng.random()
    if not plain and rng.random() < SOUP:
        question = soup(question, rng)
    elif draw < 0.22:
        question = rng.choice(BEFORE) + question
    elif draw < 0.36:
        question += rng.choice(AFTER)
    elif draw < 0.40:
        question = rng.choice(BEFORE) + question + rng.choice(AFTER)
    if not plain and rng.random() < 0.12:
        words = question.split(" ")
        words.insert(rng.randrange(len(words) + 1), rng.choice(ORDINARY))
        question = " ".join(words)
    if rng.random() < 0.15:
        question = _slip(question, rng)
    if rng.random() < 0.7:
        question = _with_capitals(question)
    if rng.random() < 0.55:
        question = question[:1].upper() + question[1:]
        question = re.sub(r"\bi\b", "I", question)
    elif rng.random() < 0.04:
        question = question.upper()
    return question + rng.choice(("?", "?", "?", "", "", ".", " ?", "??", "!"))


def _dress_chinese(question: str, rng: random.Random) -> str:
    for word, others in CHINESE.items():
        if word in question and rng.random() < 0.5:
            question = question.replace(word, rng.choice(others), 1)
    if rng.random() < 0.5:
        question = rng.choice(CHINESE_BEFORE) + question
    if rng.random() < 0.15 and len(question) > 6:
        at = rng.randrange(len(question))
        if ord(question[at]) > 0x3000:
            question = question[:at] + question[at + 1 :]
    if rng.random() < 0.2:
        question = question.replace(" ", "")
    return question + rng.choice(("？", "？", "", "?", "。", "呢？", "！"))


def _with_capitals(question: str) -> str:
    """Names and abbreviations as they are really written; code in back-quotes stays."""
    parts = re.split(r"([^A-Za-z0-9_+/`.-]+)", question)
    return "".join(CASED.get(part.rstrip("."), part) if part else part for part in parts)


def _slip(question: str, rng: random.Random) -> str:
    words = question.split(" ")
    spots = [n for n, word in enumerate(words) if word.lower() in _DROP]
    if spots and rng.random() < 0.5:
        del words[rng.choice(spots)]
        return " ".join(words)
    spots = [n for n, word in enumerate(words) if len(word) > 4 and not _KEEP.search(word)]
    if not spots:
        return question
    n = rng.choice(spots)
    word, at = words[n], rng.randrange(1, len(words[n]) - 2)
    words[n] = rng.choice((
        word[:at] + word[at + 1 :],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at] + word[at:],
    ))  # fmt: skip
    return " ".join(words)
