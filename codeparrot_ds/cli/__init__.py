"""The `codeparrot-ds` command. Each command imports its modules only when it runs, which keeps --help fast."""

import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from codeparrot_ds import __version__
from codeparrot_ds.cli import complete, corpus, evaluate, export, planning, report, shards, tokenizer, training
from codeparrot_ds.cli.completion import drop_keys
from codeparrot_ds.cli.output import group
from codeparrot_ds.errors import EXIT_USER_ERROR, UserError
from codeparrot_ds.system.processes import interrupt_imports

app = group(
    "Pre-train GPT-2 code models with DeepSpeed: from source files to a Hugging Face model.", add_completion=True
)
for name, module in {"corpus": corpus, "tokenizer": tokenizer, "shards": shards, "evaluate": evaluate}.items():
    app.add_typer(module.app, name=name)
app.command("init")(training.init_command)
app.command("plan")(planning.plan_command)
app.command("tune")(planning.tune_command)
app.command("doctor")(training.doctor_command)
app.command("launch")(training.launch)
app.command("status")(report.status)
app.command("compare")(report.compare_command)
app.command("report")(report.report)
app.command("convert")(export.convert_command)
app.command("push")(export.push_command)
app.command("complete")(complete.complete_command)


def main() -> NoReturn:
    """Run a command. Exit codes: 0 success, 1 user error, 2 usage error. A traceback is a bug in this package."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupt_imports()
    drop_keys(os.environ)
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader closed the pipe, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        from codeparrot_ds.system.files import explain_os_error

        explained = explain_os_error(error)
        if explained is None:
            raise
        _fail(str(explained))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
