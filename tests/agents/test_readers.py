"""Readers of replies: many forms, one meaning; two meanings, none."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agents.reply_rates import rates
from wizard_engine.agents import prompts, replies
from wizard_engine.agents.reading.forms import count_instructions, count_steps

# ruff: noqa: E501 - replies on one line
EQUAL = [
    ("Equal", True),
    ("**Not Equal**", False),
    ("Not Equal\n\nThe second adds a constraint.", False),
    ("Equal or Not Equal?", None),
    ("The verdict is: Not Equal.", False),
    ("```\nEqual\n```", True),
    ('{"verdict": "Not Equal", "reason": "x"}', False),
    ('```json\n{"equal": true}\n```', True),
    ("The first asks x. The second y.\n\n#Verdict#: Not Equal", False),
    ("They are equal in length.", None),
    ("They are equal.", True),
    ("The two instructions are not equal because of depth.", False),
    ("Constraints: Equal\nDepth: Not Equal\n\n**Verdict:** Not Equal", False),
    ("<think>Equal? hmm</think>\nNot Equal", False),
    ("<think>Equal", None),
    ("Equal.\n\nHowever they are not equal.", None),
    ("If they ask the same, the verdict is Equal.", None),
    ("Sure! Here is my verdict:\n\n> **Equal**", True),
    ("El veredicto es: Not Equal", False),
    ("不相等", False),
    ("不相等 (Not Equal)", False),
    ("Not Equal: the second adds x", False),
    ("\\boxed{\\text{Not Equal}}", False),
    ("[[Equal]]", True),
    ("| Verdict | Not Equal |\n|---|---|", False),
    ("Equal, but the second one asks more", None),
    ("I would say they are Not Equal.", False),
    ("After comparison, the answer: `Equal`", True),
    ("Reply with `Equal` if they are the same", None),
    ("The verdict would be Equal", None),
    ("NOT EQUAL!", False),
    ("Ｎｏｔ Ｅｑｕａｌ", False),
    ("Both are equal: same constraints.", True),
    ("The reason is X. Therefore: **Not Equal**.", False),
]
SCORES = [
    ("[[7]] [[4.5]]\nWait, I misread B. [[7]] [[6]]", 2, None),
    ("[[7]] [[4.5]]\nOn reflection:\n[[7]] [[6]]", 2, (7, 6)),
    ("[[7]] [[4.5]]", 2, (7, 4.5)),
    ("A good.\n[[7, 4.5]]", 2, (7, 4.5)),
    ("[[7,5]]", 2, (7, 5)),
    ("[[7/10]] [[4.5/10]]", 2, (7, 4.5)),
    ("Answer A: [[7]]\nAnswer B: [[4.5]]", 2, (7, 4.5)),
    ("Answer B: [[7]]\nAnswer A: [[4.5]]", 2, (4.5, 7)),
    ("[[A: 7]] [[B: 4.5]]", 2, (7, 4.5)),
    ("**[[7]] [[4.5]]**", 2, (7, 4.5)),
    ("［［７］］ ［［４．５］］", 2, (7, 4.5)),
    ("In this form: [[7]] [[4.5]]\n\n[[8]] [[3]]", 2, (8, 3)),
    ("Accuracy: [[7]] [[5]]\nClarity: [[6]] [[8]]", 2, None),
    ("Accuracy: [[7]] [[5]]\nOverall: [[6]] [[8]]", 2, (6, 8)),
    ("Answer A: 7/10\nAnswer B: 4.5/10", 2, (7, 4.5)),
    ("Answer A: 7\nAnswer B: 4.5", 2, (7, 4.5)),
    ("A: 7, B: 4.5", 2, (7, 4.5)),
    ("Answer A: 3 errors\nAnswer B: 2 errors", 2, None),
    ("Scores: A 7, B 4.5", 2, (7, 4.5)),
    ("I give Answer A a 7 and Answer B a 4.5.", 2, (7, 4.5)),
    ("good.\n7 4.5", 2, (7, 4.5)),
    ("7/10", 2, None),
    ("[7] [5]", 2, (7, 5)),
    ('{"score_a": 7, "score_b": 4.5}', 2, (7, 4.5)),
    ('{"A": {"score": 7}, "B": {"score": "4.5/10"}}', 2, (7, 4.5)),
    ('{"scores": [7, 4.5]}', 2, (7, 4.5)),
    ("| Answer | Score |\n|---|---|\n| A | 7 |\n| B | 4.5 |", 2, (7, 4.5)),
    ("| | A | B |\n|--|--|--|\n| Accuracy | 7 | 5 |\n| Overall | 8 | 3 |", 2, (8, 3)),
    ("A [[3]] is worse. [[7]] [[4.5]]", 2, (7, 4.5)),
    ("[[0]] [[5]]", 2, None),
    ("[[11]] [[5]]", 2, None),
    ("[[7]]", 2, None),
    ("", 2, None),
    ("[[7]] [[4.5]]\n\nAnswer A is better since 3 of 5.", 2, (7, 4.5)),
    ("[[7-8]] [[4]]", 2, None),
    ("[[85/100]] [[40/100]]", 2, None),
    ("\\boxed{7} \\boxed{4.5}", 2, (7, 4.5)),
    ("Answer A (7/10) is better than Answer B (4.5/10).", 2, (7, 4.5)),
    ("The score of Answer A is 7 and the score of Answer B is 4.5.", 2, (7, 4.5)),
    ("回答A：7分\n回答B：4.5分", 2, (7, 4.5)),
    ("Assistant A's score: 7\nAssistant B's score: 4.5", 2, (7, 4.5)),
    ("[[7]]", 1, (7,)),
    ("Score: 7.5/10", 1, (7.5,)),
    ("7.5/10", 1, (7.5,)),
    ("Accuracy: 7/10\nClarity: 6/10", 1, None),
    ("Accuracy: 7/10\nClarity: 6/10\nOverall: 6.5/10", 1, (6.5,)),
    ("I rate it 8 out of 10.", 1, (8,)),
    ("Correctness [[8]]. Clarity [[6]]. Overall [[7]]", 1, (7,)),
    ("Correctness: [[8]]\nClarity: [[6]]", 1, None),
    ("8", 1, (8,)),
    ("Rating: [[8]]/10", 1, (8,)),
    ("Score: 85/100", 1, None),
    ("4/5", 1, None),
    ("7-8/10", 1, None),
    ("**Score:** 9", 1, (9,)),
    ('{"assessment": "good", "score": 8.5}', 1, (8.5,)),
    ("Puntuación: 8", 1, (8,)),
    ("评分：8/10", 1, (8,)),
    ("[[8]] [[7]]", 1, None),
    ("The result 42 is right.\n\n[[9]]", 1, (9,)),
    ("<think>maybe [[3]]</think>[[9]]", 1, (9,)),
    ("I would give this answer a score of 7.", 1, (7,)),
    ("Final score: 7.5", 1, (7.5,)),
    ("Final verdict: 7.5/10 - good", 1, (7.5,)),
    ("7½/10", 1, (7.5,)),
    ("The answer is 8.", 1, None),
    ("There are 5 steps of which 3 are right", 1, None),
]
LABELS = [
    ("1\n0\n-1", 3, (1, 0, -1)),
    ("1\n0", 3, None),
    ("1\n0\n-1\n1", 3, None),
    ("1\nfine\n-1", 3, None),
    ("", 0, ()),
    ("1. 1\n2. 0\n3. -1", 3, (1, 0, -1)),
    ("Step 1: 1\nStep 2: 0\nStep 3: -1", 3, (1, 0, -1)),
    ("1) 1\n2) 0\n3) -1", 3, (1, 0, -1)),
    ("1: 1\n2: 0\n3: -1", 3, (1, 0, -1)),
    ("Step 1: 1 (right)\nStep 2: 0 - a remark\nStep 3: -1, because 3*4=12", 3, (1, 0, -1)),
    ("Step 1: The product is right. 1\nStep 2: A remark. 0\nStep 3: Wrong. -1", 3, (1, 0, -1)),
    ("Step 1: 3*4=12 holds. [[1]]\nStep 2: filler [[0]]\nStep 3: no [[-1]]", 3, (1, 0, -1)),
    ("**Step 1:** 1\n**Step 2:** 0\n**Step 3:** −1", 3, (1, 0, -1)),
    ("[1, 0, -1]", 3, (1, 0, -1)),
    ("1, 0, -1", 3, (1, 0, -1)),
    ('{"labels": [1, 0, -1]}', 3, (1, 0, -1)),
    (
        '{"step_1": {"reason":"x","label":1},"step_2":{"reason":"x","label":0},"step_3":{"reason":"x","label":-1}}',
        3,
        (1, 0, -1),
    ),
    ('```json\n[{"step":1,"label":1},{"step":2,"label":0},{"step":3,"label":-1}]\n```', 3, (1, 0, -1)),
    ("Here are the labels:\n\n1\n0\n-1", 3, (1, 0, -1)),
    ("1\n0\n-1\n\nStep 3 is wrong because 5-3=2.", 3, (1, 0, -1)),
    (
        "### Step 1\n3*4=12 is right.\n**Label:** 1\n\n### Step 2\nA remark.\n**Label:** 0\n\n### Step 3\nWrong.\n**Label:** -1",
        3,
        (1, 0, -1),
    ),
    ("Step 1: right.\nStep 2: filler.\nStep 3: wrong.\n\nLabels:\n1\n0\n-1", 3, (1, 0, -1)),
    ("| Step | Label |\n|---|---|\n| 1 | 1 |\n| 2 | 0 |\n| 3 | -1 |", 3, (1, 0, -1)),
    (
        "| Step | Content | Label | Reason |\n|---|---|---|---|\n| 1 | 3*4=12 | 1 | right |\n| 2 | x | 0 | y |\n| 3 | z | -1 | w |",
        3,
        (1, 0, -1),
    ),
    ("Step 1: 1 + 2 = 3 is right\nStep 2: 1 apple\nStep 3: 0 apples", 3, None),
    ("- 1\n- 0\n- -1", 3, (1, 0, -1)),
    ("- 1\n- 1\n- 1", 3, None),
    ("* 1\n* 0\n* -1", 3, (1, 0, -1)),
    ("１\n０\n－１", 3, (1, 0, -1)),
    ("步骤1：1\n步骤2：0\n步骤3：-1", 3, (1, 0, -1)),
    ("第1步：1\n第2步：0\n第3步：-1", 3, (1, 0, -1)),
    ("Paso 1: 1\nPaso 2: 0\nPaso 3: -1", 3, (1, 0, -1)),
    ("Step 1: 1, Step 2: 0, Step 3: -1", 3, (1, 0, -1)),
    ("+1\n0\n-1", 3, (1, 0, -1)),
    ("1 - correct\n0 - remark\n-1 - wrong", 3, (1, 0, -1)),
    ("1. correct\n1. correct\n1. wrong", 3, None),
    ("1: correct\n2: correct\n3: wrong", 3, None),
    ("2\n0\n1", 3, None),
    ("Step 1: 1\nStep 2: 0\nStep 2: 1\nStep 3: -1", 3, None),
    ("1", 1, (1,)),
    ("1. Wrong", 1, None),
    ("Step 1: -1", 1, (-1,)),
    ("The step is right.\n\n1", 1, (1,)),
    ("Step 1 (3*4=12): 1\nStep 2 (12+1): 0\nStep 3 (x): -1", 3, (1, 0, -1)),
    ("1 → 1\n2 → 0\n3 → -1", 3, (1, 0, -1)),
    ("1 - 1\n2 - 0\n3 - 1", 3, None),
    ("Step 1: 1\nStep 2: 0\nStep 3: -1\n\nThe last step is wrong since 5-3 is 2.", 3, (1, 0, -1)),
    (
        "Step 1: 1.\n   Reason: product is right.\nStep 2: 0.\n   Reason: none.\nStep 3: -1.\n   Reason: 5-3=2.",
        3,
        (1, 0, -1),
    ),
    ("1: 1\n2: 1\n3: 1", 3, (1, 1, 1)),
    ("1. [1]\n2. [0]\n3. [-1]", 3, (1, 0, -1)),
    ("Labels: 1 0 -1", 3, (1, 0, -1)),
    ("Step 1: Correct (1)\nStep 2: Neutral (0)\nStep 3: Incorrect (-1)", 3, (1, 0, -1)),
    ('Step 1: "3*4=12" → 1\nStep 2: "ok" → 0\nStep 3: "x" → -1', 3, (1, 0, -1)),
    ("Step 1: we get 1\nStep 2: so 0\nStep 3: thus -1", 3, None),
]
RANKINGS = [
    ("1: 7.5\n2: 3", 2, (7.5, 3)),
    ("2: 3\n1: 4", 2, (4, 3)),
    ("1: 7", 2, None),
    ("1: 7\n2: 11", 2, None),
    ("1. 7.5/10\n2. 3/10", 2, (7.5, 3)),
    ("1) 7\n2) 3", 2, (7, 3)),
    ("Instruction 1: 7\nInstruction 2: 3", 2, (7, 3)),
    ("**1**: 7.5\n**2**: 3", 2, (7.5, 3)),
    ("1: 7.5 - clear\n2: 3 (vague)", 2, (7.5, 3)),
    ("1. Clear. Score: 7.5\n2. Vague. Score: 3", 2, (7.5, 3)),
    ('{"1": 7.5, "2": 3}', 2, (7.5, 3)),
    ('{"scores": [7.5, 3]}', 2, (7.5, 3)),
    ('[{"instruction": 2, "score": 3}, {"instruction": 1, "score": 7.5}]', 2, (7.5, 3)),
    ("| # | Score |\n|---|---|\n| 1 | 7.5 |\n| 2 | 3 |", 2, (7.5, 3)),
    (
        "| Instruction | Definition | Precision | Overall Score |\n|---|---|---|---|\n| 1 | 8 | 7 | 7.5 |\n| 2 | 3 | 3 | 3 |",
        2,
        (7.5, 3),
    ),
    ("7.5\n3", 2, (7.5, 3)),
    ("2\n1", 2, None),
    ("2 > 1", 2, None),
    ("1: definition 8, precision 7\n2: definition 3, precision 2", 2, None),
    ("1: definition 8, precision 7, overall: 7.5\n2: definition 3, precision 2, overall: 3", 2, (7.5, 3)),
    ("1: [[7.5]]\n2: [[3]]", 2, (7.5, 3)),
    ("1: 7/10 - good\n2: 3/10 - bad", 2, (7, 3)),
    ("Here are the scores:\n\n1: 7.5\n2: 3\n\nThe first is harder.", 2, (7.5, 3)),
    ("1：7.5\n2：3", 2, (7.5, 3)),
    ("1: 7.5, 2: 3", 2, (7.5, 3)),
    (
        "### Instruction 1\n- Definition: 8\n- Precision: 7\n**Score: 7.5**\n\n### Instruction 2\n- Definition: 3\n- Precision: 3\n**Score: 3**",
        2,
        (7.5, 3),
    ),
    ("1: 0\n2: 10", 2, (0, 10)),
    ("1: 7-8\n2: 3", 2, None),
    ("1: 85/100\n2: 30/100", 2, None),
    ('1. "Tom has 12 apples" - 7.5\n2. "Tom has some apples" - 3', 2, (7.5, 3)),
    ("1: 2\n2: 1", 2, (2, 1)),
    ("Scores: 7.5, 3", 2, (7.5, 3)),
    ("1. definition: 8, precision: 7 → 7.5\n2. definition: 3, precision: 2 → 3", 2, (7.5, 3)),
]
TAGS = [
    (
        "Topic: cooking\nSkill: extraction\nDifficulty: easy",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "**Topic:** Cooking\n**Skill:** Extraction\n**Difficulty:** Easy",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "- Topic: cooking\n- Skill: extraction\n- Difficulty: easy",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "Topic: cooking, Skill: extraction, Difficulty: easy",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        '{"topic": "cooking", "skill": "extraction", "difficulty": "easy"}',
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "| Topic | cooking |\n|---|---|\n| Skill | extraction |\n| Difficulty | easy |",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "| Topic | Skill | Difficulty |\n|---|---|---|\n| cooking | extraction | easy |",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "Topic: cooking\nSkill: extraction\nDifficulty: easy (it needs one look)",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    ("Topic: cooking\nSkill: extraction\nDifficulty: easy to medium", None),
    ("Topic: cooking\nSkill: extraction", None),
    (
        "Tema: cooking\nHabilidad: extraction\nDificultad: fácil",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    ("主题：cooking\n技能：extraction\n难度：简单", {"topic": "cooking", "skill": "extraction", "difficulty": "easy"}),
    ("Topic: cooking\nSkill: extraction\nDifficulty: very", None),
    ("Topic: a\u2028Skill: b\x85Difficulty: hard\r\n", {"topic": "a", "skill": "b", "difficulty": "hard"}),
    (
        "Sure!\n\n1. Topic: cooking\n2. Skill: extraction\n3. Difficulty: easy\n\nLet me know.",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    ("Topic: cooking\nTopic: art\nSkill: extraction\nDifficulty: easy", None),
    ("Topic: c++\nSkill: code\nDifficulty: hard", {"topic": "c++", "skill": "code", "difficulty": "hard"}),
    (
        "Topic: cooking - recipes\nSkill: extraction\nDifficulty: Easy.",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        'Topic: "cooking" | Skill: extraction | Difficulty: easy',
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "`Topic: cooking`\n`Skill: extraction`\n`Difficulty: easy`",
        {"topic": "cooking", "skill": "extraction", "difficulty": "easy"},
    ),
    (
        "Topic: science, physics\nSkill: extraction\nDifficulty: easy",
        {"topic": "science, physics", "skill": "extraction", "difficulty": "easy"},
    ),
]
EVOLVED = [
    ("a b", "a b"),
    ("plan\n#Rewritten Instruction#:\nnew\nlines\n", "new\nlines"),
    ("#Rewritten Instruction#: one\n#Rewritten Instruction#: two", None),
    ("#Rewritten Instruction#:", None),
    (
        "#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "**#Rewritten Instruction#:**\nHow many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "### Rewritten Instruction\n\nHow many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "**Rewritten Instruction:** How many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    ("Rewritten Instruction: How many apples has Tom if he buys 3 more?", "How many apples has Tom if he buys 3 more?"),
    (
        "Sure! Here's the rewritten instruction:\n\nHow many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\n```\nHow many apples has Tom if he buys 3 more?\n```",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        '#Rewritten Instruction#:\n"How many apples has Tom if he buys 3 more?"',
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?\n\n#Method#:\n",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?\n\n**Explanation:** I added a condition.",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?\n\n---\n\nThis version adds a step.",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        '{"rewritten_instruction": "How many apples has Tom if he buys 3 more?"}',
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        '```json\n{"rewritten_instruction": "How many apples has Tom if he buys 3 more?"}\n```',
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "<think>Plan #Rewritten Instruction#: foo</think>\n#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    ("I'm sorry, but I can't help with that.", None),
    ("Sure, I would be happy to help you with that!", None),
    ("#Rewritten Instruction#:\n[Your rewritten instruction here]", None),
    (
        "Step 1: list ways\nStep 2: plan\nStep 3: #Rewritten Instruction#: draft\nStep 4: **Finally Rewritten Instruction:** How many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "1. Ways: add a number\n2. Plan: do it.\n\n#Rewritten Instruction#:\n> How many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "How many apples has Tom if he buys 3 more?\n\n(Note: I added one condition to the instruction.)",
        "How many apples has Tom if he buys 3 more?",
    ),
    ("Instrucción reescrita: How many apples has Tom if he buys 3 more?", "How many apples has Tom if he buys 3 more?"),
    ("改写后的指令：How many apples has Tom if he buys 3 more?", "How many apples has Tom if he buys 3 more?"),
    (
        "Sure! #Rewritten Instruction#: How many apples has Tom if he buys 3 more?",
        "How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\nWrite an email.\n\nNote: keep it under 50 words.",
        "Write an email.\n\nNote: keep it under 50 words.",
    ),
    (
        "#Rewritten Instruction#:\n#Rewritten Prompt#: How many apples has Tom if he buys 3 more?",
        "#Rewritten Prompt#: How many apples has Tom if he buys 3 more?",
    ),
    (
        "#Rewritten Instruction#:\nHow many apples has Tom if he buys 3 more?<|im_end|>",
        "How many apples has Tom if he buys 3 more?",
    ),
    ("The rewritten instruction asks for more.", None),
    (
        "#Rewritten Instruction#:\nWhat does this do?\n```python\nx = 1\n```",
        "What does this do?\n```python\nx = 1\n```",
    ),
    (
        "## Rewritten Instruction:\nHow many apples has Tom if he buys 3 more?\n\n## Explanation:\nThe constraint was added.",
        "How many apples has Tom if he buys 3 more?",
    ),
]
REWRITTEN = [
    ("3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("Here is the improved answer:\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("Sure! Here's a more helpful version of the answer:\n\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("**Improved Answer:**\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("#Improved Answer#:\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("3*4=12\nThe answer is 12.\n\n**Changes made:** I checked the result.", "3*4=12\nThe answer is 12."),
    ("Certainly!\n\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("```\n3*4=12\nThe answer is 12.\n```", "3*4=12\nThe answer is 12."),
    ("No changes are needed.", None),
    ("I'm sorry, but I can't rewrite this answer.", None),
    ("3*4=12\nThe answer is 12.\n\n---\n\nThis version is more concise.", "3*4=12\nThe answer is 12."),
    ("", None),
    ("Here is the improved answer:", None),
    ("This is a new recipe: mix flour and eggs.", "This is a new recipe: mix flour and eggs."),
    ("Here is a list of things:\n- a\n- b", "Here is a list of things:\n- a\n- b"),
    ("Aquí está la respuesta mejorada:\n\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("以下是改进后的答案：\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("I have revised the answer to be more helpful:\n\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("Of course! Below is the revised answer.\n\n3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("```python\nprint(1)\n```", "```python\nprint(1)\n```"),
    ("<think>x</think>3*4=12\nThe answer is 12.", "3*4=12\nThe answer is 12."),
    ("Here is the code:\n```python\nx=1\n```", "Here is the code:\n```python\nx=1\n```"),
    ("Sure, 12 is right.", "Sure, 12 is right."),
]
SUGGESTIONS = [
    ("Check step 2.", "Check step 2."),
    ("#Suggestion#:\nCheck step 2.", "Check step 2."),
    ("**Suggestion:** Check step 2.", "Check step 2."),
    ("Suggestion: Check step 2.", "Check step 2."),
    ('"Check step 2."', "Check step 2."),
    ("", None),
    ("Here is my suggestion: Check step 2.", "Check step 2."),
    ('{"suggestion": "Check step 2."}', "Check step 2."),
]
REVIEWS = [
    ("No failed case.", "No failed case."),
    ("Case 1: a\nCase 3: b", "Case 1: a\nCase 3: b"),
    ("Here are the failed cases:\n\n- **Case 1**: a\n- **Case 3**: b", "Case 1: a\nCase 3: b"),
    ("1. Case 1 - a\n2. Case 3 - b", "Case 1: a\nCase 3: b"),
    ('[{"case": 1, "reason": "a"}]', "Case 1: a"),
    ("There are no failed cases.", "No failed case."),
    ("All cases evolved correctly.", "No failed case."),
    ("The method is good.", None),
    ("Case 1: no failure\nCase 2: wrong", "Case 2: wrong"),
    ("### Case 2\nThe language changed.", "Case 2: The language changed."),
    ("Cases 1 and 2: too large a jump", "Case 1: too large a jump\nCase 2: too large a jump"),
    ("Case 1: a\nmore\n\nOverall the method is weak.", "Case 1: a more"),
]
METHODS = [
    ("x\n```\nold\n```\n```text\nnew\nrule\n```", None),
    ("no fence", None),
    ("```\n```", None),
    ("~~~\n1. a\n~~~", "1. a"),
    ("Here:\n```markdown\n1. a\n2. b\n```\nIt helps.", "1. a\n2. b"),
    ("#New Method#:\n1. a\n2. b", "1. a\n2. b"),
    ("1. a\n2. b", "1. a\n2. b"),
    ("```\n1. a", None),
    ("New method:\n```\n1. a\n```\nExample:\n```\nfoo\n```", "1. a"),
    ("Old method:\n```\nfoo\n```\nNew method:\n```\n1. a\n```", "1. a"),
    ("````\n1. a\n```\nx\n```\n````", "1. a\n```\nx\n```"),
    ('```json\n{"method": "1. a"}\n```', "1. a"),
    ("```\r\n1. think\r\n```", "1. think"),
    ("```1. a```", "1. a"),
]


def ids(rows):
    return [str(number) for number in range(len(rows))]


@pytest.mark.parametrize(("text", "expected"), EQUAL, ids=ids(EQUAL))
def test_read_equal(text, expected):
    assert replies.read_equal(text) is expected


@pytest.mark.parametrize(("text", "count", "expected"), SCORES, ids=ids(SCORES))
def test_read_scores(text, count, expected):
    assert replies.read_scores(text, count) == expected


@pytest.mark.parametrize(("text", "count", "expected"), LABELS, ids=ids(LABELS))
def test_read_labels(text, count, expected):
    assert replies.read_labels(text, count) == expected


@pytest.mark.parametrize(("text", "count", "expected"), RANKINGS, ids=ids(RANKINGS))
def test_read_ranking(text, count, expected):
    assert replies.read_ranking(text, count) == expected


@pytest.mark.parametrize(("text", "expected"), TAGS, ids=ids(TAGS))
def test_read_tags(text, expected):
    assert replies.read_tags(text) == expected


@pytest.mark.parametrize(("text", "expected"), EVOLVED, ids=ids(EVOLVED))
def test_read_evolved(text, expected):
    assert replies.read_evolved(text) == expected


@pytest.mark.parametrize(("text", "expected"), REWRITTEN, ids=ids(REWRITTEN))
def test_read_rewritten(text, expected):
    assert replies.read_rewritten(text) == expected


@pytest.mark.parametrize(("text", "expected"), SUGGESTIONS, ids=ids(SUGGESTIONS))
def test_read_suggestion(text, expected):
    assert replies.read_suggestion(text) == expected


@pytest.mark.parametrize(("text", "expected"), REVIEWS, ids=ids(REVIEWS))
def test_read_review(text, expected):
    assert replies.read_review(text) == expected


@pytest.mark.parametrize(("text", "expected"), METHODS, ids=ids(METHODS))
def test_read_method(text, expected):
    assert replies.read_method(text) == expected


def test_an_answer_repeated_unchanged_is_one_whatever_it_says():
    refusal = "Sorry, I cannot help with that."
    assert replies.read_rewritten(refusal) is None
    assert replies.read_rewritten(refusal, refusal) == refusal
    assert replies.read_reply("rewrite", refusal, {"answer": refusal}) == refusal


# ---- generated: wrappings that change nothing ----------------------------------------------------------------------

WRAPPINGS = st.sampled_from(
    [
        "{}",
        "<think>First [[3]] [[3]], 1: 3, Not Equal or Equal?</think>\n\n{}",
        "Sure, here is my reply:\n\n{}",
        "```\n{}\n```",
        "{}<|im_end|>",
        "\u200b{}\n\n",
        "\n\n{}\u3000",
    ]
)
VALUES = st.sampled_from([1, 1.5, 2, 4, 4.5, 7, 9.5, 10])
REASONS = st.sampled_from(["The product is right.", "It adds nothing.", "3*4=12 holds", "5 - 3 is 2, not 1."])
FULL_WIDTH = str.maketrans("0123456789[]:.", "０１２３４５６７８９［］：．")


@settings(max_examples=50, deadline=None)
@given(
    VALUES,
    VALUES,
    WRAPPINGS,
    st.sampled_from(
        [
            "[[{:g}]] [[{:g}]]",
            "**[[{:g}]] [[{:g}]]**",
            "Answer A: [[{:g}]]\nAnswer B: [[{:g}]]",
            "[[A: {:g}]], [[B: {:g}/10]]",
            "[[{:g}, {:g}]]",
        ]
    ),
    REASONS,
    st.booleans(),
)
def test_scores_in_any_wrapping(a, b, wrapping, form, reason, is_wide):
    line = form.format(a, b)
    text = wrapping.format(f"{reason}\n{line.translate(FULL_WIDTH) if is_wide else line}")
    assert replies.read_scores(text, 2) == (a, b)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 0, -1]), REASONS), min_size=2, max_size=12),
    WRAPPINGS,
    st.sampled_from(
        ["{n}: {r} [[{x}]]", "Step {n}: {x}", "{n}. {x} ({r})", "**Step {n}:** {r} → {x}", "{n}) {r} Label: {x}"]
    ),
)
def test_labels_in_any_wrapping(steps, wrapping, form):
    lines = [form.format(n=number, x=label, r=reason) for number, (label, reason) in enumerate(steps, start=1)]
    assert replies.read_labels(wrapping.format("\n".join(lines)), len(steps)) == tuple(label for label, _ in steps)
    assert replies.read_labels(wrapping.format("\n".join(lines[:-1])), len(steps)) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(VALUES, min_size=2, max_size=8),
    WRAPPINGS,
    st.sampled_from(
        [
            "{n}: {x:g}",
            "{n}. {x:g}/10",
            "**Instruction {n}:** {x:g}",
            "{n}: [[{x:g}]]",
            "{n}: {x:g} - clear and complete",
        ]
    ),
)
def test_rankings_in_any_wrapping(scores, wrapping, form):
    lines = [form.format(n=number, x=score) for number, score in enumerate(scores, start=1)]
    assert replies.read_ranking(wrapping.format("\n".join(lines)), len(scores)) == tuple(scores)
    assert replies.read_ranking(wrapping.format("\n".join(lines[:-1])), len(scores)) is None


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(0, 4))
def test_any_text_is_read_or_not_and_never_an_error(text, count):
    for task in replies.READERS:
        steps = "\n".join(["a"] * count)
        fields = {"answer_steps": steps, "instructions": prompts.numbered(["a"] * count), "answer": ""}
        fields["trajectory"] = prompts.trajectory([(["a"], "b")] * count)
        replies.read_reply(task, text, fields)


RUNS = [
    "[",
    "{",
    "([",
    "**",
    "`",
    "| ",
    "1: ",
    "<",
    "\\boxed{",
    "A ",
    "A : is ",
    "verdict : is ",
    "Step 1: 1 ",
    "- ",
    " ",
]


# Catches: a pattern that tries the same characters in many ways; 2,000 characters would then take minutes.
@pytest.mark.parametrize("run", RUNS, ids=map(str, range(len(RUNS))))
def test_runs_of_one_sign_are_read_at_once(run):
    started = time.process_time()
    for task in replies.READERS:
        replies.read_reply(task, run * (2000 // len(run)) + "\nx", FIELDS)
    assert time.process_time() - started < 5


# ---- the corpus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", prompts.TASKS)
def test_corpus_of_replies_is_read_without_a_wrong_reading(family):
    counts, others = rates(family, lambda text, fields: replies.read_reply(family, text, fields))
    assert [(row["reply"], meaning) for result, row, meaning in others if result == "wrong"] == []
    assert counts["right"] / counts.total() >= 0.99


# Catches: a reader that looks at the corpus row and not at its form: blanks, a fence, bold and a closing token change
# no reading of a verdict.
@pytest.mark.parametrize("family", ["judge", "rate", "rank", "label", "compare", "tag", "diagnose"])
@pytest.mark.parametrize(
    "wrapping",
    ["\n\n{}\n\n", "{}<|im_end|>", "<think>[[1]] Equal, or 1: 1?</think>\n{}", "{}</s>"],
    ids=map(str, range(4)),
)
def test_corpus_is_read_as_well_in_wrappings(family, wrapping):
    _, others = rates(
        family,
        lambda text, fields: replies.read_reply(
            family, wrapping.format(text) if "<think" not in text and "think>" not in text else text, fields
        ),
    )
    assert [(row["reply"], meaning) for result, row, meaning in others if result == "wrong"] == []
    assert len(others) <= 3


# ---- the table of forms ----------------------------------------------------------------------------------------------

FIELDS = {
    "answer_steps": "3*4=12\n\nThe answer is 12.",
    "instructions": "1. Add 2 and 3.\n2. Add 2 and 4.\n3. Add.",
    "answer": "",
    "trajectory": "Case 1\nStage 0: a",
}
BY_SCHEMA = {
    "compare": ({"reasons": "x", "verdict": "Not Equal"}, False),
    "judge": ({"assessment": "A: 3 of 4 steps, [[1]] [[2]]", "score_a": 7, "score_b": 4.5}, (7, 4.5)),
    "rate": ({"assessment": "8/10 would be too much", "score": 7.5}, (7.5,)),
    "label": ({"step_1": {"reasons": "right", "label": 1}, "step_2": {"reasons": "Label: 1?", "label": -1}}, (1, -1)),
    "rank": ({f"instruction_{n}": {"reasons": "Score: 1", "score": n + 0.5} for n in (1, 2, 3)}, (1.5, 2.5, 3.5)),
    "diagnose": (
        {"assessment": "facts lost? no", "failures": [{"reason": "12 became 15", "class": "facts lost"}]},
        {"facts lost": "12 became 15"},
    ),
    "tag": (
        {"reasons": "x", "topic": "sums", "skill": "addition", "difficulty": "easy"},
        {"topic": "sums", "skill": "addition", "difficulty": "easy"},
    ),
}


def test_counts_of_fields_are_those_of_the_prompt():
    assert (count_steps(FIELDS), count_instructions(FIELDS)) == (2, 3)


@pytest.mark.parametrize("task", BY_SCHEMA)
def test_reply_by_schema_is_read(task):
    reply, expected = BY_SCHEMA[task]
    found = replies.schema(task, FIELDS)
    assert list(found["properties"]) == list(reply) and found["required"] == list(reply)
    for text in (json.dumps(reply), json.dumps(reply, indent=2), f"```json\n{json.dumps(reply)}\n```"):
        assert replies.read_reply(task, text, FIELDS) == expected
    first = reply[next(iter(reply))]
    reasons = list(first) if isinstance(first, dict) else list(reply)
    assert reasons[0] in ("reasons", "assessment")


def test_texts_have_no_schema():
    assert {task for task in replies.READERS if replies.schema(task, FIELDS) is None} == set(replies.READERS) - set(
        BY_SCHEMA
    )


def test_missing_line_says_the_form_and_the_number():
    lines = {task: replies.missing_line(task, FIELDS) for task in replies.READERS}
    assert all("\n" not in line and line.startswith("Your reply could not be read.") for line in lines.values())
    assert "[[7]] [[4.5]]" in lines["judge"] and "2 lines" in lines["label"] and "3 lines" in lines["rank"]
    assert "Not Equal" in lines["compare"] and "#Rewritten Instruction#:" in lines["evolve"]


def test_unknown_task_is_refused():
    for call in (replies.missing_line, replies.schema):
        with pytest.raises(ValueError, match=r"task: expected one of evolve, .*got 'sing'"):
            call("sing", {})
    with pytest.raises(ValueError, match="task: expected one of"):
        replies.read_reply("sing", "la", {})


# Catches: a word of the instruction that is taken for one of its heading.
def test_a_copied_heading_stays_whatever_the_instruction_says():
    copied = "#Rewritten Prompt#: Leo tiene 8 lirios. ¿Cuántos lirios tiene Leo al final?"
    assert replies.read_evolved(f"#Rewritten Instruction#:\n{copied}") == copied


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 6000, "1e999", "NaN"])
def test_numbers_beyond_all_scales_are_no_verdict(number):
    for text in (f'{{"1": {number}, "2": 3}}', f"[{number}, 2]", f'{{"a": {number}, "b": 3}}', f"[[{number}]] [[2]]"):
        assert replies.read_scores(text, 2) is replies.read_labels(text, 2) is replies.read_ranking(text, 2) is None


# Catches: the place in a list, the best one first, taken for the number of an instruction.
@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("1. Version 3: 9\n2. Version 1: 7\n3. Version 2: 5", (7, 5, 9)),
        ("1) **Instruction 3** - 9/10\n2) **Instruction 1** - 7/10\n3) **Instruction 2** - 5/10", (7, 5, 9)),
        ("**1.** 指令 3：9\n**2.** 指令 1：7\n**3.** 指令 2：5", (7, 5, 9)),
        ("1. Version 1: 9\n2. Version 2: 7\n3. Version 3: 5", (9, 7, 5)),
        ("1. Version 3 is the best: 9\n2. Version 1 is good: 7\n3. Version 2: 5", None),
        ("| Rank | Version | Score |\n|---|---|---|\n| 1 | 3 | 9 |\n| 2 | 1 | 7 |\n| 3 | 2 | 5 |", (7, 5, 9)),
        ("| Rank | Score |\n|---|---|\n| 1 | 9 |\n| 2 | 7 |\n| 3 | 5 |", None),
        ("#1 - Version 3 (9/10)\n#2 - Version 1 (7/10)\n#3 - Version 2 (5/10)", (7, 5, 9)),
        ("1. #3: 9\n2. #1: 7\n3. #2: 5", (7, 5, 9)),
        ("#1: 9\n#2: 7\n#3: 5", (9, 7, 5)),
        ('[{"rank": 1, "score": 9}, {"rank": 2, "score": 7}, {"rank": 3, "score": 5}]', None),
        (
            '[{"rank": 1, "version": 3, "score": 9}, {"rank": 2, "version": 1, "score": 7},'
            ' {"rank": 3, "version": 2, "score": 5}]',
            (7, 5, 9),
        ),
        # A table on its side: its head is no list of scores.
        ("| | 1 | 2 | 3 |\n|---|---|---|---|\n| Score | 7 | 5 | 9 |", (7, 5, 9)),
        ("| | Version 1 | Version 2 | Version 3 |\n|---|---|---|---|\n| Score | 7/10 | 5/10 | 9/10 |", (7, 5, 9)),
    ],
)
def test_a_list_from_best_to_worst_is_read_by_its_names(reply, scores):
    assert replies.read_reply("rank", reply, {"instructions": "1. a\n2. b\n3. c"}) == scores


def test_steps_in_another_order_than_their_lists_have_no_labels():
    fields = {"instruction": "q", "answer_steps": "a\nb"}
    assert replies.read_reply("label", "1. Step 1: [[1]]\n2. Step 2: [[0]]", fields) == (1, 0)
    assert replies.read_reply("label", "1. Step 2: [[1]]\n2. Step 1: [[0]]", fields) is None


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("A: 8/10 for accuracy, 6/10 for clarity. B: 7/10 for accuracy, 9/10 for clarity.", None),
        ("Answer A: 8/10 for accuracy and 6/10 for style.\nAnswer B: 7/10 on accuracy and 9/10 on style.", None),
        ("Answer A: 8 for accuracy, 6 for clarity\nAnswer B: 7 for accuracy, 9 for clarity", None),
        ("Answer A: 8/10 for its clarity.\nAnswer B: 7/10 for its brevity.", (8, 7)),
        ("Answer A: 8/10 for being right.\nAnswer B: 5/10 for being wrong.", (8, 5)),
    ],
)
def test_scores_of_criteria_are_not_those_of_an_answer(reply, scores):
    assert replies.read_reply("judge", reply, {"instruction": "q", "answer_a": "a", "answer_b": "b"}) == scores


@pytest.mark.parametrize(
    "reply",
    [
        "Rank: A: 2, B: 1",
        "Place: Answer A: 1, Answer B: 2",
        "Number of mistakes - A: 3, B: 1",
        "Length (words): A: 9, B: 7",
    ],
)
def test_other_numbers_of_answers_are_no_scores(reply):
    fields = {"instruction": "q", "answer_a": "a", "answer_b": "b"}
    assert replies.read_reply("judge", reply, fields) is None
    assert replies.read_reply("judge", f"{reply}\nScore: A: 4, B: 6", fields) == (4, 6)


@pytest.mark.parametrize(
    "reply",
    [
        "7/10 steps are right.",
        "In all, 7/10 of the claims are true.",
        "10/10 would be perfect.",
        "Not a 10/10.",
        "Confidence: 9/10",
        "Difficulty: 9/10",
        "A perfect answer would get 10/10.",
    ],
)
def test_other_numbers_out_of_ten_are_no_score(reply):
    fields = {"instruction": "q", "answer": "a"}
    assert replies.read_reply("rate", reply, fields) is None
    assert replies.read_reply("rate", f"{reply} This one gets 4/10.", fields) == (4,)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Equal: No", False),
        ("**Equal**: false", False),
        ("Equal? No.", False),
        ("Equal: no further limit is added", True),
        ("Is the second Equal to the first? No.", None),
    ],
)
def test_a_no_behind_equal_is_a_verdict(reply, verdict):
    assert replies.read_reply("compare", reply, {"first": "a", "second": "b"}) is verdict


# What stands beside a verdict and turns it into another, and plain ways of saying one.
BESIDE = [
    *[
        ("judge", reply, None)
        for reply in (
            "[[9]] [[5]] for B and A respectively",
            "B, A: [[9]] [[5]]",
            "Scores for Answer B and Answer A respectively:\n[[9]] [[5]]",
            "Scores (B, A): [9, 5]",
            "If the reference were ignored: [[8]] [[6]]",
            "[[8]] [[6]] if the reference were ignored",
            "Had A shown its steps: A: 9/10, B: 5/10",
            "If the reference were ignored: A: 8/10, B: 6/10",
        )
    ],
    ("judge", "Both B and A are right. [[9]] [[5]]", (9, 5)),
    ("judge", "A does not check if n is 0, so A gets [[6]] and B gets [[8]].", (6, 8)),
    ("judge", "Ignoring the reference: [[8]] [[6]]\nWith it: [[3]] [[6]]", (3, 6)),
    ("judge", "Answer A gets 8 out of 10 while B gets only 3 out of 10.", (8, 3)),
    ("judge", "Respuesta A: 8 sobre 10. Respuesta B: 6 sobre 10.", (8, 6)),
    ("judge", "[[7]] [[4.5]]\n[[7]] [[4.5]]", (7, 4.5)),
    ("judge", "[[7]] [[4.5]]\n[[7]] [[5]]", None),
    ("rate", "The maximum score is 10.", None),
    ("rate", "The highest possible score is 10.", None),
    ("rate", "A perfect score is 10.", None),
    ("rate", "Maximum score: 10\nScore: 7", (7,)),
    ("rate", "If it had a proof, I would give it a 9.", None),
    ("rate", "I'd give it a solid 8.", (8,)),
    *[
        ("rank", reply, None)
        for reply in (
            "1. Version B: 9\n2. Version A: 7",
            "1. B: 9\n2. A: 4",
            "1. The second: 9\n2. The first: 4",
            "1. 2: 9\n2. 1: 4",
        )
    ],
    ("rank", "1. Version A: 9\n2. Version B: 7", (9, 7)),
    ("rank", "1: 7\n2: 8\nOverall: 7.5", (7, 8)),
    ("label", "1: -1 -> 1\n2: 1", None),
    ("label", "1: -1, corrected to 1\n2: 1", None),
    ("label", "1: [[1]]\n2: [[1]]\nOverall: [[-1]]", (1, 1)),
    ("label", "1: 1\n2: 0\nTotal: 1", (1, 0)),
    ("compare", "**Verdict: Not Equal** (though nearly Equal)", False),
    ("compare", "Not Equal (though nearly Equal)", False),
    ("compare", "Equal (though not Equal in depth)", None),
    ("compare", "Almost Equal", None),
    ("compare", "No es igual", False),
    ("compare", "Sie sind nicht gleich.", False),
    ("compare", "Equal or Not Equal? I choose Equal.", True),
    ("compare", "Equal or Not Equal? I can't choose Equal.", None),
    ("compare", "I'd say Not Equal", False),
    ("evolve", "Here are three versions:\n1. A b c?\n2. D e f?\n3. G h i?", None),
    ("evolve", "Voici trois versions :\n- A b\n- C d", None),
    (
        "evolve",
        "Order these two options:\n1. Red\n2. Blue\nSay why.",
        "Order these two options:\n1. Red\n2. Blue\nSay why.",
    ),
]


@pytest.mark.parametrize(("task", "reply", "reading"), BESIDE)
def test_what_stands_beside_a_verdict_is_not_taken_for_it(task, reply, reading):
    fields = {"instructions": "1. a\n2. b", "answer_steps": "a\nb"}
    assert replies.read_reply(task, reply, fields) == reading
