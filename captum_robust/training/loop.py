"""One loop for every network that this package trains."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from captum_robust._checks import check_count
from captum_robust._contexts import evaluation, seeded, seeded_elsewhere
from captum_robust._files import read_tensors, write_tensors, write_whole
from captum_robust.training.checkpoints import (
    Log,
    has_begun,
    load_checkpoint,
    save_checkpoint,
)
from captum_robust.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch, int], Tensor | Mapping[str, Tensor]]
"""(network, batch, seed of what this step draws) -> the mean loss of the batch, a number; or named
numbers, one of them ``"loss"``, that are all logged."""
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
    progress: bool = False,
) -> TrainingResult:
    """Train a network in place; started again with the same arguments, a killed run goes on.

    On the CPU it ends with exactly the weights of an undisturbed run, as on CUDA where the layers'
    kernels are deterministic. What is drawn depends on the seed and the step or image only: the
    order of the images, what ``dataset`` draws from torch, NumPy or ``random`` for an image, what
    the network draws in a step.

    Under ``accelerate launch`` or ``torchrun`` each process takes its share of every batch.

    Args:
        network: trained in training mode; a checkpoint in ``out`` replaces its weights. Modes are
            put back at the end.
        dataset: of tuples of tensors or numbers, all of one shape; the first is the image.
        loss: see :data:`Loss`. The network may be wrapped for several processes;
            :func:`bare_module` undoes that.
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
        progress: show a bar.

    Raises:
        ImportError: accelerate is missing; names the pip command.
        ValueError: fewer samples than a batch, a batch that the processes can't share, an ``out``
            that holds another run, a loss that is no finite number (the message says the step),
            ``patience`` without ``best``, a ``best`` that is no number of the evaluation.
        OSError: nothing can be written to ``out``; the last checkpoint stays.
    """
    settings = TrainingSettings() if settings is None else settings
    if patience is not None:
        check_count("patience", patience, 1)
        if best is None:
            raise ValueError("patience: say with best= which number counts")
    if best is not None and evaluate is None:
        raise ValueError(f"best: {best!r} is a number of an evaluation; give evaluate=")
    accelerator = _accelerator(settings, partial)
    if best is not None and out is None and accelerator.num_processes > 1:
        raise ValueError("best: several processes share the best weights through out=; give it")
    count = check_dataset(dataset, settings)
    if settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size: {accelerator.num_processes} processes can't share {settings.batch_size} "
            "samples evenly"
        )
    if optimizer is None:
        optimizer = torch.optim.SGD(
            network.parameters(),
            settings.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )
    described = {
        **_described(settings, accelerator),
        "data": _fingerprint(dataset, settings.seed),
        "network": f"{type(network).__name__} {_shapes(network)}",
        "optimizer": _described_optimizer(optimizer),
        **({} if best is None else {"best": best, "patience": patience}),
        **(configuration or {}),
    }
    folder = None if out is None else Path(out)
    run = _Run(network, optimizer, accelerator, settings, folder, count, progress)
    run.best, run.patience, run.observe = best, patience, observe
    resumed_from = run.open(described)
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with evaluation(network), flags:  # puts the modes back; a step trains in training mode
        run.train(dataset, loss, evaluate)
    return TrainingResult(run.steps, run.log.rows, resumed_from)


class _Run:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        settings: TrainingSettings,
        out: Path | None,
        count: int,
        progress: bool,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.settings = settings
        self.out = out
        self.count = count
        self.progress = progress
        self.is_first = bool(accelerator.is_main_process)
        self.per_epoch = count // settings.batch_size
        self.steps = self.per_epoch * settings.epochs
        self.step = 0
        self.log = Log(None, 0)
        self.unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.last_loss = math.nan
        self.saved_at: float | None = None
        """None: never."""
        self.best: str | None = None
        self.patience: int | None = None
        self.observe: Observe | None = None
        self.best_weights: dict[str, Tensor] | None = None
        """Of a run without a folder."""

    def open(self, configuration: Mapping[str, Any]) -> int:
        """Begin in the folder, or go on from its checkpoint: the number of steps done."""
        if self.out is None:
            return 0
        is_known = has_begun(self.out / "run.json", configuration)
        if is_known and self._checkpoint.is_file():
            self.step = load_checkpoint(self._checkpoint, self.network, self.optimizer)
            self.saved_at = time.monotonic()
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            if not is_known:
                versions = {p: version(p) for p in ("captum-robust", "torch", "accelerate")}
                run = {"configuration": dict(configuration), "versions": versions}
                write_whole(self.out / "run.json", json.dumps(run, indent=1) + "\n")
            # A run that was killed before its first checkpoint begins again.
            self.log = Log(self.out / "log.jsonl", -1 if self.saved_at is None else self.step)
        return self.step

    @property
    def _checkpoint(self) -> Path:
        assert self.out is not None
        return self.out / "checkpoint.safetensors"

    def train(self, dataset: Dataset[Any], loss: Loss, evaluate: Evaluate | None) -> None:
        network, optimizer = self.accelerator.prepare(self.network, self.optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.saved_at is None:
            self._evaluate(evaluate)
            self._save()
        with self._bar() as bar:
            for batch in () if self._is_at_rest() else self._batches(dataset):
                self._one_step(network, optimizer, batch, loss)
                bar.update()
                is_last = self.step == self.steps
                stops = False
                if is_last or self.step % (self.settings.evaluate_every or self.per_epoch) == 0:
                    self._evaluate(evaluate)
                    stops = self._is_at_rest()
                if stops or is_last or self.step % _READ_EVERY == 0:
                    self._read_losses()
                    bar.set_postfix(loss=f"{self.last_loss:.3f}")
                    if stops or is_last or self._is_due():
                        self._save()
                if stops:
                    break
        self._take_best()

    def _bar(self) -> Any:
        from tqdm import tqdm

        hidden = not (self.progress and self.is_first)
        return tqdm(total=self.steps, initial=self.step, unit="step", disable=hidden)

    def _batches(self, dataset: Dataset[Any]) -> Iterator[Batch]:
        """This process's share of each batch that is left, on its device."""
        settings, process = self.settings, self.accelerator.process_index
        share = settings.batch_size // self.accelerator.num_processes
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.per_epoch)
            generator = torch.Generator().manual_seed(_derived(settings.seed, "order", epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
            starts = [
                b * settings.batch_size + process * share for b in range(first, self.per_epoch)
            ]
            yield from self._moved(
                DataLoader(
                    _SeededItems(dataset, settings.seed, epoch),
                    batch_sampler=[order[start : start + share] for start in starts],
                    num_workers=settings.workers,
                    generator=generator,  # else it draws from torch's global one
                )
            )

    def _moved(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for batch in loader:
            tensors = batch if isinstance(batch, (list, tuple)) else [batch]
            yield tuple(t.to(self.accelerator.device) for t in tensors)

    def _one_step(self, network: nn.Module, optimizer: Any, batch: Batch, loss: Loss) -> None:
        rate = _rate(self.step, self.steps, self.settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        device = self.accelerator.device
        number = self.step, self.accelerator.process_index
        seed = _derived(self.settings.seed, "step", *number)
        network.train()
        with seeded(seed, device):
            # The cache would hand weights that were cast without gradients, as an attack may do,
            # to a pass that needs them.
            with torch.autocast(
                device.type,
                torch.bfloat16,
                enabled=self.settings.precision == "bfloat16",
                cache_enabled=False,
            ):
                found = loss(network, batch, seed)
            values = dict(found) if isinstance(found, Mapping) else {"loss": found}
            _check_numbers(values)
            optimizer.zero_grad()
            self.accelerator.backward(values["loss"])
            optimizer.step()
        row = {
            "step": self.step + 1,
            "epoch": self.step // self.per_epoch + 1,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        self.unread.append((row, {name: v.detach().reshape(()) for name, v in values.items()}))
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
            if not math.isfinite(row["loss"]):
                raise ValueError(
                    f"loss: {row['loss']} in step {row['step']}; try a smaller learning rate"
                )
        self._add(rows)
        self.last_loss = rows[-1]["loss"]

    def _evaluate(self, evaluate: Evaluate | None) -> None:
        self._read_losses()
        if evaluate is None:
            return
        self._check_weights()
        if self.is_first:
            self.network.eval()
            with seeded(_derived(self.settings.seed, "evaluation"), self.accelerator.device):
                row = {"step": self.step, **evaluate(self.network)}
            self._keep_best(row)
            self._add([row])
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Refuse to judge or save what the last step broke: its loss was from before that.

        Raises:
            ValueError: a weight is no finite number.
        """
        found = [p.detach().isfinite().all() for p in self.network.parameters()]
        if not bool(torch.stack(found).all()):
            raise ValueError(
                f"weights: NaN or infinity after step {self.step}; try a smaller learning rate"
            )

    def _add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.is_first:
            self.log.add(rows)
            if self.observe is not None:
                self.observe(rows)

    def _scored(self, first_step: int = 0) -> list[float]:
        """The number that counts of each evaluation so far; NaN counts as the worst."""
        rows = [r for r in self.log.rows if r["step"] >= first_step]
        found = [r[self.best] for r in rows if self.best in r]
        return [math.inf if math.isnan(x) else x for x in found]

    def _keep_best(self, row: Mapping[str, Any]) -> None:
        """Before the log tells of them: a run that is killed in between does it again."""
        if self.best is None:
            return
        if self.best not in row:
            raise ValueError(f"best: {self.best!r} is none of the evaluation's {sorted(row)}")
        earlier = self._scored()
        if earlier and not row[self.best] < min(earlier):
            return
        weights = self.network.state_dict()
        if self.out is None:
            self.best_weights = {name: t.detach().clone() for name, t in weights.items()}
        else:
            write_tensors(self._best_file, weights, {"step": str(self.step)})

    @property
    def _best_file(self) -> Path:
        assert self.out is not None
        return self.out / "best.safetensors"

    def _is_at_rest(self) -> bool:
        """Whether the number that counts has not improved in training for as long as was said."""
        if self.patience is None:
            return False
        scored = self._scored(first_step=1)
        late = bool(scored) and len(scored) - 1 - scored.index(min(scored)) >= self.patience
        flag = torch.tensor(float(late and self.is_first), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _take_best(self) -> None:
        if self.best is None:
            return
        self.accelerator.wait_for_everyone()
        weights = self.best_weights
        if self.out is not None and self._best_file.is_file():
            weights = read_tensors(self._best_file)[0]
        if weights is not None:
            self.network.load_state_dict(weights)

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint by the clock of the first process."""
        assert self.saved_at is not None
        late = time.monotonic() - self.saved_at >= self.settings.checkpoint_every
        flag = torch.tensor(float(late and self.is_first), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _save(self) -> None:
        """The losses so far are read, so that a run that goes on from here has them all."""
        self._check_weights()
        if self.is_first and self.out is not None:
            save_checkpoint(self._checkpoint, self.network, self.optimizer, self.step)
        self.saved_at = time.monotonic()


def bare_module(network: nn.Module) -> nn.Module:
    """The network without the wrapper that several processes put around it."""
    if isinstance(network, DistributedDataParallel):
        bare: nn.Module = network.module
        return bare
    return network


def training_device(settings: TrainingSettings) -> torch.device:
    """Where :func:`fit` trains."""
    device: torch.device = _accelerator(settings).device
    return device


def _accelerator(settings: TrainingSettings, partial: bool = False) -> Accelerator:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState
    except ImportError:
        raise ImportError(
            'training needs the package accelerate: pip install "captum-robust[train]"'
        ) from None
    cpu = settings.device == "cpu"
    # Accelerate keeps the device of a process's first training for all others.
    kept = PartialState._shared_state
    is_other = kept and (kept["device"].type != "cpu" if cpu else kept["_cpu"])
    if is_other and kept["num_processes"] == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    # Its own mixed precision would rewrite the network's forward method.
    return Accelerator(
        mixed_precision="no",
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partial)],
    )


class _SeededItems(Dataset[Any]):
    """What the data set draws for an item depends on seed, epoch and item only."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        seed = _derived(self.seed, "item", self.epoch, index)
        with seeded(seed, None), seeded_elsewhere(seed):
            return self.dataset[index]


def _derived(seed: int, *parts: object) -> int:
    """A seed of its own for each purpose, from 0 to 2⁶³ - 1."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _rate(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate in a step; steps count from 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def check_dataset(dataset: Dataset[Any], settings: TrainingSettings) -> int:
    """The number of samples, where they fill a batch.

    Raises:
        TypeError: a data set without a length.
        ValueError: fewer samples than a batch.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"dataset: expected one with a length, got {type(dataset).__name__}"
        ) from None
    if count < settings.batch_size:
        raise ValueError(f"batch_size: {settings.batch_size}, but there are {count} samples")
    return count


def _fingerprint(dataset: Any, seed: int) -> str:
    """Number of samples and a checksum of 16 of them: enough to notice another data set."""
    count = len(dataset)
    checksum = 0
    items = _SeededItems(dataset, seed, 0)
    for index in sorted({i * (count - 1) // 15 for i in range(16)}):
        item = items[index]
        for part in item if isinstance(item, (list, tuple)) else [item]:
            array = torch.as_tensor(part).detach().cpu().contiguous().numpy()
            checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{count} samples {checksum:08x}"


def _shapes(network: nn.Module) -> str:
    """A checksum of names and shapes."""
    shapes = {name: list(t.shape) for name, t in network.state_dict().items()}
    return f"{zlib.crc32(json.dumps(shapes).encode()):08x}"


def _described(settings: TrainingSettings, accelerator: Accelerator) -> dict[str, Any]:
    facts = asdict(settings)
    for name in ("workers", "checkpoint_every", "device"):  # the weights do not depend on these
        del facts[name]
    device: torch.device = accelerator.device
    return {**facts, "device": device.type, "processes": accelerator.num_processes}


def _described_optimizer(optimizer: Optimizer) -> str:
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}  # "lr" may be what a schedule left
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups}"


def _check_numbers(values: Mapping[str, Any]) -> None:
    if "loss" not in values:
        raise ValueError(f'loss: expected a number named "loss" among {sorted(values)}')
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected one number, got {got}")
