"""The page for every reader: with the keyboard alone, on small screens, and its documentation."""

from __future__ import annotations

import json
import re
from typing import Any

from page_helpers import answer_with, ask, tab, texts


def test_the_map_shows_a_few_blocks_of_a_large_cache(browser: Any, page_url: str) -> None:
    script = """async (used) => {
      const { show } = await import("/static/kv_map.js");
      const kinds = new Uint8Array(25_000);
      kinds.set(used);
      show({ size: 16, map: btoa(String.fromCharCode(...kinds.subarray(0, 25_000))) });
      const canvas = document.getElementById("kv-map");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const colours = {};
      for (let i = 0; i < data.length; i += 4) {
        const name = data.slice(i, i + 3).join();
        if (data[i + 3] === 255) colours[name] = (colours[name] ?? 0) + 1;
      }
      const text = document.getElementById("kv-extent").textContent;
      return [colours, text, document.getElementById("kv-use").textContent];
    }"""
    with tab(browser, page_url) as page:
        colours, extent, use = page.evaluate(script, [3, 3, 4, 1, 2])
        # Blank, two owners, cached, shared: each block is a square that one can see.
        assert len(colours) == 5 and min(colours.values()) >= 100
        assert re.fullmatch(r"Blocks 0 to \d\d of 25,000, of 16 tokens each.*blank\.", extent)
        assert use == "4 held · 1 cached"
        colours, extent, use = page.evaluate(script, [3] * 25_000)
        assert len(colours) == 1 and extent == "25,000 blocks, of 16 tokens each."
        assert use == "25,000 held · 0 cached"


FOCUSABLE = "a[href], button:not([disabled]), input, textarea, select, [tabindex='0']"


def test_everything_is_reached_with_the_keyboard(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        answer_with(page, "Words.\n\n```python\nx = 1\n```")
        ask(page, "Q")
        page.keyboard.press("Alt+s")
        page.locator(".skip").focus()
        expected = page.evaluate(
            f"""[...document.querySelectorAll({json.dumps(FOCUSABLE)})]
            .filter((each) => each.tabIndex >= 0 && each.checkVisibility()).length"""
        )
        seen, unnamed, unseen = 1, [], []
        script = """() => {
          const each = document.activeElement;
          const style = getComputedStyle(each);
          const box = each.closest(".composer") ?? each;
          const visible = style.outlineStyle !== "none" && style.outlineWidth !== "0px";
          const ring = visible || (box !== each && getComputedStyle(box).borderColor !== "");
          const label = each.labels?.[0]?.textContent ?? "";
          const name = each.ariaLabel || each.textContent.trim() || label;
          const id = each.id || each.className || each.tagName;
          return [each === document.body, id, name, ring];
        }"""
        for _ in range(expected + 1):
            page.keyboard.press("Tab")
            at_end, identity, name, ring = page.evaluate(script)
            if at_end:
                break
            seen += 1
            unnamed += [] if name else [identity]
            unseen += [] if ring else [identity]
        assert (seen, unnamed, unseen) == (expected, [], [])

        page.locator("#messages").focus()
        page.keyboard.press("Shift+?")
        page.locator("#help").wait_for()
        keys = texts(page, "#key-list dt")
        assert {"Enter", "/", "?", "Alt N", "Alt K"} <= {key.replace("\n", " ") for key in keys}
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+ArrowUp")
        assert page.evaluate("document.activeElement.className") == "message assistant"
        page.keyboard.press("Alt+ArrowUp")
        page.keyboard.press("e")
        assert page.locator(".editing textarea").input_value() == "Q"
        page.keyboard.press("Escape")
        assert page.locator(".editing").count() == 0
        assert page.locator("#prompt").input_value() == ""


def test_it_fits_small_screens_in_both_lights(browser: Any, page_url: str) -> None:
    wide = "| a | b | c | d | e | f |\n|-|-|-|-|-|-|\n" + "| some words |" * 6 + "\n\n"
    answer = wide + "```\n" + "x" * 200 + "\n```\n\n" + "y" * 200
    fits = "document.documentElement.scrollWidth <= innerWidth"
    chat_fits = (
        "((chat) => chat.scrollWidth <= chat.clientWidth)(document.getElementById('messages'))"
    )
    with tab(browser, page_url, color_scheme="dark", reduced_motion="reduce") as page:
        page.set_viewport_size({"width": 400, "height": 800})
        page.reload()
        page.wait_for_selector("#send:not([disabled])")
        assert [
            page.locator(f"#{panel}").is_visible() for panel in ("conversations", "engine")
        ] == [
            False,
            False,
        ]
        answer_with(page, answer)
        ask(page, "z" * 200)
        assert page.evaluate(fits) and page.evaluate(chat_fits)
        for panel in ("conversations", "settings", "engine"):
            page.locator(f"#show-{panel}").click()
            assert page.locator(f"#{panel}").is_visible() and page.evaluate(fits)
        page.keyboard.press("Escape")
        assert page.locator("#engine").is_hidden()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.keyboard.press("Alt+t")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.reload()
        assert page.locator("html").get_attribute("data-theme") == "light"
        assert page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")
        assert page.evaluate("document.getAnimations().length") == 0
        page.goto(f"{page_url}/docs")
        page.wait_for_selector(".route")
        assert page.evaluate(fits)


def test_the_documentation_in_a_browser(browser: Any, page_url: str) -> None:
    options = {"permissions": ["clipboard-read", "clipboard-write"]}
    with tab(browser, f"{page_url}/docs", **options) as page:
        page.wait_for_selector(".route")
        assert page.locator("main .code").count() >= 7
        assert page.locator("main .hljs-string").count() > 10
        page.get_by_role("button", name="Copy the code").first.click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith(f"curl {page_url}/v1/chat/completions") and '"tiny"' in copied
        routes = " ".join(texts(page, ".route code:first-of-type"))
        assert "/v1/chat/completions" in routes and "/metrics" in routes
        page.locator("details.route").first.locator("summary").click()
        fields = texts(page, "details.route[open] tbody tr")
        assert fields[0].split("\t")[0] == "messages" and "needed" in fields[0]
        assert any(re.match(r"top_p\tnumber, 0 to 1", field) for field in fields)
