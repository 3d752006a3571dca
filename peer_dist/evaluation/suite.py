"""``peer-dist evaluate --dataset``: a checkpoint on the papers' test sets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from peer_dist.data.documents import DataError
from peer_dist.data.prepare import tokenized
from peer_dist.evaluation.evaluation_sets import Document, EvaluationSet, parse_sets
from peer_dist.evaluation.loading import LoadedModel, load_model, read_settings
from peer_dist.evaluation.scoring import Request, score
from peer_dist.measures.held_out import perplexity_of
from peer_dist.mistake import printable
from peer_dist.output import messages
from peer_dist.ranks.world import World

_ROUND = 1 << 24  # characters tokenized and scored at a time
UNITS = {
    "token_perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
    "last_word_perplexity": "perplexity of the last word",
    "last_word_accuracy": "accuracy of the last word",
}


@dataclass
class Result:
    """Sums over a test set: its counts, and the loss in nats. End-of-document tokens are not counted."""

    name: str
    source: str
    unit: str
    note: str
    documents: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    characters: int = 0
    nats: float = 0.0
    last_words: int = 0
    last_word_nats: float = 0.0
    last_words_right: int = 0

    def metrics(self) -> dict[str, float]:
        """Values by the keys of :data:`UNITS`; those of the last word only where last words were scored."""
        bits = self.nats / math.log(2)
        values = {
            "token_perplexity": perplexity_of(self.nats / self.tokens),
            "word_perplexity": perplexity_of(self.nats / max(1, self.words)),
            "bits_per_byte": bits / self.bytes,
            "bits_per_character": bits / self.characters,
        }
        if self.last_words:
            values["last_word_perplexity"] = perplexity_of(self.last_word_nats / self.last_words)
            values["last_word_accuracy"] = self.last_words_right / self.last_words
        return values


@dataclass(frozen=True)
class Suite:
    """A checkpoint's results on several test sets, with windows of ``seq_length`` tokens at ``stride``."""

    checkpoint: str
    step: int
    seq_length: int
    stride: int
    results: list[Result] = field(default_factory=list)

    def json(self) -> str:
        """Everything, with each set's ``metrics`` and, as ``unit``, which of them is the main one."""
        sets = [{**vars(result), "metrics": result.metrics()} for result in self.results]
        return json.dumps({**vars(self), "results": sets}, indent=2)

    def tables(self) -> Iterator[Table]:
        """The main figures, a row per model and a column per set as in the PEER paper's table 1; then all."""
        metrics = [result.metrics() for result in self.results]
        names = [result.name.replace("_", " ") for result in self.results]
        notes = "\n".join(f"{result.name}: {result.note}" for result in self.results if result.note)
        title = f"windows of {self.seq_length} tokens, stride {self.stride}"
        summary, every = Table(title=title, caption=notes or None), Table(title="all figures")
        summary.add_column("model", overflow="fold")
        every.add_column("", no_wrap=True)
        for name, result in zip(names, self.results):
            summary.add_column(f"{name}\n{UNITS[result.unit]}", justify="right", min_width=8)
            every.add_column(name, justify="right", min_width=10)
        main = (_digits(values[result.unit], 3) for values, result in zip(metrics, self.results))
        summary.add_row(f"{self.checkpoint} (step {self.step})", *main)
        for key in ("documents", "tokens", "words", "bytes", "characters"):
            every.add_row(key, *(f"{getattr(result, key):,}" for result in self.results))
        for key, title in UNITS.items():
            if any(key in values for values in metrics):
                every.add_row(title, *(_digits(values[key], 4) if key in values else "" for values in metrics))
        yield summary
        yield every


def _digits(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if value < 1e6 else f"{value:.{decimals}e}"


def evaluate_sets(checkpoint: str, specs: Sequence[str], stride: int | None, batch_size: int) -> Suite | None:
    """Evaluate on every rank; rank 0 has the results, the others None.

    Args:
        specs: as for :func:`peer_dist.evaluation.evaluation_sets.parse_sets`.
        stride: tokens scored per window; None is half of the model's ``seq_length``.
        batch_size: windows per rank and forward pass.

    Raises:
        DataError: a test set cannot be read, or the stride is not one.
        CheckpointError: the checkpoint cannot be read.
    """
    seq_length = read_settings(checkpoint).config.model.seq_length
    if stride is None:
        stride = max(1, seq_length // 2)
    if not 1 <= stride <= seq_length:
        raise DataError(f"--stride {stride}: must be 1 to the model's seq_length, {seq_length}")
    sets = parse_sets(specs)
    world = World.from_environment()
    with world.joined():
        loaded = load_model(checkpoint, world.world_size)
        suite = Suite(str(loaded.path), loaded.step, seq_length, stride)
        with _progress(world.rank) as progress:
            for test_set in sets:
                suite.results.append(_evaluate(loaded, test_set, stride, batch_size, progress))
    return suite if world.rank == 0 else None


def _evaluate(loaded: LoadedModel, test_set: EvaluationSet, stride: int, batch_size: int, progress: Progress) -> Result:
    result = Result(test_set.name, test_set.source, test_set.unit, test_set.note)
    task = progress.add_task(printable(test_set.name), total=test_set.size, note="")
    read = shown = 0.0  # bytes of the file; what lies between is being scored

    def advance(count: int) -> None:
        nonlocal read
        read += count

    for documents in _rounds(test_set.documents(advance)):
        step = _share_of(progress, task, read - shown)
        shown = read
        requests = _requests(loaded, documents)
        for document, request, scores in zip(documents, requests, score(loaded, requests, stride, batch_size, step)):
            result.documents += 1
            result.tokens += len(request.ids)
            result.words += document.words
            result.bytes += len(document.text.encode())
            result.characters += document.characters
            result.nats += float(scores.nats.sum(dtype="float64"))
            if document.context is not None:
                last = _last_word(loaded, document, request)
                result.last_words += 1
                result.last_word_nats += float(scores.nats[last:].sum(dtype="float64"))
                result.last_words_right += bool(scores.greedy[last:].all())
        progress.update(task, note=f"perplexity {result.metrics()['token_perplexity']:.2f}")
    progress.update(task, completed=test_set.size)
    return result


def _rounds(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Lists of about :data:`_ROUND` characters: the same on every rank."""
    batch: list[Document] = []
    waiting = 0
    for document in documents:
        batch.append(document)
        waiting += len(document.text)
        if waiting >= _ROUND:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _requests(loaded: LoadedModel, documents: Sequence[Document]) -> list[Request]:
    ids = tokenized((document.text for document in documents), loaded.tokenizer)
    return [Request(document[:-1]) for document in ids]  # without the end-of-document token


def _last_word(loaded: LoadedModel, document: Document, request: Request) -> int:
    """The first token in which the passage differs from its context alone."""
    context = loaded.tokenizer.encode(document.context or "")
    same = 0
    while same < min(len(context), len(request.ids) - 1) and context[same] == request.ids[same]:
        same += 1
    return same


def _share_of(progress: Progress, task: TaskID, size: float) -> Callable[[float], None]:
    return lambda share: progress.advance(task, share * size)


def _progress(rank: int) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=messages(),
        disable=rank != 0,
    )
