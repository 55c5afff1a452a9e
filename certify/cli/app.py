"""The command's frame: certifying is the default verb, errors are one line, Ctrl-C is not an error."""

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

from certify import __version__
from certify.cli import audit, bench, compare, evaluate, info, inspect, options, plot, run, serve, show, train
from certify.cli import distribute as spread
from certify.cli.console import say, warn
from certify.errors import CertifyError, CertifyWarning, UserError


class CertifyGroup(click.Group):
    """A group whose default verb is ``run``: ``certify --model ...`` means ``certify run --model ...``."""

    default = "run"

    def _own_flags(self, ctx: click.Context) -> set[str]:
        return {o for p in self.get_params(ctx) for o in (*p.opts, *p.secondary_opts)}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default verb in front of options that are not the group's own; version and help are words, too."""
        ctx.meta[options.TYPED] = args
        _refuse_empty(args)
        if args and (args[0] == "help" or args == ["version"]):
            args = [*args[1:], f"--{args[0]}"]
        if args and args[0].startswith("-") and args[0].split("=")[0] not in self._own_flags(ctx):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Complete the default verb's options too."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += self.commands[self.default].shell_complete(ctx, incomplete)
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, not of the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs, then the default verb's options."""
        super().format_commands(ctx, formatter)
        rows = [r for p in self.commands[self.default].get_params(ctx) if (r := p.get_help_record(ctx))]
        with formatter.section("Options of the default command (run)"):
            formatter.write_dl([r for r in rows if "--help" not in r[0]])


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty value, which is mostly a shell variable that is not set and would choose something else."""
    for before, word in itertools.pairwise(["an argument", *words]):
        option = before if not word else word[:-1] if word.startswith("--") and word.endswith("=") else ""
        if option and option != "--title":
            raise UserError(f"{option} is empty; write a value, or leave it out (is a shell variable not set?)")


@click.group(
    cls=CertifyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
    no_args_is_help=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="certify")
def group() -> None:
    """Certified robustness of a frozen image classifier, by (denoised) randomized smoothing.

    \b
      certify --model digits --sigma 0.25             a certificate for each image, a table, a curve
      certify --model resnet50 --sigma 0.25 --data D  your classifier on your images
      certify ... --radius 0.25                       yes or no at a radius, with as few samples as it takes
      certify ... --cluster auto                      the same on all devices of a cluster (or --shard, and merge)
      certify plot RUN... -o curve.png                certified accuracy over radius
      certify table RUN... --radii 0,0.25,0.5         the same in numbers
      certify table RUN --simultaneous                what holds for all images at once
      certify train --denoiser unet --sigma 0.25 ...  a denoiser to put in front of it
      certify evaluate-denoiser --denoiser D ...      its PSNR, SSIM, accuracy, and a picture
      certify compare --model M --defences D,...      defences under attacks, beside certificates
      certify audit --endpoint URL --protocol P ...   certify a service that can only be asked
      certify serve --model M --sigma 0.25 ...        a server that answers with certificates

    sigma and radii are in pixels of images scaled to [0, 1].
    """  # noqa: D301


for _command in (
    run.run,
    run.predict,
    train.train,
    evaluate.evaluate_denoiser,
    compare.compare,
    inspect.inspect,
    plot.plot,
    show.table,
    show.recompute,
    spread.merge,
    show.report,
    audit.audit,
    audit.replay,
    serve.serve,
    bench.bench,
    info.list_,
    info.doctor,
):
    group.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command and leave the process.

    0 done, 1 a fault on the way, 2 the user's mistake, 130 stopped by Ctrl-C, 143 by SIGTERM (as batch systems do).
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
        _give_up_stdout()
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _give_up_stdout()  # which is where it may have come from; files say their own names
        _complain(f"could not write: {error.strerror}; what was written before is kept")
        code = 1
    if terminated and code:
        code = 128 + signal.SIGTERM
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings of this package as one line each; those of others as Python does."""
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
    """SIGTERM ends the work as Ctrl-C does: what was done is concluded; told once, in the process that was told."""
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


def _give_up_stdout() -> None:
    """Nothing more can be written there, and python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    say(f"certify: {' '.join(text.split())}")


def _click_line(error: click.ClickException) -> str:
    line = error.format_message()
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "certify"
    return f"{line.rstrip('.')}; see `{where} --help`"
