import statistics
from dataclasses import replace

import pytest
from table_cells import Cell, cells, means, squeezed

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.results.paper import SOURCE, paper_tables, published_row, with_paper
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.tables import MEAN_PER_CLASS, OVERALL, ResultTable, class_table, to_markdown, transfer_table

ROWS = [(table, row) for table, content in paper_tables().items() for row in content["rows"]]
VISDA_VALIDATION_COUNTS = (3646, 3475, 4690, 10401, 4691, 2075, 5796, 4000, 4549, 2281, 4236, 5548)


@pytest.mark.parametrize(("table", "row"), [each for each in ROWS if each != ("visda", "GSDA")])
def test_the_papers_averages_are_the_means_of_its_rows(table: str, row: str) -> None:
    *values, average = paper_tables()[table]["rows"][row]
    assert len(values) == len(paper_tables()[table]["columns"]) - 1
    # 0.1: printed figures are themselves rounded.
    assert statistics.fmean(values) == pytest.approx(average, abs=0.1)


def test_visdas_gsda_average_is_overall_accuracy() -> None:
    *values, average = paper_tables()["visda"]["rows"]["GSDA"]
    assert statistics.fmean(values) == pytest.approx(82.5, abs=0.05)
    counts = VISDA_VALIDATION_COUNTS
    assert sum(counts) == BENCHMARKS["visda"].domain("validation").expected_images
    overall = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    assert overall == pytest.approx(average, abs=0.1)
    row = published_row("visda", "gsda")
    assert row is not None
    assert row.average_is_overall
    assert row.mean == pytest.approx(82.5, abs=0.05)


def test_all_of_the_papers_tables_are_here() -> None:
    shapes = {
        name: (each["paper_table"], len(each["rows"]), len(each["columns"])) for name, each in paper_tables().items()
    }
    assert shapes == {
        "office31_ablation": (1, 4, 7),
        "office31": (2, 15, 7),
        "office_home": (3, 8, 13),
        "visda": (4, 9, 13),
    }


NAMES = (
    "source-only", "entropy", "tca", "gfk", "dan", "rtn", "jan", "dann", "adda", "mcd", "mada", "cdan", "cdan-e",
    "symnets", "hafn", "safn", "bsp-dann", "bsp-cdan", "tpn", "self-ensembling", "domain", "class", "group", "glb",
    "glb-cls", "glb-cls-grp", "gsda",
)  # fmt: skip
PUBLISHED = [(task, method) for task in BENCHMARKS for method in NAMES if published_row(task, method) is not None]


def test_every_row_of_the_paper_belongs_to_a_method() -> None:
    found = {}
    for task, method in PUBLISHED:
        row = published_row(task, method)
        assert row is not None
        found.setdefault((row.table, row.name), []).append(method)
    printed = {(each["paper_table"], name) for each in paper_tables().values() for name in each["rows"]}
    # That of all parts is the same as GSDA's in Table 2.
    assert set(found) == printed - {(1, "Glb+Cls+Grp+Sync")}
    assert found[2, "CDAN"] == ["cdan-e"]
    assert found[2, "BSP"] == ["bsp-cdan"]
    assert found[1, "Glb"] == ["domain", "glb"]


def test_what_a_rows_name_does_not_say_is_noted() -> None:
    noted = {
        ("visda", "bsp-cdan"): "BSP: BSP+CDAN+E, ResNet-101",
        ("office31", "bsp-cdan"): "BSP: BSP+CDAN+E",
        ("visda", "self-ensembling"): "S-En: tested on sixteen augmentations of each image, ResNet-152",
        ("office31", "cdan-e"): "CDAN: CDAN+E, with entropy weights, tested on ten crops",
        ("office31", "safn"): "SAFN: SAFN+ENT, with the target's entropy, tested on ten crops",
        ("office-home", "safn"): "SAFN: tested on ten crops",
        ("visda", "safn"): "SAFN: ResNet-101",
        ("office31", "dann"): None,
    }
    for (task, method), note in noted.items():
        row = published_row(task, method)
        assert row is not None
        assert row.notes == [f"paper: {SOURCE}, ResNet-50", *([note] if note else [])]


def by_column(table: ResultTable) -> list[dict[str, Cell]]:
    return [dict(zip(table.columns, cells(table, *row))) for row, _ in table.rows]


@pytest.mark.parametrize(("task", "method"), PUBLISHED)
def test_runs_that_found_the_papers_figures_differ_from_it_by_nothing(task: str, method: str) -> None:
    """Our averages of the paper's columns are its averages to 0.1, as ours would be if we found its figures."""
    row = published_row(task, method)
    assert row is not None
    benchmark = BENCHMARKS[task]
    values = tuple(row.values.values())
    if benchmark.reported_by_class:
        measured = replace(
            run(task, "train", "validation", row.average, method),
            mean_per_class=Selection(statistics.fmean(values)),
            per_class=values,
        )
        table = with_paper(class_table([measured], ("train", "validation")))
    else:
        found = [run(task, *pair, value, method) for pair, value in zip(benchmark.transfer_tasks, values, strict=True)]
        table = with_paper(transfer_table(found, short_names=benchmark.short_names))
    ours, paper, difference = by_column(table)
    for column in row.values:
        assert difference[column].mean == 0
    average = MEAN_PER_CLASS if benchmark.reported_by_class else "avg"
    assert ours[average].mean == pytest.approx(row.mean, abs=0.1)
    assert difference[average].mean == pytest.approx(0, abs=0.1)
    if (task, method) == ("visda", "gsda"):
        assert paper[OVERALL].mean == row.average == 81.5
        assert difference[OVERALL].mean == 0
    else:
        assert paper[average].mean == row.average


