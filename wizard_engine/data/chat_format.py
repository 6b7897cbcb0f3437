"""Chat formats by name: Vicuna v1.1, ChatML, the template of a model's directory, a template in a file."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wizard_engine.runtime.input_files import MAX_CONFIG_BYTES, read_json_object, read_regular, shown

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Vicuna v1.1 in Jinja, for other programs that read a model directory. They encode the text as a whole.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set turns = messages[1:] %}"
    "{% else %}{{ system }}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ (' ' if loop.first else '') + 'USER: ' + message['content'] }}"
    "{% if loop.last %}{{ ' ASSISTANT:' }}{% endif %}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
).replace("{{ system }}", "{{ " + json.dumps(SYSTEM) + " }}")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The option --chat-format of recipes; see `chosen_format`.
ChatFormatChoice = Literal["auto", "vicuna", "chatml", "template"] | Path
TEMPLATE_FILE, CONFIG_FILE, LEGACY_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
# Fields of tokenizer_config.json: the format that this project trained the model in, and the hash of its template.
TRAINED_FORMAT, TRAINED_TEMPLATE = "wizard_chat_format", "wizard_chat_template"


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a sequence.

    Attributes:
        name: "vicuna-v1.1", "chatml", "template" for a directory's own, or a file's name.
        template: in Jinja.   source: where it stands, for messages.
        is_trained: this project has trained the model in it, or is going to.
        fault: why the template cannot be used; "" where nothing is known against it.
        needs: tokens that the tokenizer must have.
    """

    name: str
    template: str
    source: str
    is_trained: bool = False
    fault: str = ""
    needs: tuple[str, ...] = ()

    @property
    def is_vicuna(self) -> bool:
        """Whether ids are those of the segments of Vicuna v1.1, and not those of a rendered template."""
        return self.name == VICUNA_NAME

    @property
    def digest(self) -> str:
        """SHA-256 of the template."""
        return hashlib.sha256(self.template.encode("utf-8", "surrogatepass")).hexdigest()


VICUNA_NAME = "vicuna-v1.1"
VICUNA = ChatFormat(VICUNA_NAME, CHAT_TEMPLATE, "vicuna")
CHATML = ChatFormat("chatml", CHATML_TEMPLATE, "chatml", needs=("<|im_start|>", "<|im_end|>"))


def directory_format(directory: Path, config: dict[str, Any]) -> ChatFormat:
    """The chat format of a model directory: its template; Vicuna v1.1 where that is its template or it has none.

    A template is looked for where transformers looks: chat_template.jinja, then tokenizer_config.json, of several
    named ones "default"; then chat_template.json. It is compiled when it is first used.

    Args:
        config: fields of tokenizer_config.json.
    Raises:
        ValueError: a file cannot be read; names it.
    """
    template, source, fault = _found(directory, config)
    if not template and not fault:
        return VICUNA
    found = ChatFormat("template", template or "", str(source), fault=fault)
    if template == CHAT_TEMPLATE:
        found = VICUNA
    name = config.get(TRAINED_FORMAT)
    if config.get(TRAINED_TEMPLATE) != found.digest or not isinstance(name, str):
        return found
    return replace(found, name=found.name if VICUNA_NAME in (name, found.name) else name, is_trained=True)


def _found(directory: Path, config: dict[str, Any]) -> tuple[str | None, Path, str]:
    """Template, the file that it stands in, and what is wrong with it."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        return _read(path), path, ""
    path, value = directory / CONFIG_FILE, config.get("chat_template")
    if value is None:
        path = directory / LEGACY_FILE
        value = (read_json_object(path) or {}).get("chat_template")
    if value is None or isinstance(value, str):
        return value, path, ""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item.get("name"), str)}
        if isinstance(named.get("default"), str):
            return named["default"], path, ""
        return None, path, f"expected a template named default, got {shown(sorted(named))}"
    return None, path, f"expected a text or a list of named texts, got {shown(value)}"


def _read(path: Path) -> str:
    try:
        return read_regular(path, MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got the byte {error.object[error.start]:#x}; convert it") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a readable template, got {error.strerror or error}") from None


def chosen_format(choice: ChatFormatChoice, own: ChatFormat, *, training: bool) -> ChatFormat:
    """The format of an option `--chat-format`.

    Args:
        choice: "auto" is the directory's own; for training that in which this project has trained the model before,
            else Vicuna v1.1. "template" is the directory's own for training too. Or a .jinja file.
        own: that of the directory.
    Raises:
        ValueError: another choice, a file that cannot be read, or no template of its own.
    """
    if choice == "auto":
        chosen = VICUNA if training and not own.is_trained else own
    elif choice in ("vicuna", "chatml"):
        chosen = VICUNA if choice == "vicuna" else CHATML
    elif choice == "template":
        if own.is_vicuna:
            raise ValueError("chat_format: expected a model with a template of its own, got none; choose vicuna")
        chosen = own
    elif Path(choice).suffix == ".jinja":
        chosen = ChatFormat(Path(choice).name, _read(Path(choice)), str(choice))
    else:
        got = shown(str(choice))
        raise ValueError(f"chat_format: expected auto, vicuna, chatml, template or a .jinja file, got {got!r}")
    return replace(chosen, is_trained=True) if training else chosen


def recorded(fields: dict[str, Any], chat_format: ChatFormat) -> dict[str, Any]:
    """Fields of tokenizer_config.json that say the chat format; those that said another are replaced."""
    kept = {key: value for key, value in fields.items() if key not in (TRAINED_FORMAT, TRAINED_TEMPLATE)}
    if chat_format.is_trained:
        kept |= {TRAINED_FORMAT: chat_format.name, TRAINED_TEMPLATE: chat_format.digest}
    former = kept.get("chat_template")
    named = {item.get("name"): item for item in former if isinstance(item, dict)} if isinstance(former, list) else {}
    keeps = chat_format.fault or named.get("default", {}).get("template") == chat_format.template
    return kept if keeps else {**kept, "chat_template": chat_format.template}
