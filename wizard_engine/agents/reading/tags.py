"""Reader of tags: topic, skill and difficulty of an instruction."""

import re

from wizard_engine.runtime.text_lines import one_line

from .cleaning import Ambiguous, agreed, content_lines, json_objects, plain, tables, without_emphasis

_NAMES = {
    "topic": "topic|subject|thema|tema|sujet|argomento|主题|主題|话题|トピック|テーマ|주제|тема",
    "skill": (
        "skill|task|task type|fähigkeit|fertigkeit|habilidad|compétence|competencia|competenza|abilità|habilidade|技能"
        "|スキル|기술|навык|умение"
    ),
    "difficulty": (
        "difficulty|difficulty level|level|schwierigkeit|schwierigkeitsgrad|dificultad|difficulté|difficoltà"
        "|dificuldade"
        "|难度|難易度|難度|난이도|сложность"
    ),
}
_DIFFICULTIES = {
    "easy": "easy|einfach|leicht|fácil|facile|简单|容易|简易|易|易しい|簡単|쉬움|лёгкий|легкий|лёгкая|легкая|простой",
    "medium": "medium|moderate|mittel|medio|media|moyen|moyenne|médio|média|中等|中|普通|중간|보통|средний|средняя",
    "hard": "hard|difficult|schwer|schwierig|difícil|difficile|alta|困难|难|難しい|難|어려움|сложный|трудный|высокая",
}
_LINE = re.compile(
    r"(?:^|[,;|/]\s?|\n)[^\w\n]{0,12}(?:\d{1,2}[.)]\s?)?[^\w\n]{0,8}(?P<name>"
    + "|".join(f"(?P<{name}>{words})" for name, words in _NAMES.items())
    + r")[^\w\n:=]{0,8}(?:[:=]|\s[-–—]\s)[^\w\n]{0,12}(?P<value>[^\n]{0,200}?)(?=\s?(?:[,;|]\s?[^\w\n]{0,8}(?:"
    + "|".join(_NAMES.values())
    + r")[^\w\n:=]{0,8}[:=]|\n|$))",
    re.IGNORECASE,
)
_REASON = re.compile(r"\s+[-–—(]+\s*|\s*[(;]|\s*(?:->|→)|\s+because\b|\.\s+|,\s+(?:as|since|because)\b")
LONGEST = 40


def read_tags(text: str) -> dict[str, str] | None:
    """Topic, skill and difficulty; None where one is missing, stands twice with different values, is long, or no level.

    reply = JSON object | table of two columns or two rows | { name (":" | "=") value }, a line each, or split by , ; |
    name  = "Topic" | "Skill" | "Difficulty", or the same in another language
    value = words, up to 40 characters, in lower case; a reason behind it, in parentheses or after a dash, is left out
    difficulty = "easy" | "medium" | "hard", or the same in another language
    """
    text = plain(text)
    try:
        tags = agreed(tags for item in json_objects(text) if (tags := _in_object(item)) is not None)
        tags = tags or agreed(tags for rows in tables(text) if (tags := _in_table(rows)) is not None)
        return tags or _in_lines(_joined([without_emphasis(line) for line in content_lines(text)]))
    except Ambiguous:
        return None


def _joined(lines: list[str]) -> str:
    """The lines as a text, a heading that is a name and the line below it as one."""
    names = re.compile(rf"\W*(?:{'|'.join(_NAMES.values())})\W*", re.IGNORECASE)
    return re.sub(
        r"\0\n", ": ", "\n".join(f"{line.strip(' #:')}\0" if names.fullmatch(line) else line for line in lines)
    )


def _in_lines(text: str) -> dict[str, str] | None:
    matched: dict[str, list[str]] = {name: [] for name in _NAMES}
    for match in _LINE.finditer(text):
        name = next(name for name in _NAMES if match[name])
        value = _value(name, match["value"])
        matched[name] += [] if value is None else [value]
    tags = {name: agreed(values) for name, values in matched.items()}
    return None if None in tags.values() else tags


def _value(name: str, text: str) -> str | None:
    """A tag's value, None for one that does not fit."""
    value = one_line(text).lower()
    levels = re.findall(r"\b(?:easy|medium|hard)\b", value) if name == "difficulty" else []
    if name == "difficulty" or re.search(r"\(|\s[-–—]\s|→", value):
        value = _REASON.split(value)[0]
    if name == "difficulty" and len(set(levels)) <= 1:
        value = value.split(",")[0]
    value = re.sub(r"^\W+|[^\w+#)]+$", "", value)
    if name == "difficulty":
        return next((level for level, words in _DIFFICULTIES.items() if re.fullmatch(words, value)), None)
    return value if 0 < len(value) <= LONGEST else None


def _in_object(item: dict) -> dict[str, str] | None:
    if isinstance(item.get("tags"), dict):
        item = {key.lower(): value for key, value in item["tags"].items()}
    tags = {}
    for name, words in _NAMES.items():
        present = [item[key] for key in item if re.fullmatch(words, key.replace("_", " "), re.IGNORECASE)]
        if len(present) != 1:
            return None
        if not isinstance(present[0], str):
            raise Ambiguous
        tags[name] = _value(name, present[0])
    if None in tags.values():
        raise Ambiguous
    return tags


def _in_table(rows: list[list[str]]) -> dict[str, str] | None:
    if len(rows) == 2 and len(rows[0]) >= 3 and len(rows[0]) == len(rows[1]):
        rows = [list(pair) for pair in zip(*rows)]
    item = {row[0].rstrip(":").lower(): row[1] for row in rows if len(row) == 2}
    return _in_object(item) if len(item) >= 3 else None
