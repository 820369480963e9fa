"""Refusals, each one line in one dialect: "name: expected …, got …"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Count = TypeVar("Count", int, int | None)
_LONGEST = 2000
"""Characters of a refusal."""
MOST_COUNT = 2**63 - 1
"""Torch takes no larger whole number."""


def check(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` with the message, see :func:`refusal`, unless the condition holds."""
    if not condition:
        raise error(refusal(message))


def check_type(name: str, value: object, kinds: Any, expected: str) -> None:
    """``TypeError`` that says what was expected and the type that came."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_callable(name: str, value: object, *, optional: bool = False) -> None:
    """``TypeError`` for what is no function (or None where that is allowed)."""
    expected = "a function or None" if optional else "a function"
    check_type(name, value, Callable | None if optional else Callable, expected)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """``ValueError`` that lists the choices and the nearest of them."""
    known = list(choices)
    is_many = bool(getattr(value, "shape", ()))  # what a tensor or an array equals is many
    if is_many or value not in known:
        raise unknown_name(name, value, map(str, known))


def known_name(what: str, name: Any, choices: Iterable[str]) -> str:
    """The one of the choices that a name means, in capitals or not, with any marks between words.

    Raises:
        ValueError: it is none of them, or may be several.

    >>> known_name("method", "Grad-CAM++", ["grad_cam", "grad_cam_plus_plus"])
    'grad_cam_plus_plus'
    """
    known = list(choices)
    if not isinstance(name, str) or name in known:
        check_choice(what, name, known)
        return str(name)
    for times in ("x", ""):  # "Input × Gradient", "perceptual ball × CAM"
        meant = [own for own in known if letters(own) == letters(name.replace("×", times))]
        check(len(meant) < 2, f"{what}: {name!r} may be {' or '.join(map(repr, meant))}")
        if meant:
            return meant[0]
    raise unknown_name(what, name, known)


def letters(name: str) -> str:
    """The letters and digits of a name in lower case.

    >>> letters("Grad-CAM++")
    'gradcamplusplus'
    """
    return "".join(c for c in name.lower().replace("+", "plus") if c.isalnum())


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """The finite number from ``low`` to ``high``, either of which may be excluded.

    >>> check_number("share", 1, 0, 1)
    1.0
    >>> check_number("share", 1, 0, 1, open_high=True)
    Traceback (most recent call last):
        ...
    ValueError: share: expected a number in [0, 1), got 1
    """
    number = math.nan if isinstance(value, bool) else as_number(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    expected = _range(low, high, open_low, open_high)
    is_inside = above and below and math.isfinite(number)
    check(is_inside, f"{name}: expected {expected}, got {value!r}")
    return number


def _range(low: float, high: float, open_low: bool, open_high: bool) -> str:
    if high == math.inf:
        if low == -math.inf:
            return "a finite number"
        if low == 0 and open_low:
            return "a positive number"
        return f"a number {'above' if open_low else 'from'} {low:g}"
    return f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


def check_shape(name: str, value: Any, shape: str) -> None:
    """Hold a tensor to a shape such as ``"N×3×H×W"``: letters stand for any length.

    A letter that comes twice stands for one length.

    >>> import torch
    >>> check_shape("maps", torch.zeros(2, 4, 4), "N×H×W")
    >>> check_shape("boxes", torch.zeros(2, 3), "M×4")
    Traceback (most recent call last):
        ...
    ValueError: boxes: expected M×4, got 2×3
    """
    from torch import Tensor

    check_type(name, value, Tensor, f"a tensor {shape}")
    lengths: dict[str, int] = {}
    parts = shape.split("×")
    fits = value.ndim == len(parts) and all(
        length == (int(part) if part.isdigit() else lengths.setdefault(part, length))
        for part, length in zip(parts, value.shape, strict=True)
    )
    got = "×".join(map(str, value.shape)) or "a single number"
    check(fits, f"{name}: expected {shape}, got {got}")


def shape_or_type(value: object) -> tuple[int, ...] | str:
    """What a message says that it got: the shape of a tensor, else the name of the type."""
    from torch import Tensor

    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def as_number(value: object) -> float:
    """NaN for what is no number, which fails each comparison as NaN does."""
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor of many
        return math.nan


def as_levels(text: object) -> float:
    """A strength in levels of an 8-bit image, from 8, "8" or "8/255"; NaN for what is no number.

    >>> as_levels("8"), as_levels("8/255"), as_levels("0.03/1")
    (8.0, 8.0, nan)
    """
    number, slash, levels = str(text).partition("/")
    try:
        return float(number) if not slash or float(levels) == 255 else math.nan
    except ValueError:
        return math.nan


def whole_numbers(given: Any) -> list[int] | None:
    """The numbers of a list, an array or a 1-D tensor; None where one is not whole.

    >>> whole_numbers((3, 1)), whole_numbers([0.5]), whole_numbers([True]), whole_numbers("12")
    ([3, 1], None, None, None)
    """
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        return None
    numbers = list(listed)
    is_whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
    return [int(n) for n in numbers] if is_whole else None


def check_count(
    name: str, value: Count, least: int = 0, most: float = MOST_COUNT, *, optional: bool = False
) -> Count:
    """The whole number from ``least`` to ``most``, or None where that is allowed.

    >>> check_count("bits", 17, 1, 16)
    Traceback (most recent call last):
        ...
    ValueError: bits: expected a whole number from 1 to 16, got 17
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    limits = f"from {least}" if most == MOST_COUNT else f"from {least} to {most}"
    or_none = ", or None" if optional else ""
    is_none = optional and value is None
    got = repr(value)[:200]
    check(is_count or is_none, f"{name}: expected a whole number {limits}{or_none}, got {got}")
    return value


