"""What is asked of each example, and which answers there are: a language model's task made of a data set's classes.

With one question for all, a class's name is its answer. Without, a class's name is a question and its answer, parted by
the last question mark and a space, as in "Is this a cat? yes": a label says what is asked, and is scored among the
answers to that question alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfuse.errors import UserError
from fedfuse.models.reader import Reader

OTHER = -1e4  # the score of an answer to another question: a number, since what is none counts as a failed prediction


class Questions:
    """Questions and answers as a reader knows them.

    Attributes
    ----------
    e : Tensor
        Embeddings of all questions' tokens, one question after another (S × d).
    length : Tensor
        Tokens of each question (Q) int32.
    of : Tensor
        The question of each class (C) int32.

    Parameters
    ----------
    reader : Reader
    names : sequence of str
        The classes.
    question : str or None
        What is asked of every example; None: what its class says.
    letters : int
        Most tokens of a question.

    Raises
    ------
    UserError
        If a class or a question is not of that form, or a question has two answers of the same tokens.
    """

    def __init__(self, reader: Reader, names: Sequence[str], question: str | None, letters: int) -> None:
        pairs = [(question, name) if question is not None else _parted(name) for name in names]
        self.reader, self.texts = reader, list(dict.fromkeys(asked for asked, _ in pairs))
        self.of = torch.tensor([self.texts.index(asked) for asked, _ in pairs], dtype=torch.int32)
        for q in range(len(self.texts)):  # refuses answers to one question that are the same to the reader
            reader.answers([answer for (_, answer), of in zip(pairs, self.of.tolist(), strict=True) if of == q])
        self.answers = reader.answers([answer for _, answer in pairs], differ=False)
        embedded = [reader.embed(text) for text in self.texts]
        for text, one in zip(self.texts, embedded, strict=True):
            if not 0 < len(one) <= letters:
                raise UserError(
                    f"strategy.question: {text!r} has {len(one)} tokens; allowed is 1 to strategy.letters={letters}"
                )
        self.e, self.length = torch.cat(embedded), torch.tensor([len(one) for one in embedded], dtype=torch.int32)

    def choices(self, q: int) -> Tensor:
        """Classes that answer question q."""
        return (self.of == q).nonzero().squeeze(1)

    def loss(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """−log p(answer | image, question) of each example (n,).

        Parameters
        ----------
        image : Tensor
            n × L × d.
        text : Tensor
            Each example's question, n × L_text × d (`spread`).
        labels : Tensor
            Classes (n,).
        """
        labels = labels.long().cpu()
        lengths = self.length[self.of[labels]].to(image.device)
        out, answers = image.new_zeros(len(image)), self.answers[labels.to(self.answers.device)]
        longest = text.shape[1]
        if self.reader.minds and bool((lengths < longest).any()):  # all at once, each question moved up to its answer
            at = torch.arange(longest, device=image.device) - (longest - lengths[:, None])
            moved = text.gather(1, at.clamp_min(0)[:, :, None].expand_as(text))
            present = torch.cat([torch.ones_like(image[:, :, 0], dtype=torch.bool), at >= 0], 1)
            return self.reader.loss(torch.cat([image, moved], 1), answers, present)
        for length in lengths.unique().tolist():  # questions of a length are read together
            rows = (lengths == length).nonzero().squeeze(1)
            found = self.reader.loss(torch.cat([image[rows], text[rows, :length]], 1), answers[rows])
            out = out.index_put((rows,), found)
        return out

    def slopes(self, image: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ℓ (n,) = `loss`, and its slopes in each example's image (n × L × d) and question (n × L_text × d).

        Parameters
        ----------
        image : Tensor
            n × L × d.
        text : Tensor
            All questions (S × d).
        labels : Tensor
            Classes (n,).
        """
        image, text = image.detach().requires_grad_(), self.to_each(text.detach(), labels).requires_grad_()
        loss = self.loss(image, text, labels)
        slope_image, slope_text = torch.autograd.grad(loss.sum(), (image, text))
        return loss.detach(), slope_image, slope_text

    def to_each(self, text: Tensor, labels: Tensor) -> Tensor:
        """Each example's own question (n × longest × d) of all questions (S × d)."""
        return spread(text, self.length, self.of[labels.long().cpu()])

    def scores(self, image: Tensor, text: Tensor, labels: Tensor, size: int) -> Tensor:
        """log p of each class's answer (n × C); `OTHER` for answers to other questions than a row's.

        Parameters
        ----------
        image : Tensor
            n × L × d.
        text : Tensor
            All questions (S × d).
        labels : Tensor
            Classes (n,): what is read of them is what is asked.
        size : int
            Rows that are read at once.
        """
        asked = self.of[labels.long().cpu()]
        out = torch.full((len(image), len(self.of)), OTHER, device=image.device)
        for q, own in enumerate(text.split(self.length.tolist())):
            choices = self.choices(q).to(image.device)
            for rows in (asked == q).nonzero().squeeze(1).to(image.device).split(size):
                prefix = torch.cat([image[rows], own.expand(len(rows), -1, -1)], 1)
                out[rows[:, None], choices] = self.reader.scores(prefix, self.answers[choices])
        return out

    def accuracies(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """Accuracy on questions with k answers, by k, where some have more than others; z are scores (n × C)."""
        counts = torch.bincount(self.of.long())
        some = counts[self.of[y].long()]
        right = (z.argmax(1) == y).double()
        kinds = some.unique().tolist() if len(counts) > 1 else []
        return {f"accuracy_of_{k}": float(right[some == k].mean()) for k in kinds}


def _parted(name: str) -> tuple[str, str]:
    question, mark, answer = name.rpartition("? ")
    if not mark or not answer:
        raise UserError(f"strategy.question=null: class {name!r} is no question and answer, as 'Is this a cat? yes'")
    return question + "?", answer


def spread(flat: Tensor, length: Tensor, which: Tensor) -> Tensor:
    """Each example's own piece (n × longest × d) of pieces that lie one after another (S × d), filled with zeros.

    Parameters
    ----------
    flat : Tensor
    length : Tensor
        Rows of each piece (Q).
    which : Tensor
        The piece of each example (n).
    """
    pieces = torch.nn.utils.rnn.pad_sequence(list(flat.split(length.tolist())), batch_first=True)
    return pieces[which.long().to(flat.device)]
