"""What TensorBoard shows of a training while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class Board:
    """Losses, numbers and masks for TensorBoard, as they come.

    Args:
        folder: where they go.
        pictures: what to show of an evaluation, 3×H×W each; None: nothing.

    Raises:
        ImportError: tensorboard is missing; names the pip command.
    """

    def __init__(self, folder: Path, pictures: Callable[[], Sequence[Tensor]] | None) -> None:
        try:
            import tensorboard  # type: ignore[import-untyped]  # noqa: F401
        except ImportError:
            raise ImportError(
                'the board needs the package tensorboard: pip install "captum-robust[train]"'
            ) from None
        self.folder, self.pictures = folder, pictures
        self._writer: Any = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write new rows of the log."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None and rows:
            # What a killed run wrote later than its checkpoint is written again.
            self._writer = SummaryWriter(self.folder, purge_step=rows[0]["step"])
        for row in rows:
            group = "training" if "loss" in row else "validation"
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])
            if group == "validation" and self.pictures is not None:
                for number, picture in enumerate(self.pictures()):
                    self._writer.add_image(f"masks/{number}", picture.clamp(0, 1), row["step"])
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
