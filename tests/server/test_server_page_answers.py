"""What the page makes of answers, in a browser: Markdown, code, and nothing that runs."""

from __future__ import annotations

from typing import Any

import pytest
from page_helpers import answer_with, ask, kept_answer, tab

MARKDOWN = """\
<think>First a **plan**.</think>

# Title

Some **bold**, *italic*, ~~struck~~ and `code`, and https://example.org/x but not app.py.

| name | share | note |
|:-----|------:|:----:|
| alpha | 12 % | one<br>two |
| beta | 7 % | `x` |

3. third
   - nested
     - deeper
4. fourth

- [x] done
- [ ] to do

> quoted
> twice

```python
def add(a, b):  # a comment
    return a + b
```

![cat](https://example.com/cat.png)
"""


def test_markdown_is_shown_as_it_is_meant(browser: Any, page_url: str) -> None:
    with tab(browser, page_url, permissions=["clipboard-read", "clipboard-write"]) as page:
        answer_with(page, MARKDOWN)
        text = ask(page, "Everything, please")

        def count(selector: str) -> int:
            return int(text.locator(selector).count())

        assert text.locator("h1").inner_text() == "Title"
        assert (count("p strong"), count("em"), count("s"), count("p > code")) == (2, 1, 1, 1)
        links = [link.get_attribute("href") for link in text.locator("a").all()]
        assert links == ["https://example.org/x", "https://example.com/cat.png"]
        assert {link.get_attribute("rel") for link in text.locator("a").all()} == {
            "noopener noreferrer"
        }
        assert text.locator("a").last.inner_text() == "picture: cat" and count("img") == 0

        assert count("table") == 1 and count("tbody tr") == 2 and count("td br") == 1
        align = "getComputedStyle(document.querySelector('td:nth-child({})')).textAlign"
        assert [page.evaluate(align.format(i)) for i in (1, 2, 3)] == ["start", "right", "center"]

        assert text.locator("ol").get_attribute("start") == "3"
        assert count("ol > li > ul > li > ul > li") == 1
        boxes = text.locator("li.task input")
        assert [box.is_checked() for box in boxes.all()] == [True, False]
        assert [item.inner_text().strip() for item in text.locator("li.task").all()] == [
            "done",
            "to do",
        ]
        assert text.locator("blockquote").inner_text() == "quoted\ntwice"

        assert count(".code .hljs-keyword") == 2 and count(".code .hljs-comment") == 1
        assert text.locator(".code-head span").inner_text() == "python"
        text.get_by_role("button", name="Copy the code").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == "def add(a, b):  # a comment\n    return a + b"

        assert not text.locator(".thoughts strong").is_visible()
        text.locator(".thoughts summary").click()
        assert text.locator(".thoughts strong").inner_text() == "plan"


def test_a_growing_text_ends_as_if_it_had_been_drawn_at_once(browser: Any, page_url: str) -> None:
    script = """async (text) => {
      const { draw } = await import("/static/render.js");
      const grown = document.createElement("div");
      let kept = true;
      let heading = null;
      for (let end = 1; end <= text.length; end += 1) {
        draw(grown, text.slice(0, end));
        const now = grown.querySelector("h1");
        if (heading && end > text.indexOf("Some") + 1 && now !== heading) kept = false;
        heading = now;
      }
      const whole = document.createElement("div");
      draw(whole, text);
      return [grown.innerHTML === whole.innerHTML, whole.children.length, kept];
    }"""
    with tab(browser, page_url) as page:
        same, blocks, kept = page.evaluate(script, MARKDOWN)
        assert same and blocks > 6
        assert kept  # blocks that are done are not made anew: a selection in them survives


