"""Twenty prompts that between them hold what text is made of; used wherever real text is tested."""

from __future__ import annotations

_FRANCE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_PYTHON = '''def median(values: list[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
'''
_CPP = """#include <vector>
// Returns the index of the first element not less than x.
size_t lower_bound(const std::vector<int>& v, int x) {
  size_t lo = 0, hi = v.size();
  while (lo < hi) {
"""
_JSON = '{"name": "octavo", "pages": [1, 2, 4, 8], "bound": true, "price": {"EUR": 12.50, "USD":'
_TABLE = """| city   | country | people  |
|--------|---------|---------|
| Lyon   | France  | 522,250 |
| Porto  | Portugal| 231,800 |
| Kyoto  |"""


def _ships_log() -> str:
    """A text of about 1,500 tokens which never quite repeats itself."""
    weather = ("fog", "a light breeze", "heavy rain", "clear sky", "thunder far off", "drizzle")
    seen = ("two whales", "a red buoy", "nothing at all", "a fishing fleet", "gulls", "ice", "kelp")
    work = ("mended the mainsail", "checked the pumps", "wrote letters", "scrubbed the deck")
    cook = ("lentil soup", "salt cod", "the last of the bread", "rice with onions", "stew")
    days = []
    for day in range(1, 32):
        miles = 40 + day * 37 % 61
        days.append(
            f"Day {day}. {weather[day % 6].capitalize()} in the morning, wind from the "
            f"{('north', 'south-west', 'east')[day % 3]} at {5 + day * 7 % 23} knots. "
            f"We made {miles} miles and saw {seen[day * 3 % 7]}. The crew {work[day * 5 % 4]}; "
            f"for supper there was {cook[day * 2 % 5]}."
        )
    return "The log of the Octavo, out of Lisbon.\n\n" + "\n".join(days) + "\nDay 32."


PROMPTS: dict[str, str] = {
    "capital": _FRANCE,
    "one_word": "Hello",
    "story": "Once upon a time, in a village below a mountain, there lived a clockmaker who",
    "python": _PYTHON,
    "cpp": _CPP,
    "json": _JSON,
    "html": '<ul class="menu">\n  <li><a href="/">Home</a></li>\n  <li><a href="/about">About</a>',
    "table": _TABLE,
    "digits": "3.14159265358979323846264338327950288419716939937510582097494459230781640628",
    "arithmetic": "12 + 30 = 42\n7 * 8 = 56\n1024 / 4 = 256\n99 - 58 =",
    "chinese": "中国的首都是北京。日本的首都是东京。法国的首都是",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья",
    "arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "emoji": "🎉🎂 Happy birthday! 👩‍👩‍👧‍👦 The family brought 🍰, 🎈 and 🇫🇷",
    "math": "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε. This is the definition of",
    "whitespace": "a\tb\n\n\n    indented   by   spaces \r\n\tand a tab\n\n",
    "shouting": "WHY ARE WE SHOUTING??? !!! BECAUSE... IT'S (100%) #necessary @all & $5.00 -- OK",
    "mixed": "Él dijo: «¡qué frío!» — and she said “naïve café” — 한국어도 조금, ελληνικά λίγα.",
    "long": _ships_log(),
}
