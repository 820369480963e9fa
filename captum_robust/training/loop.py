"""One loop for every network that this package trains."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from captum_robust._checks import check, check_count
from captum_robust._contexts import evaluation, seeded
from captum_robust._files import (
    check_folder,
    read_tensors,
    remove_parts,
    sole_user,
    write_whole,
)
from captum_robust._processes import together
from captum_robust._progress import progress_bar
from captum_robust.training.acceleration import accelerator_of
from captum_robust.training.checkpoints import (
    Log,
    check_best,
    check_log,
    check_not_begun,
    has_begun,
    identity_of,
    load_checkpoint,
    run_id,
    save_checkpoint,
    write_state,
)
from captum_robust.training.interrupts import Interrupted, Interrupts
from captum_robust.training.parts import parts_of
from captum_robust.training.schedule import Batch, Schedule, derived_seed
from captum_robust.training.settings import TrainingSettings
from captum_robust.training.step import Loss, take_step

if TYPE_CHECKING:
    from accelerate import Accelerator

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""A network in evaluation mode -> named numbers."""

Observe = Callable[[Sequence[Mapping[str, Any]]], None]
"""New rows of the log."""

_READ_EVERY = 10
"""Steps between two looks at the losses, which make the device finish its work."""


@dataclass(frozen=True)
class TrainingResult:
    """What became of a run."""

    steps: int
    rows: list[dict[str, Any]] = field(repr=False)
    """The log: ``step``, ``epoch``, ``learning_rate`` and ``loss`` of each step, and the numbers
    of each evaluation with its ``step`` (0: before training). Of several processes the first has
    it."""
    resumed_from: int = 0
    """The step at which this call went on; 0: it began."""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows that are evaluations, the first before training, the last at the end."""
        return [row for row in self.rows if "loss" not in row]


def fit(
    network: nn.Module,
    dataset: Dataset[Any],
    loss: Loss,
    settings: TrainingSettings | None = None,
    *,
    optimizer: Optimizer | None = None,
    evaluate: Evaluate | None = None,
    best: str | None = None,
    patience: int | None = None,
    partial: bool = False,
    observe: Observe | None = None,
    out: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a network in place; started again with the same arguments, a killed run goes on.

    On the CPU it ends with exactly the weights of an undisturbed run, as on CUDA where the layers'
    kernels are deterministic. What is drawn depends on the seed and the step or image only: the
    order of the images, what ``dataset`` draws from torch, NumPy or ``random`` for an image, what
    the network draws in a step.

    Ctrl-C ends the step, writes a checkpoint and raises ``KeyboardInterrupt``; a second one does so
    at once.

    Under ``accelerate launch`` or ``torchrun`` each process takes its share of every batch, in
    parts of ``micro_batch_size``, whose gradients add up by their numbers of images. The seed that
    a loss gets is another one for each part.

    Args:
        network: trained in training mode; a checkpoint in ``out`` replaces its weights. Modes are
            put back at the end.
        dataset: tuples of tensors or numbers, all of one shape; the first is the image.
        loss: (network, batch, seed) -> the mean loss, or named numbers, one of them ``"loss"``. The
            network may be wrapped for several processes; :func:`bare_module` undoes that.
        settings: :class:`TrainingSettings` by default.
        optimizer: by default that of the settings. Its learning rates are the highest of the
            schedule.
        evaluate: called before training, every ``evaluate_every`` steps and at the end, in
            float32, by the first process alone.
        best: the name of one of its numbers: the network ends with the weights that had the lowest
            (with ``out`` also in ``best.safetensors``); None: with the last ones.
        patience: stop after so many evaluations without a new best one; None: never. The one
            before training does not count: what training starts from may be good, and lost at
            first. Its weights are still those that the network ends with where none are better.
        partial: the loss of a step may leave weights out, which then stay as they are. Several
            processes have to look for them.
        observe: gets every row of the log, in the first process; of a run that goes on, those from
            there.
        out: folder for ``checkpoint.safetensors``, ``log.jsonl`` and ``run.json``, which all
            processes see and the first one writes to; None: nothing is written.
        configuration: what else tells this run from another; JSON.
        progress: show a bar on standard error; None: after two seconds, on a terminal or
            in a notebook.

    Raises:
        ImportError: accelerate is missing; names the pip command.
        ValueError: fewer samples than a batch, a batch that the processes can't share, an ``out``
            that holds another run or files that do not belong together (the message names the
            one), or that another training uses now, a loss that is no finite number (the message
            says the step), ``patience`` without ``best``, a ``best`` that is no number of the
            evaluation.
        FileNotFoundError: a file of the run in ``out`` is missing.
        OSError: nothing can be written to ``out``, or another process of the run has ended; the
            last checkpoint stays.
    """
    settings = settings or TrainingSettings()
    check_count("patience", patience, 1, optional=True)
    check(patience is None or best is not None, "patience: say with best= which number counts")
    can_judge = best is None or evaluate is not None
    check(can_judge, f"best: {best!r} is a number of an evaluation; give evaluate=")
    accelerator = accelerator_of(settings, partial)
    processes, size = accelerator.num_processes, settings.batch_size
    can_share = best is None or out is not None or processes == 1
    check(can_share, "best: several processes share the best weights through out=; give it")
    schedule = Schedule(dataset, settings)
    is_even = size % processes == 0
    check(is_even, f"batch_size: {processes} processes can't share {size} samples evenly")
    if optimizer is None:
        optimizer = torch.optim.SGD(
            network.parameters(),
            settings.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )
    described = {
        **identity_of(network, dataset, optimizer, settings, accelerator),
        **({} if best is None else {"best": best, "patience": patience}),
        **(configuration or {}),
    }
    run = _Run(
        network,
        optimizer,
        accelerator,
        schedule,
        evaluate=evaluate,
        best=best,
        patience=patience,
        observe=observe,
        out=None if out is None else Path(out),
        progress=progress,
    )
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with together() as run.wait, sole_user(run.out if run.is_first else None):
        resumed_from = run.open(described)
        # Evaluation puts the modes back; a step trains in training mode.
        with evaluation(network), flags, run.interrupts:
            run.train(dataset, loss)
    return TrainingResult(schedule.steps, run.log.rows, resumed_from)


