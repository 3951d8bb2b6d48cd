"""The picture of a partition: drawn, legible, the same bytes for the same partition."""

import pytest

from fedfuse.data import draw_partition

ROWS = [
    {"client": client, "split": split, "label": label, "examples": 1 + client * label}
    for client in range(5)
    for split in ("train", "personal")
    for label in range(4)
]


def test_png_and_svg(tmp_path):
    draw_partition(ROWS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("a", "b"):
        draw_partition(ROWS, tmp_path / f"{name}.svg", classes=("w", "x", "y", "z"))
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    # client 4, label 3: 13 in each of two splits
    assert ">26<" in text


@pytest.mark.parametrize(
    "rows", [[], [{"client": i, "split": "train", "label": i % 3, "examples": 2} for i in range(3000)]]
)
def test_none_and_many(tmp_path, rows):
    draw_partition(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_texts_to_model_have_rows_and_no_label(tmp_path):
    rows = [{"client": client, "split": "train", "label": 0, "examples": 10 + client} for client in range(3)]
    draw_partition(rows, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert ">12<" in text
    assert ">label<" not in text
    draw_partition([*rows, {**rows[0], "label": 1}], tmp_path / "b.svg")
    assert ">label<" in (tmp_path / "b.svg").read_text()