def check_finite(tensor: Tensor, where: str, first_sample: int = 0) -> None:
    """Raise ``ValueError`` if a sample (a row of the first dimension) holds NaN or infinity.

    ``first_sample`` is the number of the first row in the caller's batch.
    """
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    rows = tensor.detach().reshape(tensor.shape[0], -1)
    # A sum is the quickest that passes NaN and infinity on; one that is finite shows that all are.
    precise = torch.float32 if tensor.element_size() < 4 else None
    if torch.isfinite(rows.sum(dim=1, dtype=precise)).all():
        return
    finite = torch.isfinite(rows.amin(dim=1)) & torch.isfinite(rows.amax(dim=1))
    if not finite.all():
        wrong = (~finite).nonzero().flatten().tolist()
        share = f"{len(wrong)} of {len(finite)} samples"
        raise ValueError(f"{where}: NaN or infinity in sample {first_sample + wrong[0]} ({share})")


def check_batch(inputs: tuple[Tensor, ...]) -> int:
    """The batch size of finite, non-empty inputs; ``TypeError`` or ``ValueError`` otherwise."""
    from torch import Tensor

    for i, x in enumerate(inputs):
        got = f"{type(x).__name__} at position {i}"
        check(isinstance(x, Tensor), f"inputs: expected tensors, got {got}", TypeError)
        check(
            not x.is_meta, f"inputs: expected numbers, got none at position {i}: on meta", TypeError
        )
        check(x.ndim > 0 and len(x) > 0, f"inputs: the batch is empty (shape {tuple(x.shape)})")
        check_finite(x, "inputs")
    return int(inputs[0].shape[0])


def check_classes(classes: Tensor, n: int, count: int) -> None:
    """Before they are indices, of which a wrong one ends all work on a GPU."""
    import torch

    is_index = getattr(classes, "dtype", None) in (torch.int32, torch.int64)
    is_index = is_index and not classes.is_meta
    _check_tensor("classes", classes, is_index, "integers")
    got = tuple(classes.shape)
    check(got == (n,), f"classes: expected one for each of {n} images, got {got}")
    check_numbers_below("classes", classes, count)


def check_numbers_below(name: str, numbers: Tensor, count: int) -> int:
    """The highest of integers from 0 to ``count`` - 1, before they are indices; -1 of none."""
    import torch

    if numbers.numel() == 0:
        return -1
    lowest, highest = torch.stack(numbers.aminmax()).tolist()  # waits for a GPU, once a call
    wrong = lowest if lowest < 0 else highest
    check(0 <= wrong < count, f"{name}: expected numbers from 0 to {count - 1}, got {wrong}")
    return int(highest)


def checked_bounds(bounds: Any, name: str = "bounds") -> tuple[float, float]:
    """Two finite numbers, the lower one first; inputs without bounds have None instead."""
    numbers = [as_number(b) for b in bounds] if isinstance(bounds, (tuple, list)) else []
    # Their distance is finite too, which attacks measure by.
    if len(numbers) != 2 or not 0 < numbers[1] - numbers[0] < math.inf:
        expected = "two finite numbers (lowest, highest), or None where there are no bounds"
        raise ValueError(f"{name}: expected {expected}, got {bounds!r}")
    return numbers[0], numbers[1]


def checked_device(device: Any) -> torch.device:
    """The device of a name or of itself, the argument ``device``; ``ValueError`` for others."""
    import torch

    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        expected = "the name of a device, such as 'cpu' or 'cuda:0'"
        raise ValueError(f"device: expected {expected}, got {device!r}") from None


