"""The command line: thin shells over the library. Heavy imports happen inside the commands."""

from __future__ import annotations

import signal
import sys
import threading

import click

from steer2edit import __version__
from steer2edit.cli.behaviors import behaviors
from steer2edit.cli.capture import capture
from steer2edit.cli.chat import chat
from steer2edit.cli.command import MainGroup
from steer2edit.cli.compile import compile
from steer2edit.cli.data import data
from steer2edit.cli.demo import demo
from steer2edit.cli.diff import diff, revert
from steer2edit.cli.emit import emit, verify
from steer2edit.cli.evaluate import evaluate
from steer2edit.cli.experts import experts
from steer2edit.cli.gate import gate
from steer2edit.cli.import_ import import_
from steer2edit.cli.layers import layers
from steer2edit.cli.plan import plan, scale, show
from steer2edit.cli.push import push
from steer2edit.cli.report import report
from steer2edit.cli.tune import tune
from steer2edit.cli.vectors import vectors

_HEADINGS = {
    "Start": ("demo", "behaviors", "compile", "verify", "chat"),
    "Data": ("data",),
    "Stages of a compile": ("capture", "vectors", "plan", "gate", "show", "scale", "emit"),
    "Measure": ("eval", "tune", "report", "layers"),
    "Mixtures of experts": ("experts",),
    "Exchange": ("import", "diff", "revert", "push"),
}


@click.group(
    cls=MainGroup,
    headings=_HEADINGS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="steer2edit")
def main() -> None:
    """Compile a steering vector into a model's weights.

    MODEL is a checkpoint folder (config.json and *.safetensors) or a Hub id. Progress goes to stderr, results to stdout.
    Exit codes: 0 success, 1 a check failed, 2 bad usage or input.
    """
    # SIGTERM ends the program as an error does: open work is closed and removed
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        # after the command nothing is open any more, and an exception out of the interpreter's end would be a traceback
        click.get_current_context().call_on_close(lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


for command in (
    *(behaviors, data),
    *(
        capture,
        chat,
        compile,
        demo,
        diff,
        emit,
        evaluate,
        experts,
        gate,
        import_,
        layers,
        plan,
        push,
        report,
        revert,
        scale,
        show,
        tune,
    ),
    *(vectors, verify),
):
    main.add_command(command)
