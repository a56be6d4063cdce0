"""Train several adapters on one frozen backbone, step by step together (`fastprompt.train.joint`).

Each adapter is a `Run` of its own, with its generator and head, optimizer, schedule, batch norm statistics, log and
best weights. Runs of one seed read the same batches and draw the same random tensors, as they would one by one: they
share a stream of images and random states. What is different between seeds is read by each of them.

While they train, all states are in one file of the grid's directory, which is replaced atomically, so that all
adapters resume at the same step. A run that ends, or diverges, is written into its own directory, as one that has been
trained alone; then it leaves the file.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastprompt.files import remove
from fastprompt.memory import reset_peak_memory
from fastprompt.terminal import say
from fastprompt.train.batches import grouped
from fastprompt.train.checkpoint import load_state, rng_state, save_state, set_rng_state
from fastprompt.train.directory import CHOICES_FILE
from fastprompt.train.evaluate import evaluation_mode
from fastprompt.train.joint import Outputs, Part, outputs
from fastprompt.train.log import progress_bar
from fastprompt.train.loop import Begun, Totals, TrainingDiverged
from fastprompt.train.run import Run, Saved, checkpoint_due
from fastprompt.train.tasks import Score
from fastprompt.train.termination import Terminated, polling, requested
from fastprompt.vit.prompts import NO_DRAWS, Draws

if TYPE_CHECKING:
    from fastprompt.train.directory import RunDirectory

GRID_STATE_FILE = "grid.safetensors"

Ended = Callable[[str, Run, bool], Any]
"""Called with name and run when a run has ended, and whether it diverged; writes the run's files."""


class SavedGrid(NamedTuple):
    """What the file of a grid in training holds: its random name, choices, and each run's state by name."""

    name: str
    choices: dict[str, str]
    runs: dict[str, Saved]


def read_grid(directory: Path) -> SavedGrid | None:
    """Return what a grid that was interrupted has saved, or None.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / GRID_STATE_FILE
    if not path.exists():
        return None
    tensors, values = load_state(path)
    runs: dict[str, Saved] = {name: ({}, of_run) for name, of_run in values["runs"].items()}
    for key, tensor in tensors.items():
        name, _, of_run = key.partition("/")
        runs[name][0][of_run] = tensor
    return SavedGrid(values["name"], values["choices"], runs)


class Stream:
    """The batches and random states of all runs of one seed. `runs`: name -> run."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.states = rng_state()
        self.batches: Iterator[list[tuple[Tensor, Tensor]]] = iter(())

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Context in which the global generators are in this stream's states."""
        set_rng_state(*self.states)
        try:
            yield
        finally:
            self.states = rng_state()

    @property
    def any(self) -> Run:
        """One of its runs."""
        return next(iter(self.runs.values()))


