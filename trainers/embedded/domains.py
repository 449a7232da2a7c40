"""Text the embedded models learn from, and the held-out tasks that no model has seen.

    python -m trainers.embedded.domains                                   two examples of every domain
    python -m trainers.embedded.domains tasks=trainers/embedded/tasks     writes the committed task splits again
    python -m trainers.embedded.domains held_out=trainers/embedded/held_out.jsonl    and text to measure forgetting on

A domain is a function `(rng) -> str` that returns one short example, `name input > answer`. Everything is drawn from
the `random.Random` it is given, so a seed fixes every character. `MIXTURE` is what the models are pretrained on;
`HELD_OUT` is never part of it. Two domains of the mixture are real text that any machine has offline: the source and
the docstrings of Python's own standard library. Their text differs between Python releases (3.11.7 and 3.11.9 too),
so a pretraining run records the Python version and `library_digest()`; generated domains do not depend on either.
"""

from __future__ import annotations

import ast
import hashlib
import json
import string
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

from allocators.core import words
from allocators.core.errors import StudyError

Domain = Callable[[Random], str]

LETTERS = string.ascii_lowercase
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
BRACKETS = {"(": ")", "[": "]", "{": "}"}

# Every character a model can read: printable ASCII, newline and tab. Real text with anything else is left out.
ALPHABET = "\n\t" + "".join(chr(code) for code in range(32, 127))


def letters(rng: Random, low: int, high: int, alphabet: str = LETTERS) -> str:
    """Between low and high letters, each drawn independently and uniformly."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


# ---------------------------------------------------------------------------------------------- the pretraining mixture


def add(rng: Random) -> str:
    """Sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    return f"add {a} {b} > {a + b}"


