"""Errors: the user's mistakes (exit code 2) and run-time faults (exit code 1)."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

_SAME = (
    "alpha api-key-env auth-header auth-query batch-size bound budget certify-n class-map classifier cluster "
    "compile concurrency continuous denoiser device download draws ema epochs first-share held-out ids init "
    "input-size insecure labels licence mean model n n0 noise norm num-classes objective optimizer out population "
    "precision price-per-1000 progress protocol queries radius rate repeat-clean retries root rule schedule seed "
    "settings sgd-rate shard sigma skip start statement std strict switch-at temperature timeout tolerance "
    "trust-code trust-identity validations weight-decay weights"
)
_PARAMETERS = {option: option.replace("-", "_") for option in _SAME.split()}  # of the public functions
_PARAMETERS |= {"data": "images", "max": "max_images", "protocol-option": "protocol_options", "round": "rounded"}
_PARAMETERS |= {"set": "settings", "surrogate": "surrogates", "train-only": "only"}
_FLAGS = {"download", "insecure", "round", "strict", "trust-code", "trust-identity"}
_OPTION = re.compile(r"`[^`]*`|(?<![\w-])--([a-z][a-z0-9-]*)(?:[ =](?=[A-Z\d'\[(]|-\d)('[^']*'|[^\s,;:]+))?")
_in_command = False


@contextlib.contextmanager
def options_in_messages() -> Iterator[None]:
    """Let messages name options as the command spells them (``--max 3``), not as Python does (``max_images=3``)."""
    global _in_command  # noqa: PLW0603  # threads of the command write messages too
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


def python_spelling(text: str) -> str:
    """Return a message with options spelled as parameters and commands as calls; text in backticks stays."""

    def parameter(found: re.Match[str]) -> str:
        option, value = found.groups()
        if option not in _PARAMETERS:
            return found[0]
        name = _PARAMETERS[option]
        value = "True" if option in _FLAGS else value
        if value is not None and re.fullmatch(r"\d+x\d+x\d+", value):
            value = f"({value.replace('x', ', ')})"
        return name if value is None else f"{name}={value}"

    return _OPTION.sub(parameter, text).replace("same command", "same call")


class _Message(Exception):
    """An error or warning whose text is written with the command's options."""

    def __str__(self) -> str:
        text = Exception.__str__(self)  # not that of KeyError, which some errors are too
        return text if _in_command else python_spelling(text)


def first_line(error: BaseException, longest: int = 200) -> str:
    """Return the first line of an error's text (the last one of a TorchScript traceback), or the name of its type."""
    if "Traceback of TorchScript" in str(error):
        return last_line(error, longest)
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[0], longest)


def last_line(error: BaseException, longest: int = 200) -> str:
    """Return the last line of an error's text, which names the cause where a runtime prints its own traceback."""
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[-1].strip(), longest)


def shorten(text: str, longest: int) -> str:
    """Cut a long text in the middle: it begins with what failed and often ends with why."""
    if len(text) <= longest:
        return text
    start = longest // 3
    return f"{text[:start]} ... {text[len(text) - (longest - start - 5) :]}"


def in_words(error: BaseException) -> str:
    """Describe an error: its own text where this package raised it, else its kind and its first line."""
    return str(error) if isinstance(error, CertifyError) else f"{type(error).__name__}: {first_line(error)}"


class CertifyWarning(_Message, UserWarning):
    """Warning about something that works: a choice among several, or a value that was hardly meant."""


def warn(text: str) -> None:
    """Issue a :class:`CertifyWarning`, which the command shows as one line."""
    warnings.warn(text, CertifyWarning, stacklevel=3)


class CertifyError(_Message):
    """Base class of every error that this package raises deliberately; its text is one line."""

    exit_code = 1


class RunFault(CertifyError):
    """A run-time fault (network, disk, worker); the message says what was kept and how to resume."""


class Stopped(RunFault):
    """Stopped by the user (Ctrl-C); the message says what was kept and how to resume."""

    exit_code = 130


class BudgetSpent(RunFault):
    """More queries were requested than the budget has left; none of them was sent."""

    def __init__(self, spent: int, budget: int, requested: int) -> None:
        super().__init__(
            f"query budget: {spent} of {budget} queries are spent and {requested} more were requested; none of them "
            "was sent, and earlier results are kept: give a larger budget to continue"
        )
        self.spent, self.budget, self.requested = spent, budget, requested


class UserError(CertifyError, ValueError):
    """A user's mistake; the message gives the received value, the expected value and the fix."""

    exit_code = 2


class ImageError(UserError):
    """One image cannot be used (unreadable, too large, out of range); the rest of the data may be fine."""


class ContractError(UserError):
    """A base classifier or denoiser is not one fixed function of each image: nothing can be certified with it."""