class Together:
    """Runs that are trained together, from their start or their saved states to their ends.

    Args:
        runs: name -> run without a directory. The names are those of the runs' directories.
        directory: of the grid.
        data: result of `data_identities`.
        ended: see `Ended`.
        progress: show a bar and a line per epoch.
    """

    def __init__(
        self, runs: Mapping[str, Run], directory: RunDirectory, data: Mapping[str, Any], ended: Ended, progress: bool
    ) -> None:
        self.runs, self.directory, self.data, self.ended, self.progress = dict(runs), directory, data, ended, progress
        self.first = next(iter(self.runs.values()))
        self.recipe, self.num_diverged = self.first.recipe, 0
        self.streams: dict[int, Stream] = {}
        self.name, self.choices = secrets.token_hex(8), self.first.state.choices
        for run in self.runs.values():
            run.state.choices = self.choices
        self.last_commit = monotonic()

    def train(self, saved: SavedGrid | None) -> None:
        """Train all runs to their ends. `saved` is what `read_grid` returned, of the same runs; None: they start."""
        if saved is not None:
            self.name = saved.name
            self.choices.made |= saved.choices | self.directory.read_choices(saved.name)
        for run in self.runs.values():
            run.prepare_data(self.data, None if run is self.first else self.first)
        for name, run in self.runs.items():
            if saved is None:
                run.start({})
            else:
                run.restore(*saved.runs[name], self.directory.path / name)
                run.state.progress.events.append({"event": "resume", **run.here()[0]})
            if run.recipe.seed not in self.streams:
                self.streams[run.recipe.seed] = Stream()  # in the random states that the run has set
            self.streams[run.recipe.seed].runs[name] = run
        if saved is None:
            self.commit()
        if self.first.plan.said:
            self._say(self.first.plan.said)
        self.choices.on_choice = lambda: self.directory.write_choices(self.name, self.choices.made)
        self._say(
            f"{'training' if saved is None else 'resuming'} {len(self.runs)} adapters of "
            f"{self.first.model.config.kind!r} together on {self.first.device}, after {self.first.here()[1]} of "
            f"{self.recipe.epochs}: {self.first.train.num_images:,} training and {self.first.val.num_images:,} "
            f"validation images, {self.first.loop.steps} steps per epoch"
        )
        reset_peak_memory(self.first.device)
        total, done = self.recipe.epochs * self.first.train.num_images, self.first.images_done(self.first.state.part)
        with progress_bar(self.progress, total * len(self.runs), done * len(self.runs)) as bar, polling():
            self._end_done()
            while self.runs:
                self._epoch(bar)
                self._end_done()

    def commit(self) -> None:
        """Replace the file with the states of all runs."""
        self.last_commit = monotonic()
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        seen: set[int] = set()
        for stream in self._streams():
            with stream.current():
                for name, run in stream.runs.items():
                    of_run, values[name] = run.state.saved()
                    for key, tensor in of_run.items():  # a file holds no memory twice, such as the backbone's
                        tensors[f"{name}/{key}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
                        seen.add(tensor.data_ptr())
        made = {"name": self.name, "choices": self.choices.made}
        save_state(self.directory.path / GRID_STATE_FILE, tensors, {**made, "runs": values})

    def _streams(self) -> list[Stream]:
        return [stream for stream in self.streams.values() if stream.runs]

    def _say(self, line: str, bar: Any = None) -> None:
        if self.progress:
            with contextlib.nullcontext() if bar is None else bar.external_write_mode(file=sys.stderr):
                say(line, sys.stderr)

    def _epoch(self, bar: Any) -> None:
        """Train and validate all runs for one epoch, or the rest of it, then commit."""
        epoch = next(iter(self.runs.values())).state.progress.epoch + 1
        totals: dict[str, Totals] = {}
        for stream in self._streams():
            with stream.current():
                for name, run in stream.runs.items():
                    totals[name] = run.begin_epoch()
                    run.model.train()
                done = totals[next(iter(stream.runs))]
                batches = stream.any.train.epoch(epoch - 1, done.steps * self.recipe.accumulate, done.rng)
                stream.batches = grouped(batches, self.recipe.accumulate)
        while self._step(epoch, totals, bar):
            if requested():
                self._save_and_stop(epoch, totals, bar)
            if checkpoint_due(self.recipe, totals[next(iter(self.runs))].steps, self.last_commit):
                self._save_part(epoch, totals, bar)
        records: dict[str, dict[str, Any]] = {}
        for name, run in list(self.runs.items()):
            run.state.optimizer.zero_grad(set_to_none=True)
            with self._dropping(name, bar):
                records[name] = run.loop.record(epoch, totals[name])
                run.keep_time(totals[name])
        scores = self._validate(epoch, totals, bar)
        for name, run in list(self.runs.items()):
            with self._dropping(name, bar):
                loss, score = run.loop.scored(epoch, scores[name])
                run.end_epoch(epoch, records[name], totals[name].seconds, loss, score)
        if self.runs:
            self.commit()
            self._say(self._line(epoch), bar)

    def _step(self, epoch: int, totals: Mapping[str, Totals], bar: Any) -> bool:
        """Take one step of each run; return whether there was one to take."""
        read = [(stream.runs, *step) for stream in self._streams() if (step := self._read(stream)) is not None]
        if not read:
            return False
        begun: dict[str, Begun] = {}
        for runs, batches, _ in read:
            begun |= {name: run.loop.begin(epoch, batches, totals[name]) for name, run in runs.items()}
        for j in range(len(read[0][1])):
            found = self._outputs([(runs, batches[j][0], draws[j]) for runs, batches, draws in read])
            losses = [
                run.loop.loss(begun[name], found[name], batches[j][1], totals[name])
                for runs, batches, _ in read
                for name, run in runs.items()
            ]
            torch.stack(losses).sum().backward()
        for name, run in list(self.runs.items()):
            run.loop.end(epoch, begun[name], totals[name])
            bar.update(sum(len(targets) for _, targets in begun[name].batches))
            with self._dropping(name, bar):
                run.loop.watch(epoch, totals[name])
        return bool(self.runs)

    def _read(self, stream: Stream) -> tuple[list[tuple[Tensor, Tensor]], list[Draws]] | None:
        """Return a stream's batches for the next step and the draws for each of them; None at the end of the epoch."""
        with stream.current():
            group = next(stream.batches, None)
            if group is None:
                return None
            batches = stream.any.loop.mixed(group)
            return batches, [stream.any.model.draw(len(images)) for images, _ in batches]

    def _outputs(self, parts: Sequence[tuple[Mapping[str, Run], Tensor, Draws]]) -> dict[str, Outputs]:
        """Return the outputs of each run, by name; a part is the runs that share images and draws."""
        loop = self.first.loop
        found = outputs(
            [Part(images, [run.model for run in runs.values()], draws) for runs, images, draws in parts],
            loop.constants,
            loop.features,
        )
        return dict(zip([name for runs, _, _ in parts for name in runs], found, strict=True))

    def _validate(self, epoch: int, totals: Mapping[str, Totals], bar: Any) -> dict[str, Score]:
        """Return the score of each run. Images that never change are read once for all of them."""
        scores = {name: Score(run.data.task, run.device) for name, run in self.runs.items()}
        streams = self._streams()
        together = [stream.runs for stream in streams]
        if self.first.data.fixed_val and streams:
            together = [self.runs]
        trained = [stream.states for stream in streams]
        with contextlib.ExitStack() as modes:
            for run in self.runs.values():
                modes.enter_context(evaluation_mode(run.model))
            for stream, runs in zip(streams, together, strict=False):
                with stream.current():
                    for images, labels in stream.any.val.epoch(epoch - 1):
                        for name, (logits, _) in self._outputs([(runs, images, NO_DRAWS)]).items():
                            scores[name].add(logits, labels)
                        if requested():
                            break
        if requested():
            for stream, states in zip(streams, trained, strict=True):
                stream.states = states
            self._save_and_stop(epoch, totals, bar)
        return scores

    @contextlib.contextmanager
    def _dropping(self, name: str, bar: Any = None) -> Iterator[None]:
        """Context that ends a run which diverges in it, and lets the others go on."""
        try:
            yield
        except TrainingDiverged as error:
            run, saved = self.runs[name], read_grid(self.directory.path)
            assert saved is not None
            run.state.restore(*saved.runs[name])
            run.log_divergence(error)
            self._say(f"dropped {name}: the {error.what} at epoch {error.epoch}", bar)
            self.num_diverged += 1
            self._end(name, True)

    def _end_done(self) -> None:
        """End the runs that have no epoch left."""
        for name, run in list(self.runs.items()):
            if run.is_done():
                with self.streams[run.recipe.seed].current():
                    run.finish()
                    self._end(name, False)
        if not self.runs:
            remove(self.directory.path, (GRID_STATE_FILE, CHOICES_FILE))

    def _end(self, name: str, diverged: bool) -> None:
        """Have a run's files written, and leave it out from now on."""
        run = self.runs[name]
        self.ended(name, run, diverged)
        del self.runs[name]
        del self.streams[run.recipe.seed].runs[name]

    def _save_part(self, epoch: int, totals: Mapping[str, Totals], bar: Any) -> None:
        """Commit in the middle of an epoch."""
        for name, run in list(self.runs.items()):
            with self._dropping(name, bar):
                run.loop.require_finite(epoch, totals[name])
                run.keep_time(totals[name])
                run.state.part = totals[name]
        if self.runs:
            self.commit()

    def _save_and_stop(self, epoch: int, totals: Mapping[str, Totals], bar: Any) -> NoReturn:
        self._save_part(epoch, totals, bar)
        raise Terminated(saved=True)

    def _line(self, epoch: int) -> str:
        """Describe an epoch in one line: the best of the runs that still train, and their speed."""
        best = max(self.runs, key=lambda name: self._score(self.runs[name]))
        (score, loss), row = self._score(self.runs[best]), self.runs[best].state.progress.events[-1]
        diverged = f", {self.num_diverged} diverged" if self.num_diverged else ""
        return (
            f"epoch {epoch}/{self.recipe.epochs}: {len(self.runs)} adapters{diverged}; best {best}: validation loss "
            f"{-loss:.4f}, {self.first.data.task.metric} {score:.3f}; {len(self.runs)} x "
            f"{row['images_per_second']:.1f} images/s, {row['seconds']:.1f} s"
        )

    @staticmethod
    def _score(run: Run) -> tuple[float, float]:
        progress = run.state.progress
        return progress.best_val_accuracy, -progress.best_val_loss
