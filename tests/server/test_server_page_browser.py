"""The page in a browser: asking, conversations that are kept, branches, a server that stops."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from page_helpers import (
    Gate,
    answer_with,
    ask,
    kept_answer,
    kept_conversations,
    never_ending,
    tab,
    texts,
    until,
)


def titles(page: Any) -> list[str]:
    return texts(page, "#conversation-list .open")


def test_ask_stop_and_what_it_took(browser: Any, page_url: str) -> None:
    with tab(browser, page_url, color_scheme="dark") as page:
        assert page.locator("html").get_attribute("data-theme") == "dark"
        until(page, "document.getElementById('model').textContent.includes('tiny')")

        never_ending(page)
        # With the keyboard alone: settings, a message, its answer, which is stopped.
        page.keyboard.press("Alt+s")
        page.locator("#max_tokens").fill("300")
        page.locator("#temperature").focus()
        page.keyboard.press("Home")
        page.keyboard.press("Alt+s")
        page.locator("#messages").focus()
        page.keyboard.press("/")
        page.keyboard.type("<b>Hi</b>")
        page.keyboard.press("Enter")
        assert texts(page, ".message.user .text") == ["<b>Hi</b>"]
        page.keyboard.press("Alt+e")  # closed by the settings, for want of room
        until(page, "document.getElementById('running').textContent === '1'")
        until(page, "document.querySelector('.assistant .text').textContent.length > 9")
        page.locator("#prompt").focus()
        page.keyboard.press("Escape")
        facts = page.locator(".message.assistant .facts")
        facts.wait_for()
        said = facts.inner_text()
        # The counts and the speed are there although the answer did not come to its end.
        assert re.search(r"\d+ tokens read\n(\d+) written\n[\d.]+ a second\nfirst after", said)
        assert "stopped by you" in said
        written = int(re.search(r"(\d+) written", said)[1])  # type: ignore[index]
        assert abs(len(kept_answer(page)) - written) <= 1 < written
        assert written < 300

        facts.get_by_text("Where did the time go?").click()
        page.locator("#sentences").get_by_text("prompt tokens").first.wait_for()
        page.keyboard.press("Escape")
        page.locator("#explanation").wait_for(state="hidden")
        page.locator("#prompt").fill("x" * 600)
        page.locator("#prompt").press("Enter")
        page.locator(".error").get_by_text("horten the prompt").wait_for()


def test_a_conversation_survives_a_reload(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        sent: list[dict[str, Any]] = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
        page.keyboard.press("Alt+s")
        page.locator("#system").fill("Be brief.")
        page.locator("#seed").fill("7")
        page.locator("#model-choice").select_option("small")
        page.reload()  # before there is a message
        page.wait_for_selector("#send:not([disabled])")
        assert page.locator("#system").input_value() == "Be brief."
        page.locator("#max_tokens").fill("12")
        first = ask(page, "One").inner_text()
        second = ask(page, "Two").inner_text()
        assert first and second and titles(page) == ["One"]
        page.locator("#prompt").fill("half a thought")
        page.reload()
        page.wait_for_selector(".message.assistant > .facts")
        assert texts(page, ".message.user .text") == ["One", "Two"]
        assert texts(page, ".message.assistant .text") == [first, second]
        assert "a second" in texts(page, ".message.assistant .facts")[0]
        assert page.locator("#prompt").input_value() == "half a thought"
        assert page.locator("#system").input_value() == "Be brief."
        assert page.locator("#model-choice").input_value() == "small"

        # Settings are the conversation's own; a new chat has the defaults.
        page.keyboard.press("Alt+n")
        assert page.locator("#system").input_value() == ""
        assert page.locator("#prompt").input_value() == ""
        assert page.locator("#model-choice").input_value() == "tiny"
        page.go_back()
        page.wait_for_selector(".message.assistant")
        assert page.locator("#seed").input_value() == "7"
        page.wait_for_selector("#send:not([disabled])")
        ask(page, "Three")
        one, *_, last = sent
        assert one["model"] == "small" and one["seed"] == 7 and one["max_tokens"] == 12
        roles = [message["role"] for message in last["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        assert last["messages"][2]["content"].strip() == first.strip()


def test_conversations_are_found_renamed_deleted_and_carried_away(
    browser: Any, page_url: str, tmp_path: Path
) -> None:
    with tab(browser, page_url) as page:
        for question, answer in (("About lions", "They roar."), ("About <i>cats</i>", "**Meow.**")):
            page.keyboard.press("Alt+n")
            answer_with(page, answer)
            ask(page, question)
        assert titles(page) == ["About <i>cats</i>", "About lions"]
        page.keyboard.press("Alt+k")
        page.keyboard.type("roar")
        assert titles(page) == ["About lions"]
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator(".message.assistant").get_by_text("They roar.").wait_for()
        page.keyboard.press("Alt+k")
        page.keyboard.press("Escape")
        assert len(titles(page)) == 2

        page.locator("#conversation-list .current .open").focus()
        page.keyboard.press("F2")
        page.keyboard.type("Big cats")
        page.keyboard.press("Enter")
        assert titles(page)[1] == "Big cats"
        page.keyboard.press("Delete")
        assert titles(page) == ["About <i>cats</i>"]
        page.locator(".toast button").click()
        # It is shown when the browser's database has it again.
        page.locator(".message.assistant").get_by_text("They roar.").wait_for()
        assert sorted(titles(page)) == ["About <i>cats</i>", "Big cats"]

        def export(choice: str) -> str:
            page.locator("#export").click()
            with page.expect_download() as download:
                page.locator(choice).click()
            return Path(download.value.path()).read_text(encoding="utf-8")

        markdown = export("#export-markdown")
        assert markdown == "# Big cats\n\n## You\n\nAbout lions\n\n## tiny\n\nThey roar.\n"
        one = json.loads(export("#export-json"))
        assert len(one["conversations"]) == 1
        everything = export("#export-all")
        for title in ("About <i>cats</i>", "Big cats"):
            page.locator("#conversation-list .open", has_text=title).click()
            page.locator("#conversation-list .current .open").press("Delete")
        assert titles(page) == [] and page.locator("#welcome").is_visible()
        assert kept_conversations(page) == []  # read after the deletions, before the reload
        page.reload()
        page.wait_for_selector("#send:not([disabled])")
        assert titles(page) == []

        path = tmp_path / "all.json"
        path.write_text(everything, encoding="utf-8")
        page.locator("#import-file").set_input_files(path)
        page.locator(".toast", has_text="Imported 2").wait_for()
        assert sorted(titles(page)) == ["About <i>cats</i>", "Big cats"]
        page.locator("#conversation-list .open", has_text="cats</i>").click()
        assert page.locator(".message.assistant strong").inner_text() == "Meow."

        bad = {
            "{": "no JSON",
            '{"format": "other"}': '"other"',
            everything.replace('"version": 1', '"version": 2'): "version is 2",
            everything.replace('"user"', '"root"'): 'role is "root"',
            re.sub(r'"parent": "\w+"', '"parent": "gone"', everything): "not there",
        }
        for content, message in bad.items():
            path.write_text(content, encoding="utf-8")
            page.locator("#import-file").set_input_files(path)
            page.locator(".toast", has_text="Nothing imported").get_by_text(message).wait_for()
        assert len(titles(page)) == 2


def test_edit_branch_and_answer_again(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        for number, question in (("one", "Q1"), ("two", "Q2")):
            answer_with(page, f"Answer {number}.")
            ask(page, question)
        answer_with(page, "Answer three.")
        page.keyboard.press("ArrowUp")  # from the empty message box
        page.locator(".editing textarea").fill("Q2, otherwise")
        page.keyboard.press("Enter")
        page.get_by_text("Answer three.").wait_for()
        assert texts(page, ".message.user .text") == ["Q1", "Q2, otherwise"]
        answer_with(page, "Answer four.")
        page.locator(".message.assistant").last.get_by_role("button", name="Again").click()
        page.get_by_text("Answer four.").wait_for()
        shown = [line.strip() for line in texts(page, ".versions")]
        assert shown == ["2 / 2", "2 / 2"]

        def turn(place: int, name: str) -> list[str]:
            page.locator(".versions").nth(place).get_by_role("button", name=name).click()
            return texts(page, ".message .text")

        assert turn(1, "before")[-1] == "Answer three."
        assert turn(0, "before") == ["Q1", "Answer one.", "Q2", "Answer two."]
        assert page.evaluate("document.activeElement.className") == "turn"  # the focus stays there
        # Back to the newest answer below the edited question; it outlives a reload.
        assert turn(0, "after")[-1] == "Answer four."
        page.reload()
        page.wait_for_selector(".message.assistant > .facts")
        assert texts(page, ".message .text")[-1] == "Answer four."

        # The first question, edited, begins a branch of its own; an answer is edited in its place.
        answer_with(page, "Answer five.")
        page.locator(".message.user").first.hover()
        page.locator(".message.user").first.get_by_role("button", name="Edit").click()
        page.keyboard.press("Control+a")
        page.keyboard.type("Q0")
        page.keyboard.press("Enter")
        page.get_by_text("Answer five.").wait_for()
        assert texts(page, ".message .text") == ["Q0", "Answer five."]
        page.locator(".message.assistant").get_by_role("button", name="Edit").click()
        page.locator(".editing textarea").fill("Mine.")
        page.keyboard.press("Escape")
        assert texts(page, ".message .text") == ["Q0", "Answer five."]
        page.locator(".message.assistant").get_by_role("button", name="Edit").click()
        page.locator(".editing textarea").fill("Mine.")
        page.keyboard.press("Enter")
        assert texts(page, ".message .text") == ["Q0", "Mine."]


DISTANCE = "(each) => each.scrollHeight - each.scrollTop - each.clientHeight"


def test_no_yank_while_somebody_reads_further_up(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        answer_with(page, "P.\n\n" * 40)
        ask(page, "Long")
        never_ending(page)
        page.keyboard.press("Alt+s")
        page.locator("#max_tokens").fill("250")
        where = "Math.round(document.getElementById('messages').scrollTop)"
        end = f"({DISTANCE})(document.getElementById('messages')) <= 2"
        page.locator("#prompt").fill("More")
        page.keyboard.press("Enter")
        length = "document.querySelectorAll('.assistant .text')[1].textContent.length"
        until(page, f"{length} > 20")
        assert page.evaluate(end)  # it follows
        page.locator("#messages").hover()
        page.mouse.wheel(0, -400)
        page.wait_for_selector("#to-end:not([hidden])")
        place, before = page.evaluate(where), page.evaluate(length)
        until(page, f"{length} > {before} + 40")
        assert page.evaluate(where) == place
        page.locator("#to-end").click()
        until(page, end)
        page.wait_for_selector(".message.assistant:last-of-type > .facts")
        assert page.evaluate(end)


def test_the_server_stops_and_comes_back(browser: Any, page_url: str) -> None:
    gate = Gate(page_url)
    with tab(browser, gate.url) as page:
        never_ending(page)
        page.locator("#prompt").fill("Hello")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('.assistant .text').textContent.length > 9")
        gate.cut()
        page.locator(".message .error", has_text="The server has stopped").wait_for()
        page.locator("#banner", has_text="The server has stopped").wait_for()
        assert page.locator("#send").is_disabled()
        until(page, "document.getElementById('engine-state').textContent === 'stopped'")
        kept = page.locator(".message.assistant .text").inner_text()
        page.locator("#prompt").fill("Still here?")
        page.keyboard.press("Enter")
        assert page.locator("#prompt").input_value() == "Still here?"  # not sent, not lost
        gate.open()
        page.wait_for_selector("#send:not([disabled])")
        assert page.locator("#banner").is_hidden()
        assert page.locator(".message.assistant .text").inner_text() == kept
        page.locator(".message.assistant").get_by_role("button", name="Again").click()
        until(page, "document.querySelector('.assistant .text').textContent.length > 9")
        page.locator("#stop-button").click()
        page.locator(".versions").get_by_role("button", name="before").click()
        assert page.locator(".message.assistant .text").inner_text() == kept
    gate.cut()


def test_two_conversations_are_answered_at_a_time(browser: Any, page_url: str) -> None:
    with tab(browser, page_url) as page:
        never_ending(page)
        for question in ("First", "Second"):
            page.keyboard.press("Alt+n")
            page.locator("#prompt").fill(question)
            page.keyboard.press("Enter")
            until(page, "document.querySelector('.assistant .text').textContent")
        assert page.locator("#conversation-list .busy").count() == 2
        page.locator("#conversation-list .open", has_text="First").click()
        assert texts(page, ".message.user .text") == ["First"]
        page.keyboard.press("Escape")
        page.locator(".message.assistant .facts").wait_for()
        assert page.locator("#conversation-list .busy").count() == 1
        # The other is deleted while it is being written: it stays away.
        page.locator("#conversation-list .open", has_text="Second").focus()
        page.keyboard.press("Delete")
        page.wait_for_timeout(300)
        assert titles(page) == ["First"]
