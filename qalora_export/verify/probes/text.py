"""Fixed texts and conversations on which tokenizers, chat templates and models have been seen to disagree."""

from typing import Any

EDGE_TEXTS: dict[str, str] = {
    "unicode": "naïve café — 東京 🙂 Ω≈ç √∫ 한국어 ñandú",
    "right to left": "שלום עולם. مرحبا بالعالم.",
    "whitespace": "a  b   c\t\td\n\n\ne \n f    ",
    "digits": "1234567890 3.14159 0xFF 1e-9 00:07 2024-02-29",
    "code": "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # ok\n",
}

LONG_TEXT = (
    "The quick brown fox jumps over the lazy dog; 42 lamps were switched off at 7:30, weren't they? "
    'She said: "Set the kitchen timer to 5 minutes, then play some jazz." for i in range(10): print(i ** 2)\n'
)

# Ordinary text: prose, numbers, code, data. Tokenizers have no excuse here.
PLAIN_TEXTS: tuple[str, ...] = (
    "a",
    "Hello, world!",
    "line\nfeed\n\ntwice\n\n\nthrice",
    "I'm you're he'll they'd we've it's don't",
    "0 1 12 123 1234 12345 123456 1234567890",
    "3.14159, -0.5e-3, 0xDEADBEEF, 1_000_000, 50%",
    "naïve café crème brûlée",
    "🙂👍🏽 👨‍👩‍👧‍👦 🇩🇪🇯🇵",
    "東京特許許可局、今日は良い天気ですね。",
    "中文字符 한국어 ไทย हिन्दी",
    "שלום עולם مرحبا بالعالم",
    "def f(x):\n\treturn {**x, 'k': [i for i in range(10)]}  # ok?\n",
    "if(a&&b||!c){d+=e<<2;}//x",
    "https://example.org/a?b=c&d=%20#e user@mail.example",
    '{"action":"on","device":"lamp","room":"kitchen","value":21.5}',
    "MiXeD CaSe WORDS and snake_case camelCase kebab-case",
    "“quotes” ‘single’ «guillemets» … — –",
)
# Text that shows how a tokenizer was written.
ODD_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  leading spaces",
    "trailing spaces  ",
    "\ttab\tbetween\t",
    "\n",
    "carriage\r\nreturn\r\n\r\n",
    "many          spaces",
    "non\u00a0breaking\u2003em\u200bzero width",
    "I'M YOU'RE HE'LL THEY'D WE'VE IT'S DON'T",
    "cafe\u0301 e\u0301\u0323 n\u0303",
    "Ω≈ç√∫˜µ≤≥÷ ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
    "\ufeffBOM at the start",
    "\x01\x1f\x7f control",  # no NUL: ONNX Runtime GenAI takes C strings
    "<|end|><|user|>",
    "<|begin_of_text|> in the middle <|end|>",
    "<s> </s> <unk> <pad> [INST] <<SYS>>",
    "<|not_a_token|> <| end |>",
    "<|endoftext|><|im_start|>user",
    "pre<|end|>post",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "The end.\u2028Line separator\u2029Paragraph",
    "if a:\n    b()\n    \n    c()\n",
    "a line break of Markdown:  \n  and what follows",
    "for(;;){\r\n}\r\n\r\n// CRLF, a comment\r\n",
    "}\n\n// a comment behind a brace\n",
    "人人生而自由在尊严和权利上一律平等" * 7,
)
TEXTS: tuple[str, ...] = (*PLAIN_TEXTS, *ODD_TEXTS)

CHATS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "turn on the kitchen light"},),
    ({"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hi!"}),
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three? 🙂"},
    ),
    ({"role": "user", "content": "  spaces and\nnew lines\n\n  "},),
    ({"role": "user", "content": 'naïve 東京 שלום "quoted" \\ {{ braces }} {% raw %} <|end|>'},),
    ({"role": "user", "content": "x"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "0"}),
)

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "set_lamp",
            "description": 'Switch a lamp. Räume: 1 < 2 & "3"',
            "parameters": {
                "type": "object",
                "properties": {
                    "room": {"type": "string", "enum": ["kitchen", "küche"], "description": "which room"},
                    "level": {"type": "number"},
                },
                "required": ["room"],
            },
        },
    },
)
_CALL = {
    "id": "call_0001",
    "type": "function",
    "function": {"name": "set_lamp", "arguments": {"room": "küche", "level": 0.5, "on": True, "tags": ["a", 1]}},
}
# A question with a tool on offer; a call, its result and the next question.
TOOL_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "dim the light"}], "tools": list(TOOLS)},
    {
        "messages": [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "dim the light"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "set_lamp", "tool_call_id": "call_0001", "content": '{"ok": true}'},
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": "thanks"},
        ],
        "tools": list(TOOLS),
    },
)