def check_inputs(inputs: tuple[Tensor, ...], bounds: tuple[float, float] | None) -> None:
    """Floating point, batches of one size, within the bounds but for a millionth of their width.

    That far arithmetic moves what was within them; clip it.
    """
    n = len(inputs[0])
    for i, x in enumerate(inputs):
        got = f"{x.dtype} at position {i}"
        check(x.is_floating_point(), f"inputs: expected floating point, got {got}", TypeError)
        check(len(x) == n, f"inputs: batches of {n} and {len(x)} samples")
        check(x[0].numel() > 0, f"inputs: no elements (shape {tuple(x.shape)})")
    if bounds is None:
        return
    lowest, highest = bounds
    slack = 1e-6 * (highest - lowest)
    for x in inputs:
        rows = x.detach().reshape(n, -1)
        low, high = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        outside = (low < lowest - slack) | (high > highest + slack)
        if outside.any():
            sample = int(outside.nonzero()[0])
            values = f"values from {float(low[sample]):.7g} to {float(high[sample]):.7g}"
            raise ValueError(
                f"inputs: sample {sample} has {values}, outside of the bounds {bounds}"
            )


def printable(text: str) -> str:
    r"""The text on one line, with what is not UTF-8 or not printable in a file name written out.

    A terminal obeys some of the latter: a name could colour or hide what is around it.

    >>> printable("a\udcff.png\n is torn")
    'a\\xff.png is torn'
    >>> printable("\x1b[31mred.png")
    '\\x1b[31mred.png'
    """
    return printable_lines(" ".join(text.split()))


def printable_lines(text: str) -> str:
    r"""The same of a text of several lines, which keeps them and its spaces.

    >>> printable_lines("a  b\x1b[2J\n  c\u2028d")
    'a  b\\x1b[2J\n  c\\u2028d'
    """
    known = ("\n", "\N{NO-BREAK SPACE}")
    return "".join(
        c if c.isprintable() or c in known else c.encode("unicode_escape").decode()
        for c in valid_unicode(text)
    )


def refusal(message: str) -> str:
    """The message of an error as :func:`printable` makes it, of at most 2,000 characters.

    Of a longer one, such as one that quotes a damaged file, the middle is left out.

    >>> len(refusal("9" * 3_000_000))
    2000
    """
    return _shortened(printable(_shortened(message)))  # short first: the file may be large


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 3]} … {text[-half:]}"


def valid_unicode(text: str) -> str:
    r"""The text with what UTF-8 cannot hold written out, such as a byte of a file's name.

    >>> valid_unicode("a\udcff\ud800.png")
    'a\\xff\\ud800.png'
    """
    return re.sub("[\ud800-\udfff]", _written_out, text)


def _written_out(surrogate: re.Match[str]) -> str:
    number = ord(surrogate[0])
    # What Python makes of a byte that isn't UTF-8, or half of a character.
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"


def unknown_name(what: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error to raise when ``name`` is none of the ``valid`` names of a ``what``.

    >>> str(unknown_name("method", "robust_can", ["robust_cam", "occlusion"]))
    "method: expected one of occlusion, robust_cam, got 'robust_can'; did you mean 'robust_cam'?"
    >>> str(unknown_name("class", "cat", [*map(str, range(9)), "Egyptian cat", "caravan"]))
    "class: expected one of 11, got 'cat'; did you mean 'Egyptian cat'?"
    >>> str(unknown_name("class", "dog", []))
    "class: expected nothing, for there are none, got 'dog'"
    """
    known, got = sorted(valid), f"got {name!r}"
    if not known:
        return ValueError(refusal(f"{what}: expected nothing, for there are none, {got}"))
    given = str(name)[:_LONGEST]
    near = [n for n in known if given.lower() in re.split(r"[\W_]+", n.lower())]
    near = near or get_close_matches(given, known, n=3, cutoff=0.5)
    near = near or get_close_matches(given.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near[:3])}?" if near else ""
    if len(known) <= 8:
        return ValueError(refusal(f"{what}: expected one of {', '.join(known)}, {got}{hint}"))
    listing = ", ".join(known if len(known) <= 24 else [*known[:24], "…"])
    hint = hint or f" ({listing})"
    return ValueError(refusal(f"{what}: expected one of {len(known)}, {got}{hint}"))


def checked_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a number of pixels, which means a square, or of such a pair.

    >>> checked_size("size", 224)
    (224, 224)
    """
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    check(is_pair, f"{name}: expected a number of pixels or (H, W), got {size!r}")
    for side in pair:
        check_count(name, side, 1)
    return pair[0], pair[1]


def check_floating(name: str, value: object) -> None:
    """``TypeError`` for what is no tensor of floating point."""
    from torch import Tensor

    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    _check_tensor(name, value, is_floating, "floating point")


def check_integers(name: str, value: Any) -> None:
    """``TypeError`` for what is no tensor of integers."""
    import torch

    is_tensor = isinstance(value, torch.Tensor) and value.dtype != torch.bool
    is_integer = is_tensor and not (value.is_floating_point() or value.is_complex())
    _check_tensor(name, value, is_integer, "integers")


def _check_tensor(name: str, value: object, fits: bool, numbers: str) -> None:
    from torch import Tensor

    got = value.dtype if isinstance(value, Tensor) else type(value).__name__
    check(fits, f"{name}: expected a tensor of {numbers}, got {got}", TypeError)
