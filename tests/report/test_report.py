from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from sample_run import RECORD, SETTINGS, write_rows, write_sample_run

from stillhouse.errors import UserError
from stillhouse.report import write_report

S = "\N{NARROW NO-BREAK SPACE}"


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, the text, and the numbers of the result's table."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def headings(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("h2")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_sample_run(tmp_path / "run")


def test_sentence_sums_up_the_run(run: Path) -> None:
    page = Page(write_report(run))
    said = f"Student 92.1{S}% top-1, +3.0 points over labels only, teacher 96.4{S}%; the teacher computed on 8 of 16 patches: 52{S}% of its"
    said += " multiply-adds."
    assert said in page.text
    assert {"name": "description", "content": f"MaskedKD: {said}"} in page.all("meta")


def test_numbers_of_the_table_are_those_of_the_record(run: Path) -> None:
    found = [float(str(attributes["value"])) for attributes in Page(write_report(run)).all("data")]
    order = ("top1", "nll", "ece", "agreement", "params", "macs", "step_ms")
    assert found == [row[key] for row in RECORD["result"] for key in order if row.get(key) is not None]


def test_savings_are_written_with_their_change(run: Path) -> None:
    cells = re.findall(r"<td>(?:<b>)?([^<\n]+)", Page(write_report(run)).source.split("What masking saved")[1])
    assert cells == [f"1.49{S}M", f"775{S}k", f"\N{MINUS SIGN}48{S}%", f"15.9{S}ms", f"12.4{S}ms", f"\N{MINUS SIGN}22{S}%"]


def test_what_made_the_teacher_cheap_is_told_with_its_error(run: Path) -> None:
    assert "from full precision" not in Page(write_report(run)).text
    assert "The teacher did not run" not in Page(write_report(run)).text
    low = {"precision": "int8", "by": "openvino", "kl": 1.28e-5, "agreement": 0.984, "images": 128}
    errors = {"probability moved": {"max": 8.2e-4, "mean": 1.4e-4}}
    cache = {"steps": 1840, "steps_without_teacher": 1380, "bytes": 125_880, "storage": "fp16", "errors": errors}
    (run / "run.json").write_text(json.dumps(RECORD | {"teacher_precision": low, "teacher_cache": cache}))
    text = Page(write_report(run)).text
    assert f"KL 1e-05 nats from full precision, the same first class in 98.4{S}% of 128 validation images." in text
    assert f"did not run in 1,380 of 1,840 steps: its answers were kept in fp16, 126{S}kB on the disk, which moved 0.0008 of" in text


def test_it_holds_everything_in_order(run: Path) -> None:
    page = Page(write_report(run))
    assert page.headings() == ["result", "curves", "pictures", "settings", "origin"]
    assert len([attributes for attributes in page.all("svg") if attributes.get("role") == "img" and attributes["aria-label"]]) == 4
    assert len(page.all("img")) == 4 * (1 + 2 * 3)
    assert SETTINGS in page.text
    for value in (*RECORD["versions"].values(), *RECORD["hashes"].values(), *RECORD["data"]["skipped"]):
        assert value in page.text


def test_nothing_is_loaded_from_anywhere(run: Path) -> None:
    page = Page(write_report(run))
    assert all(str(attributes["src"]).startswith("data:image/png;base64,") and attributes["alt"] for attributes in page.all("img"))
    assert [attributes["href"] for attributes in page.all("link")] == ["data:,"]
    assert not {"script", "iframe", "object", "embed", "base", "form", "a"} & {tag for tag, _ in page.tags}
    loading = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "xlink:href")
    ]
    assert not [value for value in loading if not str(value).startswith("data:")]
    assert not re.search(r"url\(|@import|https?://", page.source)
    assert any("default-src 'none'" in str(attributes.get("content")) for attributes in page.all("meta"))


SCRIPT, IMAGE = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>.png'


