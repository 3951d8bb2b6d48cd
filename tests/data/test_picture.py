"""The picture of a partition: drawn, legible, the same bytes for the same partition."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from fedfuse.data import draw_partition

ROWS = [
    {"client": client, "split": split, "label": label, "examples": client * label}
    for client in range(5)
    for split in ("train", "personal")
    for label in range(4)
]
SVG = "{http://www.w3.org/2000/svg}"


def pictures(text: str) -> list[np.ndarray]:
    """The images within an SVG."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))).astype(int) for one in found]


def test_every_count_is_written_on_the_colour_of_its_size(tmp_path):
    for name in ("a", "b"):
        draw_partition(ROWS, tmp_path / f"{name}.svg", classes=("w", "<x>", "y", "z"), title="who & what")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    root = ElementTree.fromstring(text)
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert words[0] == "who & what"
    # nobody's are not written; each of the two splits adds client times label
    counts = [2 * client * label for label in range(1, 4) for client in range(1, 5)]
    assert words[1 : 1 + len(counts)] == list(map(str, counts))
    assert words[1 + len(counts) :] == ["w", "<x>", "y", "z", *"01234", "client", "label", "24", "0 examples"]
    cells = [node.get("fill") for node in root.iter(f"{SVG}rect")][1:]
    dark = [sum(bytes.fromhex(cell[1:])) for cell in cells]
    every = [2 * client * label for label in range(4) for client in range(5)]
    assert [cell for _, cell in sorted(zip(every, dark, strict=True))] == sorted(dark, reverse=True)
    assert len(set(dark)) == len(set(every))
    (scale,) = pictures(text)
    assert scale[0, 0].tolist() == list(bytes.fromhex(cells[every.index(24)][1:]))
    assert scale[-1, 0].tolist() == list(bytes.fromhex(cells[0][1:]))


def test_nobody(tmp_path):
    draw_partition([], tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"


def test_many_clients_are_pixels_and_more_are_averaged(tmp_path):
    def drawn(clients: int) -> tuple[np.ndarray, list[str]]:
        rows = [{"client": i, "split": "train", "label": i % 3, "examples": 2} for i in range(clients)]
        draw_partition(rows, tmp_path / "a.svg")
        root = ElementTree.parse(tmp_path / "a.svg").getroot()
        return pictures((tmp_path / "a.svg").read_text())[0], [node.text or "" for node in root.iter(f"{SVG}text")]

    picture, words = drawn(300)
    assert picture.shape == (3, 300, 3)
    dark = picture.sum(axis=2) < 300
    assert (dark == (np.arange(300) % 3 == np.arange(3)[:, None])).all()
    assert words[3:9] == ["0", "50", "100", "150", "200", "250"]
    picture, _ = drawn(3000)
    assert picture.shape == (3, 1000, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1  # three neighbours have one example of two each


def test_many_labels_have_no_row_of_their_own(tmp_path):
    rows = [{"client": i % 4, "split": "train", "label": i, "examples": 1} for i in range(100)]
    draw_partition(rows, tmp_path / "a.svg")
    picture = pictures((tmp_path / "a.svg").read_text())[0]
    assert (picture.sum(axis=2) < 300).sum() == 100
    words = [node.text for node in ElementTree.parse(tmp_path / "a.svg").getroot().iter(f"{SVG}text")]
    assert words[:10] == [str(label) for label in range(0, 100, 10)]