HOSTILE = """\
<script>window.hurt = 1</script>
<img src=x onerror="window.hurt = 2">
<svg onload="window.hurt = 3"><script>window.hurt = 4</script></svg>
<iframe src="javascript:parent.hurt = 5"></iframe>
<div><p><a href="javascript:window.hurt = 6" onclick="window.hurt = 7">nested</a></p></div>
<style>body { display: none }</style>
<form action="https://evil.example/"><input name=q autofocus onfocus="window.hurt = 8"></form>
<math><mtext><table><mglyph><style><img src=x onerror="window.hurt = 9">

[one](javascript:window.hurt=10) [two](JaVaScRiPt:window.hurt=11)
[three](&#106;avascript:window.hurt=12) [four](data:text/html,<script>window.hurt=13</script>)
[five](vbscript:x) [six](/engine/events) [seven](//evil.example/) [eight](java%0ascript:alert(1))
[nine](https://example.org/" onmouseover="window.hurt=14) <javascript:window.hurt=15>
![a](javascript:window.hurt=16) ![b](data:image/svg+xml,<svg/onload=window.hurt=17>)
![" onerror="window.hurt=18](https://evil.example/x.png" onerror="window.hurt=19)
[ref][1] `<script>window.hurt = 20</script>`

[1]: javascript:window.hurt=21

```html" onload="window.hurt=22
<script>window.hurt = 23</script><img src=x onerror=window.hurt=24>
```

```<img/src=x/onerror=window.hurt=25>
code
```

| <script>window.hurt = 26</script> | <img src=x onerror=window.hurt=27> |
|:--|--:|
| [x](javascript:window.hurt=28) | <b onmouseover=window.hurt=29>b</b> |

- [x] <img src=x onerror=window.hurt=30>
"""
# What an answer may be made of, and nothing else.
INSPECT = """() => {
  const found = [];
  const ours = ["BUTTON", "DETAILS", "DIV", "INPUT", "SPAN", "SUMMARY"];
  const text = "A BLOCKQUOTE BR CODE EM H1 H2 H3 H4 H5 H6 HR LI OL P PRE S STRONG UL";
  const tables = "TABLE TBODY TD TH THEAD TR";
  const tags = [...text.split(" "), ...tables.split(" "), ...ours];
  for (const each of document.querySelectorAll(".message *")) {
    if (!tags.includes(each.tagName)) found.push(each.tagName);
    for (const { name, value } of each.attributes) {
      if (name.startsWith("on") || ["id", "src", "style"].includes(name)) found.push(name);
      if (name === "href" && !/^(https:|mailto:)/.test(value)) found.push(value);
    }
  }
  return found;
}"""


def test_what_it_thinks_is_folded_away_and_sent_back_apart(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        answer_with(page, "It is four.", reasoning="Two and **two** again.")
        text = ask(page, "2 + 2?")
        assert text.locator("details.thoughts strong").text_content() == "two"
        assert text.locator(":scope > p").inner_text() == "It is four."
        assert kept_answer(page) == "<think>Two and **two** again.</think>\n\nIt is four."
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "Sure?")
        assert sent.value.post_data_json["messages"][1:2] == [
            {"role": "assistant", "content": "It is four.", "reasoning": "Two and **two** again."}
        ]


@pytest.mark.parametrize("wrap", ["{}", "<think>\n{}</think>\nafter"])
def test_nothing_in_an_answer_runs(browser: Any, page_url: str, wrap: str) -> None:
    with tab(browser, page_url) as page:
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        answer_with(page, wrap.format(HOSTILE))
        text = ask(page, HOSTILE)
        assert page.evaluate(INSPECT) == []
        if text.locator("summary").count():
            text.locator("summary").click()
        assert "<script>window.hurt = 1</script>" in text.inner_text()  # shown, as text
        for link in text.locator("a").all():
            link.hover()
        # Also after a reload, from the browser's storage.
        page.reload()
        page.wait_for_selector(".message.assistant > .facts")
        assert page.evaluate(INSPECT) == []
        assert page.evaluate("window.hurt") is None and not dialogs
        assert page.locator("iframe, object, embed, .message form").count() == 0


def test_each_wall_stands_by_itself(browser: Any, page_url: str) -> None:
    """The sanitizer without markdown-it before it, and the policy without either."""
    context = browser.new_context()
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(page_url)
    clean = """async (hostile) => {
      const { sanitized } = await import("/static/render.js");
      const div = document.createElement("div");
      div.className = "message";
      div.append(sanitized(hostile));
      document.body.append(div);
      await new Promise((resolve) => setTimeout(resolve, 100));
      return div.textContent;
    }"""
    assert "nested" in page.evaluate(clean, HOSTILE)
    assert page.evaluate(INSPECT) == []
    assert page.evaluate("window.hurt") is None
    attacks = [
        "const s = document.createElement('script'); s.append('window.hurt = 1'); "
        "document.body.append(s)",
        "document.body.innerHTML = '<img src=x onerror=\"window.hurt = 2\">'",
        "document.body.append(Object.assign(document.createElement('a'), {id: 'x', href: "
        "'javascript:window.hurt = 3'})); document.getElementById('x').click()",
        "document.body.setAttribute('onclick', 'window.hurt = 4'); document.body.click()",
        "setTimeout('window.hurt = 5')",
    ]
    for attack in attacks:
        before = len(refused)
        script = f"try {{ {attack} }} catch (error) {{ console.log(String(error)) }}"
        page.evaluate(f"() => {{ {script} }}")
        page.wait_for_timeout(50)
        assert page.evaluate("window.hurt") is None, attack
        assert len(refused) > before, attack  # the browser says that it refused
    context.close()
