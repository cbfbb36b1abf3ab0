"""The report of a run to detect or to segment."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from sample_run import ALARM, CLASSES, METRICS, write_dense_run, write_rows, write_sample_run

from stillhouse.errors import UserError
from stillhouse.report import write_report
from stillhouse.report.page import MOST_CLASSES, mask_charts
from stillhouse.report.run_folder import read_columns

S = "\N{NARROW NO-BREAK SPACE}"


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def headings(source: str) -> list[str]:
    return re.findall(r'<h2 id="(\w+)"', source)


def charts(source: str) -> list[str]:
    return [title.strip() for title in re.findall(r"<figcaption>\s*<h3>([^<]+)", source)]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("segment", f"Student 61.2{S}% mIoU, +2.4 points over labels only, teacher 73.2{S}%."),
        ("detect", f"Student 34.7{S}% mAP, +2.4 points over labels only, teacher 46.7{S}%."),
    ],
)
def test_the_sentence_and_the_curve_are_about_the_metric_that_decides(tmp_path: Path, task: str, said: str) -> None:
    source = page(write_dense_run(tmp_path, task, pictures=0))
    assert said in source
    assert charts(source)[0] == {"segment": "Validation mIoU", "detect": "Validation mAP"}[task]
    assert "accuracy over" not in source


@pytest.mark.parametrize(
    ("task", "head"),
    [("segment", ["mIoU", "pixel accuracy", "agrees with teacher"]), ("detect", ["mAP", "AP50", "AP75", "AP small", "AP medium"])],
)
def test_the_table_has_the_columns_of_the_task_that_are_known(tmp_path: Path, task: str, head: list[str]) -> None:
    source = page(write_dense_run(tmp_path, task, pictures=0))
    titles = re.findall(r'<th scope="col">([^<]+)</th>', source.split("</thead>")[0])
    assert titles == [*head, "parameters", "multiply\N{NON-BREAKING HYPHEN}adds / image", "training step"]
    values = [float(value) for value in re.findall(r'<data value="([^"]+)"', source.split("</table>")[0])]
    assert values[3 : 3 + len(head)] == list(METRICS[task].values())


def test_every_class_has_its_value_in_the_order_of_the_data_and_its_name_is_text(tmp_path: Path) -> None:
    source = page(write_dense_run(tmp_path, "detect", pictures=0))
    table = source.split('<table class="classes">')[1].split("</table>")[0]
    assert [html.unescape(name) for name in re.findall(r'<th scope="row">(.*?)</th>', table)] == CLASSES["detect"]
    values = [float(value) for value in re.findall(r'<data value="([^"]+)"', table)]
    assert [a - b for a, b in zip(values[::2], values[1::2], strict=True)] == pytest.approx([0.02] * 3)
    assert "AP of each class" in source
    assert "<b>tree" not in source


def test_the_teachers_classes_are_shown_where_its_row_has_them(tmp_path: Path) -> None:
    result = [{"row": "teacher", "miou": 0.7, "per_class": {"ring": 0.75}}, {"row": "student (acam_kd)", "miou": 0.6}]
    source = page(write_dense_run(tmp_path, "segment", pictures=0, result=result))
    assert '<i class="dot teacher"></i>teacher</th>' in source
    assert f">75.0{S}%<" in source


def test_only_so_many_classes_are_listed(tmp_path: Path) -> None:
    per_class = {f"class {i}": 0.5 for i in range(MOST_CLASSES + 50)}
    run = write_dense_run(tmp_path, "segment", pictures=0, per_class=per_class, data={"classes": list(per_class)})
    (run / "baseline" / "run.json").unlink()
    source = page(run)
    assert f"class {MOST_CLASSES - 1}<" in source
    assert f"class {MOST_CLASSES}<" not in source
    assert "and 50 more classes" in source


def test_what_the_masks_do_is_drawn_with_the_level_of_collapse(tmp_path: Path) -> None:
    source = page(write_dense_run(tmp_path, "segment", pictures=0))
    assert headings(source) == ["result", "curves", "masks", "settings", "origin"]
    assert charts(source)[-3:] == ["Mean value of the masks", "How alike the masks are", "Masks and difference"]
    assert "alarm" not in source.split("</style>")[1]
    found = mask_charts(read_columns(tmp_path / "watch.csv"))
    assert [[name for name, _, _, _ in drawn.paths] for drawn in found] == [
        ["spatial", "channel", "collapse below"],
        ["spatial", "channel"],
        ["corr"],
    ]
    assert found[0].paths[-1][1:2] + found[0].paths[-1][3:] == ("warn level", "0.05")


def test_other_figures_have_charts_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "watch.csv", [{"step": 1, "epoch": 1, "entropy_of_x": 0.5, "mask_mean": 0.4}])
    found = mask_charts(read_columns(tmp_path / "watch.csv"))
    assert [(drawn.title, drawn.paths[0][0]) for drawn in found] == [
        ("Mean value of the masks", "mask mean"),
        ("entropy of x", "entropy of x"),
    ]
    assert mask_charts({}) == []


def test_an_alarm_cannot_be_missed(tmp_path: Path) -> None:
    source = page(write_dense_run(tmp_path, "segment", pictures=0, alarms=[ALARM, "<i>twice</i>"]))
    assert '<span class="status">2 warnings</span>' in source
    assert html.escape(ALARM, quote=False) in html.unescape(source).replace("&", "&amp;")
    assert source.count('class="alarm"') == 2
    assert "<i>twice" not in source


def test_an_alarm_shows_even_without_figures(tmp_path: Path) -> None:
    source = page(write_sample_run(tmp_path, pictures=False, alarms=[ALARM]))
    assert '<span class="status">1 warning</span>' in source
    assert headings(source) == ["result", "curves", "masks", "settings", "origin"]


def test_pictures_have_labels_answers_masks_and_a_legend(tmp_path: Path) -> None:
    source = page(write_dense_run(tmp_path, "segment", masks=19, pictures=2))
    alts = re.findall(r'alt="picture 1([^"]*)"', source)
    assert alts[:6] == ["", ", labels", ", teacher", *(f", student, {m}" for m in ("start, step 0", "middle, step 450", "end, step 900"))]
    assert alts[6:16] == [
        ", difference, start, step 0",
        *(f", mask {i}, start, step 0" for i in range(1, 9)),
        ", masks over channels, start, step 0",
    ]
    assert len(alts) == 6 + 3 * 10
    assert "11 more in the folder pictures" in source
    legend = source.split('<ul class="legend key">')[1].split("</ul>")[0]
    assert re.findall(r"</i>([^<]+)", legend) == ["disc", "ring", "square"]  # the background is not painted


def test_the_page_stays_a_file_one_can_mail(tmp_path: Path) -> None:
    source = page(write_dense_run(tmp_path, "detect", masks=20, channels=2048, side=(400, 600), pictures=8))
    assert source.count('<figure class="card') == 6
    assert len(source) < 900_000


def test_a_run_in_progress_has_its_last_evaluation(tmp_path: Path) -> None:
    run = write_dense_run(tmp_path, "segment", pictures=0, status="running", result=None, per_class=None)
    (run / "baseline" / "run.json").unlink()
    source = page(run)
    assert f"Student 61.2{S}% mIoU so far (step 900)" in source
    assert "of each class" not in source


def test_a_task_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no task 'restore'"):
        write_report(write_sample_run(tmp_path, pictures=False, task="restore"))