@pytest.mark.parametrize("task", ["office31", "office-home"])
def test_columns_are_the_transfer_tasks_in_the_papers_order(task: str) -> None:
    benchmark = BENCHMARKS[task]
    names = [f"{benchmark.domain(a).short}->{benchmark.domain(b).short}" for a, b in benchmark.transfer_tasks]
    row = published_row(task, "gsda")
    assert row is not None
    assert list(row.values) == names


def test_visdas_columns_are_the_classes() -> None:
    row = published_row("visda", "gsda")
    assert row is not None
    assert tuple(row.values) == BENCHMARKS["visda"].classes


@pytest.mark.parametrize(
    ("method", "name", "table", "average"),
    [
        ("source-only", "ResNet50", 2, 76.1),
        ("dann", "DANN", 2, 82.2),
        ("domain", "Glb", 1, 83.7),
        ("class", "Glb+Cls", 1, 85.6),
        ("group", "Glb+Cls+Grp", 1, 87.0),
        ("gsda", "GSDA", 2, 89.7),
    ],
)
def test_rows_of_the_methods(method: str, name: str, table: int, average: float) -> None:
    row = published_row("office31", method)
    assert row is not None
    assert (row.name, row.table, row.mean) == (name, table, average)


def test_both_gsda_rows_of_office31_agree() -> None:
    tables = paper_tables()
    assert tables["office31"]["rows"]["GSDA"] == tables["office31_ablation"]["rows"]["Glb+Cls+Grp+Sync"]


def test_methods_and_tasks_that_the_paper_lacks() -> None:
    assert published_row("office31", "entropy") is None
    assert published_row("office-home", "class") is None
    assert published_row("digits", "gsda") is None
    assert published_row("office31-partial", "gsda") is None


def run(task: str, source: str, target: str, accuracy: float, method: str = "gsda", seed: int = 0) -> RunResult:
    classes = BENCHMARKS[task].classes or ()
    return RunResult(
        task, source, target, method, seed, 10,
        accuracy=Selection(accuracy, accuracy + 1, accuracy),
        mean_per_class=Selection(accuracy - 2, accuracy, accuracy),
        per_class=tuple(float(50 + index) for index in range(len(classes))), classes=classes,
        images_per_second=1.0, seconds=1.0,
    )  # fmt: skip


def office31(results: list[RunResult], **options: object) -> ResultTable:
    short = {domain.name: domain.short for domain in BENCHMARKS["office31"].domains}
    return with_paper(transfer_table(results, short_names=short, **options))  # type: ignore[arg-type]


def test_differences_by_hand() -> None:
    results = [run("office31", *pair, 90.0 + i) for i, pair in enumerate(BENCHMARKS["office31"].transfer_tasks)]
    table = office31(results)
    assert table.columns == ("A->W", "D->W", "W->D", "A->D", "D->A", "W->A", "avg")
    assert means(table, "gsda", "paper") == [95.7, 99.1, 100.0, 94.8, 73.5, 74.9, 89.7]
    assert [round(mean or 0, 1) for mean in means(table, "gsda", "difference")] == [
        -5.7,
        -8.1,
        -8.0,
        -1.8,
        20.5,
        20.1,
        2.8,
    ]
    text = squeezed(to_markdown([table]))
    assert "| paper: GSDA, Table 2 | 95.7 | 99.1 |" in text
    assert "| difference | -5.7 |" in text
    assert "| +20.5 |" in text
    assert "Hu et al., CVPR 2020, ResNet-50" in table.caption


def test_average_of_a_part_is_set_against_the_same_part() -> None:
    table = office31([run("office31", "amazon", "webcam", 90.0), run("office31", "dslr", "amazon", 70.0)])
    assert means(table, "gsda", "paper") == [95.7, 73.5, pytest.approx(84.6)]
    assert means(table, "gsda", "difference")[2] == pytest.approx(80 - 84.6)


def test_mean_per_class_is_not_set_against_overall_accuracy() -> None:
    table = office31([run("office31", "amazon", "webcam", 90.0)], metric="mean_per_class")
    assert [kind for (_, kind, _), _ in table.rows] == ["ours"]


def test_missing_cell_has_no_difference() -> None:
    table = office31(
        [run("office31", "amazon", "webcam", 90.0)], transfer_tasks=[("amazon", "webcam"), ("dslr", "webcam")]
    )
    assert means(table, "gsda", "difference") == [pytest.approx(-5.7), None, None]


def test_visda_shows_both_averages_and_says_which() -> None:
    table = with_paper(class_table([run("visda", "train", "validation", 80.0)], ("train", "validation")))
    assert table.columns[-2:] == (MEAN_PER_CLASS, OVERALL)
    ours, paper, difference = by_column(table)
    assert (ours["bus"].mean, ours[MEAN_PER_CLASS].mean, ours[OVERALL].mean) == (52.0, 78.0, 80.0)
    assert paper["bus"].mean == 83.1
    assert paper[MEAN_PER_CLASS].mean == pytest.approx(82.5, abs=0.05)
    assert paper[OVERALL].mean == 81.5
    assert difference[OVERALL].mean == pytest.approx(-1.5)
    assert "81.5, is not the mean of its own row (82.5)" in table.caption
    source_only = with_paper(
        class_table([run("visda", "train", "validation", 50.0, "source-only")], ("train", "validation"))
    )
    _, printed, _ = by_column(source_only)
    assert (printed[MEAN_PER_CLASS].mean, printed[OVERALL].mean) == (55.3, None)
    assert "not the mean" not in source_only.caption
