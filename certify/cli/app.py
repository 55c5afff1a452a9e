"""The ``certify`` command: verbs and help, exit codes, one-line errors, signals."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import click
import cloup

from certify import __version__
from certify.cli import accuracy, audit, bench, compare, evaluate, info, inspect, plot, run, serve, show, status, train
from certify.cli.console import say, warn
from certify.cli.options import MAIN
from certify.cli.parameter_types import TYPED_ARGUMENTS
from certify.errors import CertifyError, CertifyWarning, UserError, options_in_messages


class CertifyGroup(cloup.Group):
    """A group whose default verb is ``run``: ``certify --model ...`` means ``certify run --model ...``."""

    default = "run"

    def _own_flags(self, ctx: click.Context) -> set[str]:
        return {o for p in self.get_params(ctx) for o in (*p.opts, *p.secondary_opts)}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default verb before options that are not the group's own; accept version and help as verbs."""
        ctx.meta[TYPED_ARGUMENTS] = args
        _refuse_empty(args)
        if args and (args[0] == "help" or args == ["version"]):
            args = [*args[1:], f"--{args[0]}"]
        if args and args[0].startswith("-") and args[0].split("=")[0] not in self._own_flags(ctx):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Complete the default verb's options too."""
        completions = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            completions += self.commands[self.default].shell_complete(ctx, incomplete)
        return completions

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of use."""
        return list(self.commands)

    def format_params(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the main options of the default verb, in place of the group's own."""
        default = self.commands[self.default]
        assert isinstance(default, cloup.Command)
        (main,) = (group for group in default.option_groups if group.title == MAIN)
        assert isinstance(formatter, cloup.HelpFormatter)
        formatter.write_section(
            cloup.formatting.HelpSection("Main options of certify [run]", main.get_help_records(ctx))
        )
        formatter.write("\n")
        formatter.write_text("`certify run --help` shows all options, `certify COMMAND --help` those of a command.")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs, then the group's own options."""
        super().format_commands(ctx, formatter)
        super().format_params(ctx, formatter)


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty value: usually a shell variable that is not set."""
    for before, word in itertools.pairwise(["an argument", *words]):
        option = before if not word else word[:-1] if word.startswith("--") and word.endswith("=") else ""
        if option and option != "--title":
            raise UserError(f"{option} is empty; write a value, or leave it out (is a shell variable not set?)")


SETTINGS = cloup.Context.settings(
    help_option_names=["-h", "--help"],
    max_content_width=110,
    show_default=True,
    formatter_settings=cloup.HelpFormatter.settings(
        col1_max_width=26, theme=cloup.HelpTheme(heading=cloup.Style(bold=True), col1=cloup.Style(fg="cyan"))
    ),
)


@cloup.group(
    cls=CertifyGroup,
    context_settings=SETTINGS,
    no_args_is_help=True,
    sections=[
        cloup.Section("Certify", [run.run, run.predict, accuracy.accuracy, audit.audit, serve.serve]),
        cloup.Section(
            "Denoisers and defences", [train.train, evaluate.evaluate_denoiser, compare.compare, inspect.inspect]
        ),
        cloup.Section(
            "Results", [plot.plot, show.table, show.recompute, status.status, run.merge, show.replay, show.report]
        ),
        cloup.Section("This machine", [info.list_, info.doctor, bench.bench]),
    ],
)
@click.version_option(__version__, "-V", "--version", prog_name="certify")
def group() -> None:
    """Certified robustness of a frozen image classifier, by (denoised) randomized smoothing.

    \b
      certify --model digits --sigma 0.25        a certificate per image, a curve
      certify --model M --sigma 0.25 --data DIR  your classifier on your images
      certify ... --radius 0.25                  robust at this radius, yes or no
      certify ... --cluster auto                 on all devices of a cluster
      certify plot RUN... -o curve.png           certified accuracy over radius
      certify table RUN... --radii 0,0.25,0.5    the same in numbers

    sigma and radii are in pixels of images scaled to [0, 1].
    """  # noqa: D301


def main(args: list[str] | None = None) -> None:
    """Run the command (:func:`_run`), whose messages name its options."""
    with options_in_messages():
        _run(args)


def _run(args: list[str] | None) -> None:
    """Run the command and exit the process.

    Exit codes: 0 success, 1 a fault during the work, 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM (as batch systems do).
    """
    terminated: list[int] = []
    try:
        with _terminates_like_ctrl_c(terminated), _warnings_as_lines():
            code = group.main(args, prog_name="certify", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        _complain(_click_line(error))
        code = 2
    except CertifyError as error:
        _complain(str(error))
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("stopped")
        code = 130
    except BrokenPipeError:  # `certify table ... | head`
        _discard_stdout()
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()  # which may be what is full; errors of files name the file
        _complain(f"could not write: {error.strerror}; what was written before is kept")
        code = 1
    if terminated and code:
        code = 128 + signal.SIGTERM
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show each warning of this package as one line, others as Python does."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CertifyWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, CertifyWarning):
                warn(str(message))
            else:
                others(message, category, *rest, **more)

        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _terminates_like_ctrl_c(terminated: list[int]) -> Iterator[None]:
    """Turn the first SIGTERM into KeyboardInterrupt, so that the work is concluded; only in this process."""
    own = os.getpid()

    def stop(number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != own:  # a child that was forked
            os.kill(os.getpid(), number)
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_stdout() -> None:
    """Redirect stdout, to which nothing more can be written, and which Python would flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    say(f"certify: {' '.join(text.split())}")


def _click_line(error: click.ClickException) -> str:
    line = error.format_message()
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "certify"
    return f"{line.rstrip('.')}; see `{where} --help`"
