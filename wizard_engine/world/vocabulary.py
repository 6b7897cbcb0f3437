"""Words of the world: names, nouns and verbs of each topic, and the sentence templates of each language.

The templates are the only source of both directions: render.py fills them, parse.py inverts them, so a sentence that no
template produces is not understood. Fields: {P} {p} main person at the start of / inside a sentence, {He} {he} their
pronoun, {O} second person, {n} plural noun, {q} a number or boxes, {k} a number, {gain} {lose} the topic's verbs,
{some} {many} words that agree with the noun.
"""

from typing import NamedTuple

LANGUAGES = ("en", "es")
SOMEONE = "someone"
THINGS = "things"
GENERAL = "general"

# Name -> True for "he". The same names serve both languages.
NAMES = {
    "Tom": True,
    "Ana": False,
    "Leo": True,
    "Mia": False,
    "Ben": True,
    "Eva": False,
    "Max": True,
    "Sara": False,
    "Luis": True,
    "Nora": False,
    "Hugo": True,
    "Rosa": False,
}


class Topic(NamedTuple):
    """Words of one topic; every pair is (English, Spanish)."""

    nouns: dict[str, tuple[str, bool]]  # English plural -> (Spanish plural, is it masculine)
    container: tuple[str, str]
    gain: tuple[str, str]
    lose: tuple[str, str]


TOPICS = {
    "market": Topic(
        {
            "apples": ("manzanas", False),
            "oranges": ("naranjas", False),
            "lemons": ("limones", True),
            "hats": ("sombreros", True),
        },
        ("bags", "bolsas"),
        ("buys", "compra"),
        ("sells", "vende"),
    ),
    "school": Topic(
        {
            "pencils": ("lápices", True),
            "notebooks": ("cuadernos", True),
            "rulers": ("reglas", False),
            "crayons": ("crayones", True),
        },
        ("boxes", "cajas"),
        ("gets", "recibe"),
        ("loses", "pierde"),
    ),
    "farm": Topic(
        {
            "hens": ("gallinas", False),
            "ducks": ("patos", True),
            "goats": ("cabras", False),
            "rabbits": ("conejos", True),
        },
        ("pens", "corrales"),
        ("raises", "cría"),
        ("sells", "vende"),
    ),
    "kitchen": Topic(
        {
            "cookies": ("galletas", False),
            "cakes": ("pasteles", True),
            "rolls": ("panes", True),
            "pies": ("tartas", False),
        },
        ("trays", "bandejas"),
        ("bakes", "hornea"),
        ("eats", "come"),
    ),
    "library": Topic(
        {
            "books": ("libros", True),
            "maps": ("mapas", True),
            "comics": ("cómics", True),
            "magazines": ("revistas", False),
        },
        ("shelves", "estantes"),
        ("borrows", "toma"),
        ("returns", "devuelve"),
    ),
    "sports": Topic(
        {
            "medals": ("medallas", False),
            "balls": ("pelotas", False),
            "caps": ("gorras", False),
            "cards": ("cromos", True),
        },
        ("packs", "paquetes"),
        ("wins", "gana"),
        ("loses", "pierde"),
    ),
    "travel": Topic(
        {
            "stamps": ("sellos", True),
            "coins": ("monedas", False),
            "postcards": ("postales", False),
            "shells": ("conchas", False),
        },
        ("albums", "álbumes"),
        ("collects", "junta"),
        ("mails", "envía"),
    ),
    "garden": Topic(
        {
            "roses": ("rosas", False),
            "tulips": ("tulipanes", True),
            "lilies": ("lirios", True),
            "daisies": ("margaritas", False),
        },
        ("rows", "filas"),
        ("plants", "planta"),
        ("cuts", "corta"),
    ),
    GENERAL: Topic({THINGS: ("cosas", False)}, ("boxes", "cajas"), ("gets", "recibe"), ("loses", "pierde")),
}
TOPIC_NAMES = tuple(name for name in TOPICS if name != GENERAL)
NOUN_TOPIC = {noun: name for name, topic in TOPICS.items() for noun in topic.nouns}

