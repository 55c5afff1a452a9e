"""Two ways to fail: the user's mistake (exit code 2) and a fault on the way (exit code 1)."""

from __future__ import annotations


def first_line(error: BaseException, longest: int = 140) -> str:
    """The first line of an error's text (of a traceback of TorchScript's the last one), or its kind without one."""
    if "Traceback of TorchScript" in str(error):
        return last_line(error, longest)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]


def last_line(error: BaseException, longest: int = 140) -> str:
    """The last line of an error's text, where runtimes that print a traceback of their own name the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:longest]


def in_words(error: BaseException) -> str:
    """What an error says: its own text where this package raised it, else its kind and its first line."""
    return str(error) if isinstance(error, CertifyError) else f"{type(error).__name__}: {first_line(error)}"


class CertifyWarning(UserWarning):
    """What a user should know although it works: a choice among several, or a value that was hardly meant."""


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