def test_names_that_are_markup_show_as_text(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["data"].update(classes=[SCRIPT] * 10, skipped=[IMAGE], name=SCRIPT)
    record["models"]["teacher"]["name"] = IMAGE
    record["title"] = record["status"] = IMAGE
    record["result"][1]["row"] = SCRIPT
    record["versions"] = record["hashes"] = {SCRIPT: IMAGE}
    (run / "run.json").write_text(json.dumps(record))
    (run / "settings.yaml").write_text(f"data: '{IMAGE}' {SCRIPT}")
    write_rows(run / "train.csv", [{"step": step, SCRIPT: 1.0, IMAGE: step} for step in (1, 2)])
    write_rows(run / "val.csv", [{"step": 1, "top1": 0.5, f"val_{SCRIPT}": 1.0}])
    page = Page(write_report(run))
    assert SCRIPT not in page.source
    assert not page.all("script")
    assert all(str(attributes["src"]).startswith("data:") and "onerror" not in attributes for attributes in page.all("img"))
    assert page.text.count(SCRIPT) >= 8
    assert page.text.count(IMAGE) >= 6


def test_a_section_without_data_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert page.headings() == []
    assert "Not evaluated yet." in page.text


def test_a_run_in_progress_shows_what_it_has_and_reloads_itself(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path, status="running", result=None, savings=None, baseline=False, pictures=False)
    page = Page(write_report(run))
    assert page.headings() == ["result", "curves", "settings", "origin"]
    assert f"Student 92.1{S}% top-1 so far (step 900); the teacher computed on 8 of 16 patches." in page.text
    assert [attributes["content"] for attributes in page.all("meta") if attributes.get("http-equiv") == "refresh"] == ["30"]
    assert "labels only" not in page.text


def test_an_interrupted_run_says_so_and_does_not_reload(tmp_path: Path) -> None:
    page = Page(write_report(write_sample_run(tmp_path, status="interrupted", pictures=False)))
    assert {"class": "status interrupted"} in page.all("span")
    assert not [attributes for attributes in page.all("meta") if attributes.get("http-equiv") == "refresh"]


def test_no_curriculum_when_the_teacher_saw_everything(tmp_path: Path) -> None:
    page = Page(write_report(write_sample_run(tmp_path, keep=None, pictures=False)))
    assert "The teacher on what it was shown" not in page.text
    assert "What masking saved" not in page.text
    assert "patches" not in page.text


def test_missing_columns_single_rows_and_broken_numbers_are_survived(run: Path) -> None:
    write_rows(run / "train.csv", [{"total": math.nan, "labels": "", "teacher": 0.5}])
    (run / "val.csv").write_text("step,epoch,top1,nll\n30,1,0.5,nan\n60,2,0.6")  # the last row is being written
    (run / "baseline" / "val.csv").write_text("")
    page = Page(write_report(run))
    titles = re.findall(r"<h3>([^<]+)", page.source)
    assert [title.strip() for title in titles] == ["Validation accuracy", "Training loss", "2 files skipped"]
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize(("size", "channels", "pixelated"), [(16, 1, True), (96, 3, False)])
def test_small_pictures_keep_their_pixels(tmp_path: Path, size: int, channels: int, pixelated: bool) -> None:
    page = Page(write_report(write_sample_run(tmp_path, size=size, channels=channels)))
    assert all(("pixelated" in str(f["class"])) == pixelated for f in page.all("figure") if "card" in str(f["class"]))


def test_only_so_many_skipped_files_are_named(tmp_path: Path) -> None:
    data = {"name": "photos", "skipped": [f"file-{i}.png" for i in range(1000)]}
    page = Page(write_report(write_sample_run(tmp_path, data=data, pictures=False)))
    assert "1000 files skipped" in page.text
    assert "file-199.png" in page.text
    assert "file-200.png" not in page.text
    assert "and 800 more" in page.text


def test_the_file_before_is_replaced_and_nothing_else_is_left(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old")
    assert write_report(str(run)) == run / "report.html"
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("text", "said"), [(None, "holds no run.json"), ("{", "cannot be read as JSON"), ("[]", "holds a list")])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=said):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_data_set_that_a_run_made_is_shown(run: Path) -> None:
    assert "What was made" not in write_report(run).read_text()
    (run / "data").mkdir()
    Image.new("L", (8, 8), 128).save(run / "data" / "images.png")
    page = write_report(run).read_text()
    assert "What was made" in page
    assert page.count('class="sheet" src="data:image/png;base64,') == 1


def test_a_second_teacher_is_named(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["models"]["second_teacher"] = {"name": "timm/second", "params": 7}
    (run / "run.json").write_text(json.dumps(record))
    assert "<dt>second teacher</dt><dd>timm/second</dd>" in write_report(run).read_text()


def test_a_second_student_is_named_and_has_its_row_and_its_curve(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["models"]["partner"] = {"name": "timm/partner", "params": 7}
    record["result"].insert(2, {"row": "partner (dml)", "top1": 0.25, "params": 7})
    (run / "run.json").write_text(json.dumps(record))
    write_rows(run / "val.csv", [{"step": step, "epoch": step, "top1": 0.5, "partner_top1": 0.2 + step / 100} for step in (1, 2, 3, 4, 5)])
    page = write_report(run).read_text()
    assert "timm/partner" in page
    assert re.search(r"partner 25\.0\s%", page)
    assert re.search(r"partner\s*<b>25\.0", page)
