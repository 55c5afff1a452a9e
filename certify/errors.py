"""Two ways to fail: the user's mistake (exit code 2) and a fault on the way (exit code 1)."""

from __future__ import annotations


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


class CertifyWarning(UserWarning):
    """Warning about something that works: a choice among several, or a value that was hardly meant."""


class CertifyError(Exception):
    """Base of every error this package raises on purpose; its text is one line for a person to read."""

    exit_code = 1


class RunFault(CertifyError):
    """A fault on the way (network, disk, worker): says what was kept and how to go on."""


class Stopped(RunFault):
    """The user ended it (Ctrl-C): says what was kept and how to go on."""

    exit_code = 130


class UserError(CertifyError, ValueError):
    """A mistake in what was asked: says what came, what was expected and what to write instead."""

    exit_code = 2


class ImageError(UserError):
    """One image cannot be used (unreadable, too large, out of range); the rest of the data may be fine."""


class ContractError(UserError):
    """A base classifier or denoiser is not one fixed function of each image: nothing can be certified with it."""