@dataclass
class _Run:
    """One call of :func:`fit`, from the opening of its folder to its last weights."""

    network: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    schedule: Schedule
    evaluate: Evaluate | None
    best: str | None
    patience: int | None
    observe: Observe | None
    out: Path | None
    progress: bool | None
    step: int = 0
    """The number of steps that are done."""
    log: Log = field(default_factory=lambda: Log(None, 0))
    unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)
    """Rows whose losses are still on the device."""
    last_loss: float = math.nan
    saved_at: float = -math.inf
    """By the clock of :func:`time.monotonic`; minus infinity: there is no checkpoint yet."""
    best_weights: dict[str, Tensor] | None = None
    """They are kept here where there is no folder."""
    interrupts: Interrupts = field(default_factory=Interrupts)
    id: str = ""
    """Of the run, in its files."""
    wait: Callable[[], object] = lambda: None
    """Waits for all processes; see :func:`captum_robust._processes.together`."""

    def open(self, configuration: Mapping[str, Any]) -> int:
        """Begin in the folder, or go on from its checkpoint; return the number of steps done."""
        if self.out is None:
            return 0
        check_folder(self.out)
        is_known = has_begun(self.out / "run.json", configuration)
        if is_known and self._file("checkpoint").is_file():
            self.step = load_checkpoint(
                self._file("checkpoint"), self.network, self.optimizer, self.schedule.steps
            )
            self.saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.is_first:
            self._open_files(configuration, is_known)
        return self.step

    def _open_files(self, configuration: Mapping[str, Any], is_known: bool) -> None:
        """Take up the log and the id of the run; a folder with a wrong file is left as it is."""
        assert self.out is not None
        record, log = self.out / "run.json", self.out / "log.jsonl"
        self.id = run_id(record) if is_known else secrets.token_hex(8)
        goes_on = not math.isinf(self.saved_at)
        if goes_on:
            self.log.rows = check_log(log, self._file("checkpoint"), self.id, self.step)
            self._check_best()
        else:
            check_not_begun(self.out, is_known)
        remove_parts(self.out)
        if not is_known:
            versions = {p: version(p) for p in ("captum-robust", "torch", "accelerate")}
            run = {"configuration": dict(configuration), "versions": versions, "id": self.id}
            write_whole(record, json.dumps(run, indent=1) + "\n")
        # A run that was killed before its first checkpoint begins again.
        self.log = Log(log, self.step if goes_on else -1, len(self.log.rows))

    def _check_best(self) -> None:
        """Refuse best weights that are not those of the log at once, not after the last step."""
        scored = self._scored()
        if self.best is not None and scored:
            steps = [row["step"] for row in self.log.rows if self.best in row]
            best_step = steps[scored.index(min(scored))]
            check_best(self._file("best"), self.network, self.id, self.step, best_step)

    def train(self, dataset: Dataset[Any], loss: Loss) -> None:
        """Take the steps that are left; the network ends with its last or its best weights."""
        network, optimizer = self.accelerator.prepare(self.network, self.optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        try:
            self._take_steps(network, optimizer, dataset, loss)
        except Interrupted:
            self._read_losses()
            if not math.isinf(self.saved_at):
                self._save()
            raise
        self._take_best()

    def _take_steps(
        self, network: nn.Module, optimizer: Any, dataset: Dataset[Any], loss: Loss
    ) -> None:
        settings, total = self.schedule.settings, self.schedule.steps
        every = settings.evaluate_every or self.schedule.per_epoch
        # A run that was interrupted in an evaluation has that still to come.
        is_due = self.step % every == 0 or self.step == total
        here = [row for row in self.log.rows if row["step"] == self.step and "loss" not in row]
        is_missing = self._first_says(self.evaluate is not None and is_due and not here)
        if is_missing:
            self._evaluate()
        if is_missing or math.isinf(self.saved_at):
            self._save()
        shown = self.progress and self.is_first
        bar = progress_bar(total, "step", shown, "training", self.step)
        with bar as advance, closing(self._batches(dataset)) as batches:
            for batch in () if self._is_at_rest() else batches:
                on_device = tuple(t.to(self.accelerator.device) for t in batch)
                self._one_step(network, optimizer, on_device, loss)
                advance(1)
                ends = self.step == total
                if ends or self.step % every == 0:
                    self._evaluate()
                    ends = ends or self._is_at_rest()
                if ends or self.step % _READ_EVERY == 0:
                    self._read_losses()
                    advance.doing(f"loss={self.last_loss:.3f}")
                    waited = time.monotonic() - self.saved_at
                    if ends or self._first_says(waited >= settings.checkpoint_every):
                        self._save()
                    # One process stops at its next batch; several have to stop at the same.
                    if not self._is_alone and self._first_says(self.interrupts.is_pending):
                        raise Interrupted
                if ends:
                    break

    def _batches(self, dataset: Dataset[Any]) -> Generator[Batch, None, None]:
        """Yield what is left; a run of one process may be stopped while it waits for them."""
        shares = self.accelerator.process_index, self.accelerator.num_processes
        with closing(self.schedule.batches(dataset, self.step, *shares)) as batches:
            while True:
                with self.interrupts.allowed(self._is_alone):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def _one_step(self, network: nn.Module, optimizer: Any, batch: Batch, loss: Loss) -> None:
        settings, step = self.schedule.settings, self.step
        rate = self.schedule.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        shares = self.accelerator.process_index, self.accelerator.num_processes
        parts = [*parts_of(batch, settings.seed, settings.micro_batch_size, *shares, step)]
        values = take_step(self.accelerator, network, optimizer, loss, parts, settings.precision)
        row = {
            "step": step + 1,
            "epoch": step // self.schedule.per_epoch + 1,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        self.unread.append((row, values))
        self.step += 1

    def _read_losses(self) -> None:
        """Write the losses since the last look.

        Raises:
            ValueError: one is no finite number.
        """
        if not self.unread:
            return
        names = list(self.unread[0][1])
        numbers = torch.stack([values[name] for _, values in self.unread for name in names])
        numbers = self.accelerator.reduce(numbers.float().reshape(-1, len(names)), "mean")
        rows = [
            {**row, **dict(zip(names, values, strict=True))}
            for (row, _), values in zip(self.unread, numbers.tolist(), strict=True)
        ]
        self.unread = []
        for row in rows:
            loss, step = row["loss"], row["step"]
            check(math.isfinite(loss), f"loss: {loss} in step {step}; try a smaller learning rate")
        self._add(rows)
        self.last_loss = rows[-1]["loss"]

    def _evaluate(self) -> None:
        self._read_losses()
        if self.evaluate is None:
            return
        self._check_weights()
        if self.is_first:
            self.network.eval()
            seed = derived_seed(self.schedule.settings.seed, "evaluation")
            interruptible = self.interrupts.allowed(self._is_alone)
            with seeded(seed, self.accelerator.device), interruptible:
                row = {"step": self.step, **self.evaluate(self.network)}
            self._keep_best(row)
            self._add([row])
        self.wait()

    def _check_weights(self) -> None:
        """Refuse to judge or save what the last step broke: its loss was from before that.

        Raises:
            ValueError: a weight is no finite number.
        """
        finite = torch.stack([p.detach().isfinite().all() for p in self.network.parameters()])
        trouble = f"weights: NaN or infinity after step {self.step}; try a smaller learning rate"
        check(finite.all(), trouble)

    def _add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.is_first:
            self.log.add(rows)
            if self.observe is not None:
                self.observe(rows)

    def _scored(self, first_step: int = 0) -> list[float]:
        """Return the number that counts of each evaluation so far; NaN counts as the worst."""
        rows = [r for r in self.log.rows if r["step"] >= first_step]
        numbers = [r[self.best] for r in rows if self.best in r]
        return [math.inf if math.isnan(x) else x for x in numbers]

    def _keep_best(self, row: Mapping[str, Any]) -> None:
        """Keep the best weights before the log has their row: a run killed between repeats it."""
        if self.best is None:
            return
        is_there = self.best in row
        check(is_there, f"best: {self.best!r} is none of the evaluation's {sorted(row)}")
        earlier = self._scored()
        if earlier and not row[self.best] < min(earlier):
            return
        weights = self.network.state_dict()
        if self.out is None:
            self.best_weights = {name: t.detach().clone() for name, t in weights.items()}
        else:
            write_state(self._file("best"), weights, {"step": str(self.step), "run": self.id})

    def _take_best(self) -> None:
        if self.best is None:
            return
        self.accelerator.wait_for_everyone()
        weights = self.best_weights
        if self.out is not None and self._file("best").is_file():
            weights = read_tensors(self._file("best"))[0]
        if weights is not None:
            self.network.load_state_dict(weights)

    def _is_at_rest(self) -> bool:
        """Whether the number that counts has not improved in training for as long as was said."""
        if self.patience is None:
            return False
        scored = self._scored(first_step=1)
        rest = len(scored) - 1 - scored.index(min(scored)) if scored else 0
        return self._first_says(rest >= self.patience)

    def _save(self) -> None:
        """Write a checkpoint; the losses before it are read, so a run that goes on has them all."""
        self._check_weights()
        if self.is_first and self.out is not None:
            save_checkpoint(
                self._file("checkpoint"),
                self.network,
                self.optimizer,
                self.step,
                self.id,
                self.log.rows,
            )
        self.saved_at = time.monotonic()

    @property
    def is_first(self) -> bool:
        """Whether this process evaluates and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def _is_alone(self) -> bool:
        return bool(self.accelerator.num_processes == 1)

    def _first_says(self, answer: bool) -> bool:
        """Return the answer of the first process, which all go by."""
        flag = torch.tensor(float(answer and self.is_first), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _file(self, name: str) -> Path:
        assert self.out is not None
        return self.out / f"{name}.safetensors"


def bare_module(network: nn.Module) -> nn.Module:
    """Return the network without the wrapper that several processes put around it."""
    is_wrapped = isinstance(network, DistributedDataParallel)
    bare: nn.Module = network.module if is_wrapped else network  # type: ignore[assignment]
    return bare
