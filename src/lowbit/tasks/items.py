"""The packaged items: of our own making, so free of licences and of what models were trained on; made from a seed.

    arithmetic  12 + 7 =           sums, differences, products, one step more; the right number among three near ones
    facts       The capital of …   continuations that any model of natural text knows, the right one among three of the
                                   same kind
    format      an instruction about the form of an answer (upper case, JSON, a list …): the answer that obeys among
                three that do not
    code        the head of a Python function: the model writes the body, which is run against cases
    languages   capitals and opposites in eight languages other than English, one language after the other

Choices are scored by their likelihood, so a small model without chat shows something; code is written. 296 items, the
same for one seed on every machine: `random.Random`'s integers are specified.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

PER_CATEGORY = {"arithmetic": 72, "facts": 72, "format": 64, "code": 24, "languages": 64}
CATEGORIES = tuple(PER_CATEGORY)


@dataclass(frozen=True)
class Item:
    """One question.

    choices  continuations of the prompt, the first of which is right; empty where the model writes
    cases    of code: (expression, what it must equal), both Python; `prompt` plus what the model writes is run before
    test     of code: what is run behind what the model writes; it must not fail
    tokens   that the model writes at most
    """

    category: str
    prompt: str
    choices: tuple[str, ...] = ()
    cases: tuple[tuple[str, str], ...] = field(default=())
    test: str = ""
    tokens: int = 40  # every body of the packaged functions is one line


def packaged_items(seed: int = 0, categories: tuple[str, ...] = CATEGORIES) -> list[Item]:
    """Every item of the categories, in the order of `CATEGORIES`."""
    makers: dict[str, Callable[[random.Random, int], list[Item]]] = {
        "arithmetic": _arithmetic, "facts": _facts, "format": _format, "code": _code,
        "languages": _languages,
    }  # fmt: skip
    items = []
    for name in CATEGORIES:
        if name in categories:  # a generator of its own: a category alone has the same items
            items += makers[name](random.Random(f"{seed} {name}"), PER_CATEGORY[name])
    return items


def _arithmetic(numbers: random.Random, count: int) -> list[Item]:
    shots = "3 + 4 = 7\n9 - 5 = 4\n2 * 6 = 12\n"
    items: list[Item] = []
    seen = set()
    while len(items) < count:
        kind = len(items) % 4
        if kind == 0:
            a, b = numbers.randint(2, 99), numbers.randint(2, 99)
            asked, right = f"{a} + {b}", a + b
        elif kind == 1:
            a, b = sorted((numbers.randint(2, 99), numbers.randint(2, 99)), reverse=True)
            asked, right = f"{a} - {b}", a - b
        elif kind == 2:
            a, b = numbers.randint(2, 12), numbers.randint(2, 12)
            asked, right = f"{a} * {b}", a * b
        else:
            a, b, c = (numbers.randint(2, 30) for _ in range(3))
            asked, right = f"{a} + {b} + {c}", a + b + c
        if asked in seen:
            continue
        seen.add(asked)
        # Slips that one makes: by one, by ten, by two digits that changed places or by two.
        near = [right + 1, right - 1, right + 10, right - 10, right + 2, int(str(right)[::-1])]
        wrong = [value for value in dict.fromkeys(near) if value >= 0 and value != right]
        numbers.shuffle(wrong)
        items.append(Item("arithmetic", f"{shots}{asked} =", tuple(f" {value}" for value in (right, *wrong[:3]))))
    return items


_FACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "The capital of {} is": (
        ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
        ("China", "Beijing"), ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Austria", "Vienna"),
        ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Ireland", "Dublin"), ("Norway", "Oslo"), ("Cuba", "Havana"),
        ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Thailand", "Bangkok"), ("Hungary", "Budapest"),
        ("Sweden", "Stockholm"),
    ),
    "The opposite of {} is": (
        ("hot", "cold"), ("big", "small"), ("up", "down"), ("early", "late"), ("light", "dark"), ("fast", "slow"),
        ("open", "closed"), ("full", "empty"), ("young", "old"), ("wet", "dry"), ("good", "bad"), ("rich", "poor"),
        ("strong", "weak"), ("hard", "soft"), ("happy", "sad"), ("left", "right"),
    ),
    "The chemical symbol of {} is": (
        ("hydrogen", "H"), ("oxygen", "O"), ("carbon", "C"), ("nitrogen", "N"), ("iron", "Fe"), ("gold", "Au"),
        ("silver", "Ag"), ("sodium", "Na"), ("helium", "He"), ("copper", "Cu"), ("lead", "Pb"), ("calcium", "Ca"),
    ),
    "The day after {} is": (
        ("Monday", "Tuesday"), ("Tuesday", "Wednesday"), ("Wednesday", "Thursday"), ("Thursday", "Friday"),
        ("Friday", "Saturday"), ("Saturday", "Sunday"), ("Sunday", "Monday"),
    ),
    "The month after {} is": (
        ("January", "February"), ("March", "April"), ("April", "May"), ("June", "July"), ("August", "September"),
        ("September", "October"), ("October", "November"), ("November", "December"),
    ),
    "A baby {} is called a": (
        ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"), ("horse", "foal"), ("frog", "tadpole"),
        ("bear", "cub"), ("goat", "kid"), ("duck", "duckling"),
    ),
}  # fmt: skip


def _facts(numbers: random.Random, count: int) -> list[Item]:
    items = []
    for form, pairs in _FACTS.items():
        answers = [answer for _, answer in pairs]
        for subject, answer in pairs:
            wrong = numbers.sample([other for other in answers if other != answer], 3)
            items.append(Item("facts", form.format(subject), tuple(f" {each}" for each in (answer, *wrong))))
    assert len(items) == count, len(items)
    return items


_WORDS = ("river", "window", "garden", "silver", "pencil", "market", "winter", "bridge", "candle", "forest", "planet",
          "basket", "copper", "dragon", "engine", "flower", "guitar", "hammer", "island", "jacket", "kitten", "ladder",
          "marble", "needle", "orange", "pepper", "rabbit", "saddle", "ticket", "violin", "wallet",
          "yellow")  # fmt: skip


def _format(numbers: random.Random, count: int) -> list[Item]:
    """The wrong choices are the answers to the other instructions on the same words."""
    items = []
    for index in range(count):
        first, second, third = numbers.sample(_WORDS, 3)
        obeying = {
            f"Write the word {first} in capital letters.": first.upper(),
            f"Write the word {first} backwards.": first[::-1],
            f"Write the words {first}, {second}, {third} as a JSON list.": f'["{first}", "{second}", "{third}"]',
            f"Write the words {first}, {second}, {third} with a semicolon between them.": f"{first}; {second}; {third}",
            f"Write a JSON object whose key is {first} and whose value is {second}.": f'{{"{first}": "{second}"}}',
            f"Put the word {first} in quotation marks.": f'"{first}"',
            f"Write the words {first}, {second}, {third} as a numbered list.": f"1. {first}\n2. {second}\n3. {third}",
            f"Repeat the word {first} three times.": f"{first} {first} {first}",
        }
        asked = list(obeying)[index % len(obeying)]
        wrong = numbers.sample([answer for other, answer in obeying.items() if other != asked], 3)
        choices = tuple(f" {each}" for each in (obeying[asked], *wrong))
        items.append(Item("format", f"Instruction: {asked}\nAnswer:", choices))
    return items


# Name and parameters, what it returns in words, cases: arguments → result.
_FUNCTIONS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("add(a, b)", "Return the sum of a and b.", (("2, 3", "5"), ("-1, 1", "0"))),
    ("subtract(a, b)", "Return a minus b.", (("5, 3", "2"), ("0, 4", "-4"))),
    ("multiply(a, b)", "Return the product of a and b.", (("3, 4", "12"), ("-2, 5", "-10"))),
    ("square(x)", "Return x squared.", (("3", "9"), ("-4", "16"))),
    ("double(x)", "Return two times x.", (("3", "6"), ("0", "0"))),
    ("is_even(n)", "Return True if n is even, else False.", (("4", "True"), ("7", "False"))),
    ("is_odd(n)", "Return True if n is odd, else False.", (("4", "False"), ("7", "True"))),
    ("is_positive(x)", "Return True if x is greater than zero, else False.", (("3", "True"), ("-1", "False"))),
    ("maximum(a, b)", "Return the larger of a and b.", (("2, 9", "9"), ("5, -5", "5"))),
    ("minimum(a, b)", "Return the smaller of a and b.", (("2, 9", "2"), ("5, -5", "-5"))),
    ("absolute(x)", "Return the absolute value of x.", (("-3", "3"), ("4", "4"))),
    ("length(items)", "Return the number of items in the list.", (("[1, 2, 3]", "3"), ("[]", "0"))),
    ("total(numbers)", "Return the sum of a list of numbers.", (("[1, 2, 3]", "6"), ("[]", "0"))),
    ("first(items)", "Return the first item of the list.", (("[7, 8]", "7"), ("['a']", "'a'"))),
    ("last(items)", "Return the last item of the list.", (("[7, 8]", "8"), ("['a']", "'a'"))),
    ("reverse(text)", "Return the text reversed.", (("'abc'", "'cba'"), ("''", "''"))),
    ("upper(text)", "Return the text in upper case.", (("'abc'", "'ABC'"), ("'x'", "'X'"))),
    ("contains(items, x)", "Return True if x is in the list items, else False.",
     (("[1, 2], 2", "True"), ("[1, 2], 3", "False"))),
    ("average(numbers)", "Return the average of a list of numbers.", (("[2, 4]", "3"), ("[5]", "5"))),
    ("greet(name)", "Return the text 'Hello, ' followed by name.",
     (("'Ann'", "'Hello, Ann'"), ("'Bo'", "'Hello, Bo'"))),
    ("concatenate(a, b)", "Return the strings a and b joined together.", (("'ab', 'c'", "'abc'"), ("'', 'x'", "'x'"))),
    ("power(a, b)", "Return a to the power of b.", (("2, 3", "8"), ("5, 0", "1"))),
    ("remainder(a, b)", "Return the remainder of a divided by b.", (("7, 3", "1"), ("8, 4", "0"))),
    ("count_words(text)", "Return the number of words in the text.", (("'a b c'", "3"), ("'one'", "1"))),
)  # fmt: skip


def _code(numbers: random.Random, count: int) -> list[Item]:
    shot = 'def negate(x):\n    """Return minus x."""\n    return -x\n\n\n'
    items = []
    for head, words, cases in _FUNCTIONS:
        name = head.partition("(")[0]
        checks = tuple((f"{name}({arguments})", result) for arguments, result in cases)
        items.append(Item("code", f'{shot}def {head}:\n    """{words}"""\n', (), checks))
    numbers.shuffle(items)
    assert len(items) == count, len(items)
    return items


# Language: forms of a question with what is asked and answered; the wrong choices of each are the other answers.
_FOREIGN: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "de": {
        "Die Hauptstadt von {} ist ": (("Frankreich", "Paris"), ("Italien", "Rom"), ("Spanien", "Madrid"),
                                       ("Russland", "Moskau")),
        "Das Gegenteil von {} ist ": (("heiß", "kalt"), ("groß", "klein"), ("alt", "jung"), ("hell", "dunkel")),
    },
    "fr": {
        "La capitale de {} est ": (("la France", "Paris"), ("l'Italie", "Rome"), ("l'Espagne", "Madrid"),
                                   ("la Russie", "Moscou")),
        "Le contraire de « {} » est ": (("chaud", "froid"), ("grand", "petit"), ("vieux", "jeune"),
                                        ("riche", "pauvre")),
    },
    "es": {
        "La capital de {} es ": (("Francia", "París"), ("Italia", "Roma"), ("Alemania", "Berlín"), ("Rusia", "Moscú")),
        "Lo contrario de {} es ": (("caliente", "frío"), ("grande", "pequeño"), ("viejo", "joven"), ("rico", "pobre")),
    },
    "it": {
        "La capitale {} è ": (("della Francia", "Parigi"), ("dell'Italia", "Roma"), ("della Spagna", "Madrid"),
                              ("della Russia", "Mosca")),
        "Il contrario di {} è ": (("caldo", "freddo"), ("grande", "piccolo"), ("vecchio", "giovane"),
                                  ("ricco", "povero")),
    },
    "pt": {
        "A capital {} é ": (("da França", "Paris"), ("da Itália", "Roma"), ("de Portugal", "Lisboa"),
                            ("da Alemanha", "Berlim")),
        "O contrário de {} é ": (("quente", "frio"), ("grande", "pequeno"), ("velho", "jovem"), ("rico", "pobre")),
    },
    "ru": {
        "Столица {} — ": (("Франции", "Париж"), ("Италии", "Рим"), ("Германии", "Берлин"), ("России", "Москва")),
        "Антоним слова «{}» — ": (("горячий", "холодный"), ("большой", "маленький"), ("старый", "молодой"),
                                  ("богатый", "бедный")),
    },
    "zh": {
        "{}的首都是": (("法国", "巴黎"), ("日本", "东京"), ("英国", "伦敦"), ("中国", "北京")),
        "“{}”的反义词是“": (("热", "冷"), ("大", "小"), ("高", "低"), ("快", "慢")),
    },
    "ja": {
        "{}の首都は": (("フランス", "パリ"), ("イタリア", "ローマ"), ("イギリス", "ロンドン"), ("日本", "東京")),
        "「{}」の反対は「": (("大きい", "小さい"), ("高い", "低い"), ("新しい", "古い"), ("暑い", "寒い")),
    },
}  # fmt: skip


def _languages(numbers: random.Random, count: int) -> list[Item]:
    """An item of every language in turn; a space at the end of a form goes to the choices, as tokens have it."""
    by_language = []
    for forms in _FOREIGN.values():
        made = []
        for form, pairs in forms.items():
            space = " " if form.endswith(" ") else ""
            for subject, answer in pairs:
                wrong = [other for _, other in pairs if other != answer]
                numbers.shuffle(wrong)
                choices = tuple(space + each for each in (answer, *wrong))
                made.append(Item("languages", form.format(subject).rstrip(" "), choices))
        by_language.append(made)
    items = [made[place] for place in range(len(by_language[0])) for made in by_language]
    assert len(items) == count, len(items)
    return items
