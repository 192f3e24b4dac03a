"""What `octavo bench spec` asks: texts to quote, code to edit, and questions."""

from __future__ import annotations

from octavo.prompts import Conversation

_TEXTS = (
    "The lighthouse at Cape Verrin was built in 1874 by order of the harbour council, after the "
    "brig Sarah Anne had run aground on the reef with forty-one passengers. Its lamp burned colza "
    "oil until 1903, when a petroleum burner was put in. Electricity came to the cape in 1931, and "
    "the last keeper, Tomas Aldin, left the tower in 1968. Today it holds a museum of the coast.",
    "Rye bread keeps for a week because its crumb holds water well. The sour dough is fed three "
    "times on the day before: at eight in the morning, at two and at nine in the evening. The loaf "
    "is shaped with wet hands, rests for ninety minutes under a cloth, and goes into the oven at "
    "250 degrees. After a quarter of an hour the heat is lowered to 190 degrees for another hour.",
    "The committee met on 4 March in Lund. Present were Ms Okafor, Mr Lindqvist and Dr Amsel. The "
    "budget of 12,400 crowns was accepted with one vote against. Mr Lindqvist will ask two firms "
    "for an offer to mend the roof of the boat house before the end of April. The next meeting "
    "takes place on 8 April at seven in the evening, at the home of Dr Amsel.",
    "A heron stands still for a long time before it strikes. It sees the fish from above, where "
    "the water bends the light, and aims below the place where the fish seems to be. Young birds "
    "miss two times of three. By the end of their first summer they have learned the angle, and "
    "from then on they rarely go hungry, as long as the river is not frozen.",
)
_CODE = (
    "def total(items):\n    result = 0\n    for item in items:\n        if item.is_sold:\n"
    "            result += item.price * item.count\n    return result\n",
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n"
    "        for line in file:\n            cells = line.strip().split(',')\n"
    "            rows.append(cells)\n    return rows\n",
    "def find(tree, key):\n    while tree is not None:\n        if key == tree.key:\n"
    "            return tree.value\n        tree = tree.left if key < tree.key else tree.right\n"
    "    return None\n",
    "def median(numbers):\n    ordered = sorted(numbers)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n"
    "    return (ordered[middle - 1] + ordered[middle]) / 2\n",
)
_QUESTIONS = (
    "What is a good way to learn to swim as an adult?",
    "Why is the sky dark at night, although there are so many stars?",
    "Write a short story about a clock that runs backwards.",
    "How do I choose a bicycle for a long journey?",
    "What did people in Rome eat for breakfast two thousand years ago?",
    "Explain what a prime number is to a child of eight.",
    "Which plants grow well on a balcony without much sun?",
    "Write a letter to a friend whom you have not seen for ten years.",
)
_ASKED = {
    "quote": [f"Repeat this text word for word:\n\n{text}" for text in _TEXTS],
    "code": [
        f"Here is a Python function:\n\n```python\n{code}```\n\nWrite the same function with a "
        "docstring added."
        for code in _CODE
    ],
    "chat": list(_QUESTIONS),
}
TASKS = tuple(_ASKED)


def conversations(task: str, count: int) -> list[Conversation]:
    """So many conversations of a task, each of one question; from the first on if too few."""
    asked = _ASKED[task]
    return [[{"role": "user", "content": asked[i % len(asked)]}] for i in range(count)]