def subtract(rng: Random) -> str:
    """Difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return f"sub {a} {b} > {a - b}"


def maximum(rng: Random) -> str:
    """The largest of two to four numbers below 100."""
    numbers = [rng.randrange(100) for _ in range(rng.randint(2, 4))]
    return f"max {' '.join(map(str, numbers))} > {max(numbers)}"


def sequence(rng: Random) -> str:
    """Three terms of an arithmetic progression, the next two are the answer."""
    start, step = rng.randrange(40), rng.randint(1, 9)
    a, b, c, d, e = (start + step * i for i in range(5))
    return f"seq {a} {b} {c} > {d} {e}"


def count(rng: Random) -> str:
    """How often a letter occurs; words of few different letters, so that the answer varies."""
    word = letters(rng, 3, 9, "".join(rng.sample(LETTERS, 3)))
    letter = rng.choice(word)
    return f"count {letter} {word} > {word.count(letter)}"


def brackets(rng: Random) -> str:
    """The closing brackets that a row of opening ones needs, innermost first."""
    opening = letters(rng, 3, 8, "".join(BRACKETS))
    return f"close {opening} > {''.join(BRACKETS[b] for b in reversed(opening))}"


def replace(rng: Random) -> str:
    """String editing: every occurrence of one letter becomes another."""
    word = letters(rng, 4, 8, "".join(rng.sample(LETTERS, 4)))
    old, new = rng.choice(word), rng.choice(LETTERS)
    return f"edit {old} {new} {word} > {word.replace(old, new)}"


def upper(rng: Random) -> str:
    """A word of 3 to 8 letters in capitals."""
    word = letters(rng, 3, 8)
    return f"upper {word} > {word.upper()}"


def reverse(rng: Random) -> str:
    """A word of 3 to 7 letters, read backwards."""
    word = letters(rng, 3, 7)
    return f"rev {word} > {word[::-1]}"


def sort(rng: Random) -> str:
    """The letters of a word, 3 to 7, in the order of the alphabet."""
    word = letters(rng, 3, 7)
    return f"sort {word} > {''.join(sorted(word))}"


def date(rng: Random) -> str:
    """An ISO date and the same date in words."""
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    return f"date {year}-{month:02}-{day:02} > {day} {MONTHS[month - 1]} {year}"


def code(rng: Random) -> str:
    """128 characters of a standard library source file, from the start of a line."""
    return _excerpt(rng, _library()[0])


def prose(rng: Random) -> str:
    """128 characters of standard library docstrings, from the start of a line."""
    return _excerpt(rng, _library()[1])


MIXTURE: dict[str, Domain] = {
    domain.__name__: domain
    for domain in (
        add,
        subtract,
        maximum,
        sequence,
        count,
        brackets,
        replace,
        upper,
        reverse,
        sort,
        date,
        code,
        prose,
    )
}
REAL_TEXT = ("code", "prose")


def _excerpt(rng: Random, text: str, length: int = 128) -> str:
    start = text.index("\n", rng.randrange(len(text) - 2 * length)) + 1
    return text[start : start + length]


@cache
def _library() -> tuple[str, str]:
    """(sources, docstrings) of the top-level modules of the standard library, files in name order."""
    allowed = frozenset(ALPHABET)
    sources, docstrings = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        sources.append("".join(c for c in source if c in allowed))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                docstrings.append("".join(c for c in text if c in allowed))
    return "\n".join(sources), "\n".join(docstrings)


def library_digest() -> str:
    """First 16 hex digits of the SHA-256 of the real text, for the record of a pretraining run."""
    return hashlib.sha256("\f".join(_library()).encode()).hexdigest()[:16]


def document(rng: Random, domain: str, length: int, *, end: str) -> str:
    """`length` characters of one domain, `end` counted as one; examples follow each other after a newline or `end`.

    A row opens with the first character of an example: that is how a task's prompt reaches the model.
    """
    row: list[str] = []
    while len(row) < length:
        row.extend(MIXTURE[domain](rng))
        row.append(end if rng.random() < 0.25 else "\n")
    return "".join(row[:length])


def rows(seed: int, step: int, number: int, length: int, *, end: str) -> list[tuple[str, str]]:
    """(domain, text) of one training step: the domains take turns, so every step holds them in equal parts."""
    rng = Random(f"{seed}/{step}")
    names = list(MIXTURE)
    offset = rng.randrange(len(names))
    picked = [names[(offset + i) % len(names)] for i in range(number)]
    return [(name, document(rng, name, length, end=end)) for name in picked]


# --------------------------------------------------------------------------------------------------- the held-out tasks

# Maps no letter to itself. Typed in, so that it depends on no random generator.
CIPHER = dict(zip(LETTERS, "ypatcedjlbfzkosunghxiqmvrw", strict=True))
SHIFT = dict(zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True))
# A second image of the first 18 letters: the images that CIPHER gives these 18, dealt anew and none to the same letter,
# so that all 26 images are about as frequent and knowing which are frequent hardly helps.
SECOND = dict(zip(LETTERS[:18], "jnlzgpfyksoeudbatc", strict=True))

# 91 of the 156 pairs of two different letters from a to m, and what each stands for: a letter from n to z. Every image
# has seven pairs; every letter is the first of seven pairs and the second of seven, with seven different images.
PAIRS = {
    pair: image
    for image, pairs in {
        "n": "cm da eb gd ih jc me",
        "o": "ai ce ea gc hj ib lg",
        "p": "ak bd eg ha jf kh ml",
        "q": "ac fk he ji km ld mf",
        "r": "bh ci ed fa hc kg mj",
        "s": "aj gi hg if jl kc mh",
        "t": "bk df fh gm ie jg li",
        "u": "ck dl ej fc gb kf le",
        "v": "af ba dj gl jb kd lk",
        "w": "bj ch dm fl hd ik mb",
        "x": "am bg cb ia kj lh mi",
        "y": "ag cl di ek fe gf hm",
        "z": "bl dc em fb id je la",
    }.items()
    for pair in pairs.split()
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with four choices; `label` is the position of the right one."""

    question: str
    choices: tuple[str, ...]
    label: int


def _translation(rng: Random, name: str, answer_of: Callable[[str], str]) -> Question:
    """A word of 4 to 6 different letters; the choices differ in one character, at one position.

    Chance is 1/4 for anyone who does not know the right character there: it and the three wrong ones are drawn alike,
    and none of the four occurs in the word or elsewhere in the answer, which repeats no character, so copying a
    character of the prompt, or avoiding repetition, helps nobody. Were the wrong choices wrong at different places, a
    scorer without knowledge would be right 1 time in 8, because the right answer would have to win three separate
    comparisons.
    """
    while True:
        word = "".join(rng.sample(LETTERS, rng.randint(4, 6)))
        answer = answer_of(word)
        if not set(word) & set(answer) and len(set(answer)) == len(answer):
            break
    return _question(rng, f"{name} {word} >", answer, [c for c in LETTERS if c not in word + answer])


def _question(rng: Random, asked: str, answer: str, others: Sequence[str]) -> Question:
    """At one place of the answer, drawn at random, the three wrong choices have three of the other characters."""
    place = rng.randrange(len(answer))
    wrong = rng.sample(others, 3)
    choices = [answer[:place] + c + answer[place + 1 :] for c in (answer[place], *wrong)]
    rng.shuffle(choices)
    return Question(asked, tuple(choices), choices.index(answer))


def cipher(rng: Random) -> Question:
    """Every letter becomes another one, by a fixed table (26 facts to learn)."""
    return _translation(rng, "code", lambda word: "".join(CIPHER[c] for c in word))


def backcipher(rng: Random) -> Question:
    """The same table, and the word backwards."""
    return _translation(rng, "back", lambda word: "".join(CIPHER[c] for c in reversed(word)))


