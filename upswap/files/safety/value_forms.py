"""Values that a pickle makes by a call: ranges, paths, arrays, partial layers. Each has one closed form.

The unpickler hands a file a form for the function that it names. A form keeps what it is called with, and makes the value
once the file has been read: of data alone, without code that the file could choose.
"""

from __future__ import annotations

import collections
import importlib
import math
import os
import pathlib
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ...errors import UntrustedFileError
from .stand_ins import Mark, SafeGlobal

#: What gives the real value of a value that a form was called with.
Opened = Callable[[Any], Any]

# Ranges of characters, which take longer to compile, are counted in the pickle (`pickle_scan`).
_MOST_PATTERN = 10_000


class Form:
    """What a call in a pickle is kept as: its arguments, and the state that is given afterwards."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def made(self, opened: Opened) -> Any:
        """The value. `UntrustedFileError` for arguments that a value of this kind does not have."""
        raise NotImplementedError

    def _refused(self, what: str) -> UntrustedFileError:
        return UntrustedFileError(f"it holds {what} in a form that Python does not write")


class _WithState(Form):
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        """What BUILD reaches, once."""
        if self.state is not None:
            raise UntrustedFileError("it gives one object a state twice")
        self.state = state


class BytesForm(Form):
    """`bytes()`, as empty ones are pickled; others are text that is encoded."""

    def made(self, opened: Opened) -> bytes:
        """As the base class."""
        if self.args:
            raise self._refused("bytes")
        return b""


class RangeForm(Form):
    """`range`."""

    def made(self, opened: Opened) -> range:
        """As the base class."""
        if not all(type(value) is int for value in self.args):
            raise self._refused("a range")
        return range(*self.args)


class SliceForm(Form):
    """`slice` of numbers."""

    def made(self, opened: Opened) -> slice:
        """As the base class."""
        if not all(value is None or type(value) is int for value in self.args):
            raise self._refused("a slice")
        return slice(*self.args)


class PathForm(Form):
    """`pathlib.Path`. One of another kind of system is a pure path here, as it can lead nowhere."""

    windows = False

    def made(self, opened: Opened) -> pathlib.PurePath:
        """As the base class."""
        if not all(type(part) is str and "\0" not in part for part in self.args):
            raise self._refused("a path")
        if self.windows == (os.name == "nt"):
            return pathlib.Path(*self.args)
        return (pathlib.PureWindowsPath if self.windows else pathlib.PurePosixPath)(*self.args)


class WindowsPathForm(PathForm):
    """`pathlib.WindowsPath`."""

    windows = True


class FrozenSetForm(Form):
    """`frozenset`, of a list."""

    def made(self, opened: Opened) -> frozenset[Any]:
        """As the base class."""
        if len(self.args) != 1 or type(self.args[0]) is not list:
            raise self._refused("a frozenset")
        return frozenset(opened(item) for item in self.args[0])


class PatternForm(Form):
    """A compiled regular expression, as `re` itself compiles it; it is matched by nobody until the model does."""

    def made(self, opened: Opened) -> re.Pattern[Any]:
        """As the base class."""
        text, flags = (*self.args, None, None)[:2]
        if not isinstance(text, str | bytes) or type(flags) is not int or len(self.args) != 2:
            raise self._refused("a regular expression")
        if len(text) > _MOST_PATTERN:
            raise UntrustedFileError("it holds a regular expression longer than any model has")
        return re.compile(text, flags & ~int(re.DEBUG))


class NumpyTypeForm(_WithState):
    """A NumPy dtype: a kind of number, its size and byte order."""

    def made(self, opened: Opened) -> Any:
        """As the base class."""
        text = self.args[0] if self.args else None
        state = self.state if isinstance(self.state, tuple) else (3, "=")
        order = state[1] if len(state) > 1 else None
        if not (isinstance(text, str) and re.fullmatch(r"[biufc]\d{1,2}", text) and order in ("<", ">", "|", "=")):
            raise UntrustedFileError("it holds a NumPy type that is no plain number")
        return importlib.import_module("numpy").dtype(order + text)


class NumpyNumberForm(Form):
    """A number from its bytes. NumPy's own function would do more with objects and other types."""

    def made(self, opened: Opened) -> Any:
        """As the base class."""
        kind, data = (*self.args, None, None)[:2]
        if not (isinstance(kind, NumpyTypeForm) and isinstance(data, bytes)):
            raise UntrustedFileError("it holds a NumPy scalar that is no plain number")
        dtype = opened(kind)
        if len(data) != dtype.itemsize:
            raise UntrustedFileError("it holds a NumPy scalar that is no plain number")
        return importlib.import_module("numpy").frombuffer(data, dtype)[0]


