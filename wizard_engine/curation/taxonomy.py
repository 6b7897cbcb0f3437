"""Closed taxonomy of instructions: each has exactly one skill, one topic and one difficulty of it.

A skill is "area/task", what the answerer is asked to do; a topic is "domain/field", what it is about. The six areas by
which WizardLM-2 was judged (writing, coding, math, reasoning, agent, multilingual) are areas of skills.
"""

from collections.abc import Mapping

# Area -> task -> what it is; the main demand of an instruction decides, not its subject.
SKILL_TREE: Mapping[str, Mapping[str, str]] = {
    "writing": {
        "creative": "stories, poems, songs, jokes, scripts, descriptions of scenes",
        "practical": (
            "letters, e-mails, posts, articles, reports, speeches, reviews, advertisements, product texts, "
            "essays of a given form"
        ),
        "edit": "rewrite, proofread, shorten, lengthen, change tone or style of a given text",
        "summary": "summarise or give titles/headlines to a given text or a known work",
        "ideas": "brainstorm: names, titles, slogans, lists of ideas, topics, prompts",
    },
    "roleplay": {
        "persona": (
            'answer as a character, a person, an animal, a thing, a profession ("You are ...", "pretend to be ...")'
        ),
        "scene": "play a scene, a game, an interview, a text adventure with the user; several characters",
    },
    "coding": {
        "write": "write a program, function, script, page, test",
        "debug": "find or explain an error in given code, make it faster, refactor, convert it to another language",
        "explain": "what code does, what a concept of programming or a tool means, complexity of an algorithm",
        "query": "SQL, regular expressions, spreadsheet formulas, shell commands, configuration files, data formats",
        "design": "architecture, data models, choice of algorithm or system, review of a design",
    },
    "math": {
        "arithmetic": "calculations and word problems over numbers, percentages, rates, units, money, time",
        "algebra": "equations, unknowns, functions, sequences, inequalities",
        "geometry": "figures, areas, volumes, angles, coordinates",
        "statistics": "probability, counting, averages, distributions, tests",
        "advanced": "calculus, linear algebra, number theory, proofs, discrete mathematics, optimisation",
    },
    "reasoning": {
        "logic": "deduction, puzzles, riddles, orders, truth of statements, odd one out, analogies, patterns",
        "commonsense": (
            "causes, consequences, intentions, what would happen, everyday physics, relations of people, "
            "best reaction in a situation"
        ),
        "argument": (
            "judge or build an argument, find a fallacy, weigh evidence, decide between options by given criteria"
        ),
    },
    "knowledge": {
        "fact": "a fact that can be looked up: who, when, where, which, how many, a definition, a list of facts",
        "explain": "how and why something works; describe, outline, compare concepts of a field",
        "discuss": (
            "evaluate, interpret, causes and effects in the large, pros and cons, opinions on questions of a field"
        ),
    },
    "extraction": {
        "fields": (
            "take names, numbers, dates, keywords, entities, tables or JSON out of a given text or given "
            "data; count; reformat data"
        ),
        "classify": "put given items or texts into classes, sentiment, rating, labels, sorting, matching",
        "reading": "answer a question from a given passage or given facts",
    },
    "agent": {
        "tool": "choose and call functions or APIs that the prompt describes; produce the call, or say what is missing",
        "plan": (
            "plan or carry out a task of many actions in an environment (browser, shell, files, robot, "
            "home, calendar), decide the next action"
        ),
    },
    "multilingual": {
        "translate": "translate a text or a phrase, localise, transliterate",
        "language": (
            "questions about a language: grammar, vocabulary, idioms, pronunciation, corrections with "
            "explanation for a learner"
        ),
    },
    "advice": {
        "practical": (
            "how to do, cook, repair, travel, organise; step-by-step instructions, itineraries, plans of "
            "the day, recipes, recommendations of things"
        ),
        "personal": "health, feelings, relations, habits, parenting, studies: advice on one's own situation",
        "professional": (
            "business, marketing, career, management, law, money: advice, strategies, plans, interview questions"
        ),
    },
    "chat": {
        "talk": "greetings, small talk, feedback to the assistant, questions about the assistant, unclear fragments",
    },
}

# Domain -> field -> what belongs to it beside what its name says; a word problem has the topic of its story.
TOPIC_TREE: Mapping[str, Mapping[str, str]] = {
    "science": {
        "physics": "",
        "chemistry": "",
        "biology": "",
        "space": "",
        "earth": "climate, weather, environment, geology",
        "mathematics": "where numbers, formulas, figures themselves are the subject and there is no story",
    },
    "technology": {
        "software": "programming, data, databases, artificial intelligence",
        "engineering": "machines, buildings, energy, industry",
        "devices": "phones, computers, internet services, security for users",
    },
    "humanities": {
        "history": "",
        "philosophy": "ethics, logic as a subject",
        "religion": "myths, customs of belief",
        "language": "linguistics, words, grammar, translation without another subject",
    },
    "society": {
        "politics": "",
        "law": "",
        "economics": "",
        "education": "",
        "culture": "peoples, customs, media, geography of countries and cities",
    },
    "business": {
        "company": "management, marketing, sales, products, customers",
        "money": "banks, investing, taxes, budgets, insurance",
        "work": "jobs, careers, colleagues",
    },
    "health": {
        "medicine": "",
        "body": "fitness, food as nutrition, sleep",
        "mind": "feelings, psychology, stress",
    },
    "arts": {
        "literature": "",
        "music": "",
        "screen": "film, series, theatre",
        "visual": "painting, photography, design, fashion, architecture as art",
    },
    "life": {
        "home": "household, repairs, garden, tools",
        "food": "cooking, restaurants",
        "people": "family, friends, love, parties",
        "travel": "",
        "shopping": "shops, prices, buying",
        "transport": "cars, trains, roads, distances",
        "animals": "pets, farms, wildlife as a story",
        "sports": "",
        "games": "games, toys, puzzles, hobbies, collecting",
    },
    "general": {
        "none": "no subject: fragments, greetings, abstract puzzles on letters or symbols",
    },
}

DIFFICULTY: Mapping[int, str] = {
    1: "one step; everyone knows it, or a short text without constraints",
    2: "two steps; school knowledge; a short text with one or two constraints",
    3: "three or so dependent steps, or several constraints, or knowledge of a course, or care with a longer text",
    4: "four to six dependent steps, interacting constraints, or knowledge of a professional or a student of the field",
    5: "more: expert knowledge, long derivations, a design of many parts, subtle traps",
}

SKILLS = tuple(f"{area}/{task}" for area, tasks in SKILL_TREE.items() for task in tasks)
TOPICS = tuple(f"{domain}/{name}" for domain, names in TOPIC_TREE.items() for name in names)
LEVELS = ("easy", "medium", "hard")


def level(difficulty: float) -> str:
    """The level of a difficulty from 1 to 5: easy below 2.5, hard from 3.5, medium between."""
    return LEVELS[0] if difficulty < 2.5 else LEVELS[2] if difficulty >= 3.5 else LEVELS[1]