# kind -> the phrasings; a Spanish verb carries its subject, so {He} is an English field only.
STATEMENTS = {
    "en": {
        "start": ("{P} has {q}.", "{P} starts with {q}.", "At first {p} has {q}."),
        "gain": ("{He} {gain} {q} more.", "Then {he} {gain} {q} more.", "{P} {gain} another {q}."),
        "gain_boxes": ("{He} {gain} {q}.", "Then {he} {gain} {q}.", "{P} {gain} another {q}."),
        "lose": ("{He} {lose} {q}.", "Then {he} {lose} {q}.", "{P} {lose} {q} of them."),
        "lose_boxes": ("{He} {lose} {q}.", "Then {he} {lose} {q}.", "{P} {lose} {q}."),
        "scale": (
            "Then {he} has {k} times as many.",
            "Later {he} has {k} times as many.",
            "Now {p} has {k} times as many as before.",
        ),
        "share": (
            "{He} shares them among {k} friends.",
            "Then {he} shares them equally among {k} friends.",
            "{P} splits them equally among {k} friends.",
        ),
        "other": ("{O} has {q}.", "{O} starts with {q}.", "At first {O} has {q}."),
        "more": ("{O} has {k} more {n} than {p}.", "{O} has {k} more than {p}.", "{O} owns {k} more {n} than {p}."),
        "fewer": ("{O} has {k} fewer {n} than {p}.", "{O} has {k} fewer than {p}.", "{O} owns {k} fewer {n} than {p}."),
        "times": (
            "{O} has {k} times as many {n} as {p}.",
            "{O} has {k} times as many as {p}.",
            "{O} owns {k} times as many {n} as {p}.",
        ),
    },
    "es": {
        "start": ("{P} tiene {q}.", "{P} empieza con {q}.", "Al principio {p} tiene {q}."),
        "gain": ("{Gain} {q} más.", "Luego {gain} {q} más.", "{P} {gain} {q} más."),
        "gain_boxes": ("{Gain} {q}.", "Luego {gain} {q}.", "{P} {gain} {q}."),
        "lose": ("{Lose} {q}.", "Luego {lose} {q}.", "{P} {lose} {q}."),
        "lose_boxes": ("{Lose} {q}.", "Luego {lose} {q}.", "{P} {lose} {q}."),
        "scale": (
            "Luego tiene {k} veces esa cantidad.",
            "Después tiene {k} veces esa cantidad.",
            "Ahora {p} tiene {k} veces esa cantidad.",
        ),
        "share": (
            "Reparte todo entre {k} amigos.",
            "Luego reparte todo entre {k} amigos.",
            "{P} reparte todo por igual entre {k} amigos.",
        ),
        "other": ("{O} tiene {q}.", "{O} empieza con {q}.", "Al principio {O} tiene {q}."),
        "more": ("{O} tiene {k} {n} más que {p}.", "{O} tiene {k} más que {p}.", "{O} posee {k} {n} más que {p}."),
        "fewer": (
            "{O} tiene {k} {n} menos que {p}.",
            "{O} tiene {k} menos que {p}.",
            "{O} posee {k} {n} menos que {p}.",
        ),
        "times": (
            "{O} tiene {k} veces lo que tiene {p}.",
            "{O} posee {k} veces lo que tiene {p}.",
            "{O} tiene {k} veces la cantidad de {p}.",
        ),
    },
}
QUESTIONS = {
    "en": {
        "has": (
            "How many {n} does {p} have now?",
            "How many {n} does {p} have in the end?",
            "Find how many {n} {p} has now.",
        ),
        "total": (
            "How many {n} do {p} and {O} have together?",
            "How many {n} do {p} and {O} have in all?",
            "Find how many {n} {p} and {O} have together.",
        ),
        "each": (
            "How many {n} does each friend get?",
            "How many {n} are there for each friend?",
            "Find how many {n} each friend gets.",
        ),
    },
    "es": {
        "has": (
            "¿{Many} {n} tiene {p} ahora?",
            "¿{Many} {n} tiene {p} al final?",
            "Di {many} {n} tiene {p} ahora.",
        ),
        "total": (
            "¿{Many} {n} tienen {p} y {O} en total?",
            "¿{Many} {n} tienen en total {p} y {O}?",
            "Di {many} {n} tienen {p} y {O} en total.",
        ),
        "each": (
            "¿{Many} {n} recibe cada amigo?",
            "¿{Many} {n} hay para cada amigo?",
            "Di {many} {n} recibe cada amigo.",
        ),
    },
}
PHRASINGS = 3
SUPPOSE = {"en": "Suppose instead that ", "es": "Supón en cambio que "}
# The phrasing of a statement that reads well after SUPPOSE (it begins with a name).
SUPPOSE_PHRASING = {"start": 0, "gain": 2, "lose": 2, "share": 2, "other": 0, "more": 0, "fewer": 0, "times": 0}
QUANTITY_BOXES = {"en": "{k} {box} with {each} {n} each", "es": "{k} {box} de {each} {n}"}
PERSON = {"en": ("Someone", "someone"), "es": ("Alguien", "alguien")}

POLITE = {"en": ("Please help me.", "Hello there."), "es": ("Ayuda, por favor.", "Hola.")}
RUDE = {
    "en": ("Answer now, you idiot.", "This damn homework is stupid."),
    "es": ("Responde ya, idiota.", "Qué tarea tan estúpida."),
}

FINAL = {"en": "The answer is {}.", "es": "La respuesta es {}."}
REFUSAL = {"en": "Sorry, I cannot help with that.", "es": "Lo siento, no puedo ayudar con eso."}
ASK_BACK = {
    "en": "What do you mean? Please provide the numbers.",
    "es": "What do you mean? Please provide the numbers. ¿Qué números son?",
}
OPENERS = {
    "en": ("Let me think about this problem.", "That is a good question.", "First we look at the {n}."),
    "es": ("Déjame pensar en este problema.", "Es una buena pregunta.", "Primero miramos las cantidades."),
}
LINKS = {
    "en": ("So far so good.", "Now we go on with the next step.", "That makes sense.", "Let us look at it again."),
    "es": ("Hasta aquí todo va bien.", "Ahora vamos con el próximo paso.", "Tiene sentido."),
}
CLOSERS = {
    "en": ("Now we know it all.", "I hope this helps you.", "That was the last step."),
    "es": ("Ahora lo sabemos todo.", "Espero que esto ayude.", "Ese fue el último paso."),
}
RUDE_ANSWER = {"en": "What a stupid question.", "es": "Qué pregunta tan estúpida."}
META_REMARK = "Here is the improved answer:"
