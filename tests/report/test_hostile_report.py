"""Names from strangers in the report: shown as text; nothing runs, nothing is loaded, nothing is sent. In a real browser."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_run import RECORD, write_dense_run, write_sample_run
from selenium import webdriver
from test_report import Page
from test_report_in_browser import browser  # noqa: F401

from stillhouse.report import write_report
from tests.counts import tried

STOLEN: list[str] = []
ALIVE = "return document.scripts.length + document.querySelectorAll('iframe, object, embed, form, a').length"
ASKED = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"


class _Thief(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        STOLEN.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """In silence."""


@pytest.fixture(scope="module")
def thief() -> Iterator[str]:
    """A server that nobody should ask."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Thief)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def names(thief: str) -> list[str]:
    """What a class, a file or a method may be called."""
    return [
        "<script>document.title='ran'</script>",
        "</pre></style></title><script>document.title='ran'</script>",
        f"<img src={thief}/img onerror=\"document.title='ran'\">",
        f"<svg onload=\"document.title='ran'\"><image href={thief}/svg /></svg>",
        f'"><iframe src={thief}/iframe></iframe>',
        f"' onmouseover='location=\"{thief}/mouse\"' autofocus onfocus='document.title=\"ran\"'",
        f"<link rel=stylesheet href={thief}/css><style>@import '{thief}/import';body{{background:url({thief}/background)}}</style>",
        f'<meta http-equiv=refresh content="0;url={thief}/refresh">',
        f"<base href={thief}/><object data={thief}/object></object><embed src={thief}/embed>",
        f'<form action={thief}/form><input type=submit></form><a href="javascript:document.title=\'ran\'">click</a>',
        "{{ 7 * 7 }}{% for x in () %}{{ config }}{{ ''.__class__.__mro__ }}",
        "<!--", "]]>", "&lt;script&gt;", "\u202etext\u2066", "javascript:document.title='ran'", "=cmd|' /C calc'!A0",
        "| a | [x](javascript:1)",
    ]  # fmt: skip


def pages(folder: Path, names: list[str]) -> list[Path]:
    """The reports of runs in which everything that has a name is called so."""
    alike = "".join(names)
    changes = {
        **{"title": alike, "method": alike, "status": "running", "alarms": names, "command": names, "versions": {alike: alike}},
        **{"hashes": {alike: alike}, "started": alike, "per_class": dict.fromkeys(names, 0.5)},
        "models": {role: {"name": alike, "params": 5} for role in ("teacher", "student", alike)},
        "result": [row | {"row": f"{row['row']} {alike}"} for row in RECORD["result"]],
        "data": {"name": alike, "classes": names, "train": 3, "val": 3, "skipped": names},
    }
    runs = [write_sample_run(folder / "classify", **changes)]
    runs += [write_dense_run(folder / task, task, data=changes["data"], per_class=changes["per_class"]) for task in ("detect", "segment")]
    for run in runs:
        (run / "settings.yaml").write_text(f"keep: {alike}\n", "utf-8")
        for table in ("train", "val", "watch"):
            path = run / f"{table}.csv"
            if path.is_file():
                first, *rest = path.read_text("utf-8").splitlines()
                cells = ",".join('"' + name.replace('"', '""') + '"' for name in names)
                path.write_text("\n".join([f"{first},{cells}", *(row + ",1" * len(names) for row in rest)]), "utf-8")
    return [write_report(run) for run in runs]


def test_it_is_text_in_the_source(tmp_path: Path) -> None:
    for plain, page in zip(
        (write_report(write_sample_run(tmp_path / "plain")), None, None), pages(tmp_path, names("http://thief")), strict=True
    ):
        found = Page(page)
        kinds = {tag for tag, _ in found.tags}
        assert not kinds & {"script", "iframe", "object", "embed", "form", "base", "a", "input"}
        assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
        assert [each.get("rel") for each in found.all("link")] == ["icon"]
        assert all(str(each.get("src")).startswith("data:image/") for each in found.all("img"))
        if plain is not None:
            assert kinds <= {tag for tag, _ in Page(plain).tags} | {"p", "b"}
            assert "<script>document.title='ran'</script>" in found.text
            assert "{{ 7 * 7 }}" in found.text
    tried("names with HTML, scripts or templates", len(names("")))


def test_no_script_runs_and_nothing_is_asked_of_a_server(browser: webdriver.Chrome, tmp_path: Path, thief: str) -> None:  # noqa: F811
    for page in pages(tmp_path, names(thief)):
        STOLEN.clear()
        browser.get(page.as_uri())
        assert browser.title.endswith("Stillhouse")
        assert browser.execute_script(ALIVE) == 0
        asked = browser.execute_script(ASKED)
        assert asked == []
        assert STOLEN == []
        assert browser.current_url == page.as_uri()
        assert browser.get_log("browser") == []
        shown = browser.find_element("tag name", "body").text
        assert "<script>document.title='ran'</script>" in shown
    tried("hostile reports opened in a browser", 3)


def test_a_table_in_the_terminal_shows_names_as_they_are(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from stillhouse.report.compare import compare, print_table

    said = io.StringIO()
    for name in ("[/b]", "[red]x", "\x1b]0;owned\x07\x1b[2J", "a\r\nb", "[link=http://x]y[/link]", "\u202ex"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/run.json").write_text(json.dumps({"method": name, "status": name, "models": {"student": {"name": name}}}))
        print_table(compare([tmp_path / "run"]), Console(file=said, width=200))
    assert "\x1b" not in said.getvalue()
    assert "\u202e" not in said.getvalue()
    assert "[/b]" in said.getvalue()
    tried("names with HTML, scripts or templates", 6)
