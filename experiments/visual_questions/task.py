"""Visual questions made by templates from labelled images: one an image, "Is this a cat?" or "What is shown?".

    data=custom data.load=fedfuse.experiments.visual_questions.task:load data.extra.limit=2000

A class of the task is a question and its answer, as `strategy=fednano strategy.question=null` reads it. Every second
image is asked what it shows; of the others half are asked for what they show (yes), half for another class (no). Which
image is asked what depends on its place alone, not on a run's seed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedfuse.config.schema import DataConfig
from fedfuse.data import Dataset
from fedfuse.data.dataset import Examples
from fedfuse.data.load import load as read

WHAT = "What is shown?"
ENCODERS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that the published encoders expect


def classes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Questions and their answers: C names, then yes and no of each."""
    asks = [f"Is this {'an' if name[0] in 'aeiou' else 'a'} {name}?" for name in names]
    return (*(f"{WHAT} {name}" for name in names), *(f"{ask} {word}" for ask in asks for word in ("yes", "no")))


def asked(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The task's class of each image, from the image's own (n,)."""
    draw = np.random.default_rng(seed)
    kind, other = draw.integers(0, 4, len(targets)), draw.integers(1, count, len(targets))
    shown, yes = np.where(kind == 2, targets, (targets + other) % count), kind == 2
    return np.where(kind < 2, targets, count + 2 * shown + ~yes).astype(np.int64)


def load(data: str = "cifar10", limit: int | None = 2000, test_limit: int | None = 500) -> Dataset:
    """The task of an image data set's first `limit` images by class."""
    source = read(DataConfig(name=data, limit=limit, test_limit=test_limit))
    count = len(source.classes)

    def made(examples: Examples | None, seed: int) -> Examples | None:
        return None if examples is None else Examples(examples.inputs, asked(examples.targets, count, seed))

    mean, std = ENCODERS
    train, test = made(source.train, 1), made(source.test, 2)
    assert train is not None
    return dataclasses.replace(
        source, name="visual_questions", train=train, test=test, classes=classes(tuple(map(str, source.classes))),
        mean=mean, std=std,
    )  # fmt: skip
