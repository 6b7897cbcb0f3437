"""Chat templates of the kinds that are in use, written for these tests with the same constructs, and their tokenizers.

None is a published model's: the texts, names and orders are this file's own.
"""

import json
import random
from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from wizard_engine.data.records import Message

LLAMA_2 = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}{%- set system = messages[0]['content'] -%}
{%- else -%}
    {%- set turns = messages -%}{%- set system = false -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') -}}
    {%- endif -%}
    {%- if loop.index0 == 0 and system != false -%}
        {%- set content = '<<SYS>>\\n' + system.strip() + '\\n<</SYS>>\\n\\n' + message['content'] -%}
    {%- else -%}
        {%- set content = message['content'] -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' }}{% generation %}{{ content.strip() + ' ' + eos_token }}{% endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA_3 = """
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- "Today is " + date_string + ".\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
        {%- else %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("Only one tool call at once!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == users[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{{ tool | tojson }}{% endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """
{%- macro opened(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}
{%- if tools %}
    {{- opened('system') + "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- opened('system') + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}{% endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('No system role here') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}
    {% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou answer questions.<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VICUNA = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set loop_messages = messages[1:] -%}
    {%- set system_message = messages[0]['content'].strip() + '\n\n' -%}
{%- else -%}
    {%- set loop_messages = messages -%}
    {%- set system_message = 'A curious user talks with an assistant.' -%}
{%- endif -%}
{{- bos_token + system_message -}}
{%- for message in loop_messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}{%- continue -%}{%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- ' USER: ' + message['content'].strip() -}}
    {%- else -%}
        {{- ' ASSISTANT: ' }}{% generation %}{{ message['content'].strip() + eos_token }}{% endgeneration -%}
    {%- endif -%}
    {%- if loop.last and message['role'] == 'user' and add_generation_prompt -%}
        {{- ' ASSISTANT:' -}}
    {%- endif -%}
{%- endfor -%}
"""

TEXT = (
    "The answer is 12 apples. What is 3 < 4? def f(x):\n    return [x, 'naïve', {1: 2}]\n\n中文 😀 <b>bold</b> | pipes "
)
WORDS = [
    "the",
    "answer",
    "is",
    "12",
    "apples.",
    "Why?",
    "x < y",
    "[a]",
    "naïve",
    "中文",
    "😀",
    "f(x)",
    "don't",
    "a|b",
    "</b>",
]
JOINTS = [" ", " ", " ", "\n", "\n\n", "  ", "\t", ""]


def _special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _words(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


@cache
def byte_level(special: tuple[str, ...], words: tuple[str, ...] = ()) -> Backend:
    """Byte pairs as of Llama 3 and Qwen: lines and blanks have units of their own."""
    backend = Backend(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    # Line ends merge with what stands before them, as they do in real vocabularies.
    texts = [TEXT * 3, *WORDS, "user\n\n system\n assistant\n\n", ">\n\n >\n ?\n\n .\n\n"] * 3
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(_special(*special))
    backend.add_tokens(_words(*words))
    return backend


@cache
def spaced(special: tuple[str, ...], kind: str) -> Backend:
    """Byte pairs over ▁ with byte fallback: a space before each text ("all", Llama 2), the first ("first"), or none."""
    pieces = sorted({char for text in [TEXT, *WORDS] for char in text.replace(" ", "▁")} | {"▁"})
    vocabulary = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += [piece for piece in pieces if piece not in vocabulary]
    merges = []
    for word in [*TEXT.split(), *WORDS, "USER:", "ASSISTANT:", "user", "model", "INST"]:
        joined = "▁" + word
        for end in range(2, len(joined) + 1):
            left, right = joined[: end - 1], joined[end - 1]
            if {left, right} <= set(vocabulary) and (left, right) not in merges:
                merges.append((left, right))
                vocabulary += [] if joined[:end] in vocabulary else [joined[:end]]
    model = models.BPE(
        {piece: index for index, piece in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True
    )
    backend = Backend(model)
    if kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if kind == "all" else steps)
    ends = [decoders.Strip(" ", 1, 0)] if kind != "none" else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_special_tokens(_special("<unk>", *special))
    return backend


# family -> template, tokenizer, fields of tokenizer_config.json beside the template.
FAMILIES = {
    "llama-2": (LLAMA_2, spaced(("<s>", "</s>"), "all"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama-3": (
        LLAMA_3,
        byte_level(("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "mistral": (
        MISTRAL,
        spaced(("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"), "first"),
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "qwen": (
        QWEN,
        byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>", "<tool_call>")),
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "gemma": (
        GEMMA,
        spaced(("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "none"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "chatml": (
        CHATML,
        byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "vicuna": (VICUNA, spaced(("<s>", "</s>"), "all"), {"bos_token": "<s>", "eos_token": "</s>"}),
}
# Those whose templates mark what the model writes.
MARKED = ("llama-2", "llama-3", "chatml", "vicuna")


def directory(path, family, **changes):
    """A model directory's tokenizer files of a family."""
    template, backend, fields = FAMILIES[family]
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(backend.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **fields, **changes}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def text_of(rng: random.Random) -> str:
    """A random text: words, numbers, signs, lines, with blanks at its ends at times."""
    parts = [rng.choice(WORDS) + rng.choice(JOINTS) for _ in range(rng.randrange(1, 9))]
    return rng.choice(["", "", " ", "\n"]) + "".join(parts) + rng.choice(["end.", "1", "", "\n"])


def conversation(seed: int, *, ends_with: str) -> list[Message]:
    """A random conversation: at times with a system message, at times out of order, at times with reasoning."""
    rng = random.Random(seed)
    messages = [Message("system", text_of(rng))] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        reasoning = f"<think>\n{text_of(rng)}\n</think>\n\n" if rng.random() < 0.2 else ""
        messages += [Message("user", text_of(rng)), Message("assistant", reasoning + "So " + text_of(rng))]
    if rng.random() < 0.1:
        messages.insert(rng.randrange(len(messages)), Message(rng.choice(("user", "assistant")), "Again."))
    return messages + ([Message("user", text_of(rng))] if ends_with == "user" else [])