def backshift(rng: Random) -> Question:
    """The next letter of the alphabet for every letter, and the word backwards."""
    return _translation(rng, "next", lambda word: "".join(SHIFT[c] for c in reversed(word)))


def turncipher(rng: Random) -> Question:
    """The table of `cipher` and the word backwards, where 18 letters have a second image for every other neighbour.

    44 facts to learn, of which 36 hold only beside the right neighbour: no linear map of the letter alone has them. The
    26 of `CIPHER` answer most questions, so that the others are learnt after them and accuracy is graded.
    """
    return _translation(rng, "turn", _turned)


def _turned(word: str) -> str:
    """The image of each letter, last letter first: that of `SECOND` where b, d, f, … z follows the letter in the word.

    A letter that has no second image, and the last one, which nothing follows, take the image of `CIPHER`.
    """
    following = [*word[1:], "a"]  # an even place of the alphabet, as if nothing followed
    tables = [CIPHER | SECOND if LETTERS.index(c) % 2 else CIPHER for c in following]
    return "".join(table[c] for c, table in zip(word, tables, strict=True))[::-1]


def pairs(rng: Random) -> Question:
    """Three pairs of letters, each of which stands for one letter (91 facts to learn).

    A letter of a pair leaves seven of thirteen images open, so no linear map of letters has the facts: they need what
    experts and feed-forward layers compute, and attention alone learns them late. Letters from n to z stand in no
    pair, and the wrong choices are drawn from them as the right one is, so copying helps nobody.
    """
    while True:
        asked = rng.sample(list(PAIRS), 3)
        answer = "".join(PAIRS[pair] for pair in asked)
        if len(set(answer)) == len(answer):
            break
    return _question(rng, f"pair {' '.join(asked)} >", answer, [c for c in LETTERS[13:] if c not in answer])


HELD_OUT: dict[str, Callable[[Random], Question]] = {
    task.__name__: task for task in (cipher, backcipher, backshift, turncipher, pairs)
}
SMALL = {"train": 1600, "test": 300}
LARGE = {"train": 2400, "validation": 400, "test": 1000}
SPLITS = dict.fromkeys(HELD_OUT, SMALL) | dict.fromkeys(("turncipher", "pairs"), LARGE)


def questions(name: str, *, seed: int = 0) -> dict[str, list[Question]]:
    """The splits of a held-out task. No question occurs twice, within a split or across them."""
    rng, splits = Random(f"{name}/{seed}"), SPLITS[name]
    unique: dict[str, Question] = {}
    while len(unique) < sum(splits.values()):
        question = HELD_OUT[name](rng)
        unique.setdefault(question.question, question)
    drawn = iter(unique.values())
    return {split: list(islice(drawn, number)) for split, number in splits.items()}


def write_tasks(folder: Path) -> None:
    """Writes `tiny_NAME_SPLIT.jsonl` for every held-out task."""
    for name in HELD_OUT:
        for split, drawn in questions(name).items():
            lines = [json.dumps(asdict(question)) + "\n" for question in drawn]
            (folder / f"tiny_{name}_{split}.jsonl").write_text("".join(lines))


@dataclass(frozen=True)
class Request:
    """The key of the command line."""

    tasks: str = words.key("", "write the held-out tasks into this folder (empty: print two examples of every domain)")
    held_out: str = words.key("", "write 52 rows of the mixture, at a step that no pretraining has, into this file")


def main(arguments: list[str]) -> None:
    """Writes the data of the tasks into their folder; without one, prints examples."""
    if words.asks_for_help(arguments):
        print(
            "\n".join(
                ["usage: python -m trainers.embedded.domains [tasks=FOLDER] [held_out=FILE]", *words.help_of(Request)]
            )
        )
        return
    request = words.parse(arguments, Request, example="tasks=FOLDER")
    folder = request.tasks
    if request.held_out:
        drawn = rows(0, -1, 4 * len(MIXTURE), 96, end="<eos>")
        lines = [json.dumps({"domain": name, "text": text}) + "\n" for name, text in drawn]
        Path(request.held_out).write_text("".join(lines))
    elif not folder:
        _print_examples()
    elif Path(folder).is_dir():
        write_tasks(Path(folder))
    else:
        raise StudyError(f"tasks={folder} is no folder: give nothing, or tasks=FOLDER of a folder that exists")


def _print_examples() -> None:
    for name, domain in MIXTURE.items():
        rng = Random(name)
        print(f"{name:10} {domain(rng)!r}\n{'':10} {domain(rng)!r}")
    for name, task in HELD_OUT.items():
        question = task(Random(name))
        print(f"{name:10} {question.question!r} {question.choices} -> {question.choices[question.label]!r}")


if __name__ == "__main__":
    words.run(main)