class NumpyArrayForm(_WithState):
    """An array of numbers from its bytes."""

    def made(self, opened: Opened) -> Any:
        """As the base class."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise self._refused("a NumPy array")
        _, shape, kind, fortran, data = (opened(part) if isinstance(part, BytesForm) else part for part in self.state)
        sizes = isinstance(shape, tuple) and len(shape) <= 32 and all(type(size) is int and size >= 0 for size in shape)
        if not (sizes and isinstance(kind, NumpyTypeForm) and isinstance(data, bytes)):
            raise UntrustedFileError("it holds a NumPy array that is not of plain numbers")
        dtype = opened(kind)
        if len(data) != dtype.itemsize * math.prod(shape):
            raise self._refused("a NumPy array")
        flat = importlib.import_module("numpy").frombuffer(data, dtype).copy()
        return flat.reshape(shape, order="F" if fortran else "C")


class PartialForm(_WithState):
    """`functools.partial`; the judgement makes it, of what is admitted."""

    def parts(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The function, its arguments and its keywords, as the file has them."""
        state: Any = self.state if isinstance(self.state, tuple) and len(self.state) == 4 else (None,) * 4
        function, args, keywords, own = state
        known = len(self.args) == 1 and self.args[0] is function and type(args) is tuple and not own
        if not (known and type(keywords) is dict and all(type(name) is str for name in keywords)):
            raise self._refused("a partial")
        return function, args, keywords


class MethodForm(Form):
    """A method of a module of the same file, pickled as `getattr(module, "name")`; the judgement makes it."""


class Factory:
    """A type that a `defaultdict` makes its values by; it is nothing else."""

    def __init__(self, original: type) -> None:
        self.original = original

    def __call__(self, *args: Any) -> Any:
        """Refused, whatever the arguments."""
        raise UntrustedFileError(f"it tries to call {self}")

    def __str__(self) -> str:
        return f"the type {self.original.__qualname__}"


def _deque(*args: Any) -> list[Any]:
    """A list that the file fills, of which `refilled` makes the deque."""
    most = args[1] if len(args) == 2 else None
    if args[:1] not in ((), ((),)) or len(args) > 2 or not (most is None or (type(most) is int and most >= 0)):
        raise UntrustedFileError("it holds a deque in a form that Python does not write")
    return [Mark(lambda: collections.deque(maxlen=most))]


def _defaultdict(*args: Any) -> dict[Any, Any]:
    """The same as a dict."""
    factory = args[0] if args else None
    if len(args) > 1 or not (factory is None or factory is set or isinstance(factory, Factory)):
        raise UntrustedFileError("it holds a defaultdict of values that are not plain")
    made = factory.original if isinstance(factory, Factory) else factory
    mark = Mark(lambda: collections.defaultdict(made))
    return {mark: None}


def refilled(value: Any) -> Any:
    """The container that a list or dict with a mark stands for; None for any other value."""
    first = next(iter(value), None) if type(value) in (list, dict, OrderedDict) else None
    if not isinstance(first, Mark):
        return None
    made = first.make()
    if isinstance(value, dict):
        dict.update(made, [(key, item) for key, item in value.items() if key is not first])
        if isinstance(value, OrderedDict):  # of a class that may have attributes too
            vars(made).update(vars(value))
    else:
        made.extend(value[1:])
    return made


_FORMS: dict[str, Callable[..., Any]] = {
    "builtins.bytes": BytesForm,
    "builtins.range": RangeForm,
    "builtins.slice": SliceForm,
    "builtins.frozenset": FrozenSetForm,
    "builtins.getattr": MethodForm,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
    "functools.partial": PartialForm,
    "numpy.dtype": NumpyTypeForm,
    "numpy.ndarray": Factory(object),
    "re._compile": PatternForm,
    **{f"builtins.{kind.__name__}": Factory(kind) for kind in (bool, dict, float, int, list, str, tuple)},
    **{f"numpy.{place}.multiarray.scalar": NumpyNumberForm for place in ("core", "_core")},
    **{f"numpy.{place}.multiarray._reconstruct": NumpyArrayForm for place in ("core", "_core")},
    # Python 3.13 has the classes of pathlib one module deeper.
    **{
        f"{place}.{name}": WindowsPathForm if "Windows" in name else PathForm
        for place in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    },
}


def form_of(name: str) -> SafeGlobal | None:
    """The pair for `torch.serialization.safe_globals` for a function or class that values are made by; None for another."""
    form = _FORMS.get(name)
    return None if form is None else (form, name)
