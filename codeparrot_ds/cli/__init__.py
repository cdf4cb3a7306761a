"""The `codeparrot-ds` command. Each command imports its modules only when it runs, which keeps --help fast."""

import io
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from codeparrot_ds import __version__
from codeparrot_ds.cli import complete, corpus, evaluate, export, planning, report, shards, tokenizer, training
from codeparrot_ds.cli.completion import drop_keys
from codeparrot_ds.cli.output import group
from codeparrot_ds.errors import EXIT_CODES, EXIT_CRASHED, EXIT_USER_ERROR, UserError
from codeparrot_ds.system.processes import interrupt_imports

_COMMANDS: dict[str, Any] = {  # in the order of a project
    "corpus": corpus.app,
    "tokenizer": tokenizer.app,
    "shards": shards.app,
    "init": training.init_command,
    "plan": planning.plan_command,
    "tune": planning.tune_command,
    "doctor": training.doctor_command,
    "launch": training.launch,
    "status": report.status,
    "compare": report.compare_command,
    "report": report.report,
    "convert": export.convert_command,
    "complete": complete.complete_command,
    "evaluate": evaluate.app,
    "push": export.push_command,
}


class _Ordered(TyperGroup):
    """Lists its commands in the order of `_COMMANDS`; typer would put the groups at the end."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See click."""
        return list(_COMMANDS)


app = group(
    "Pre-train GPT-2 code models with DeepSpeed: from source files to a Hugging Face model.",
    add_completion=True,
    cls=_Ordered,
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
)
for name, command in _COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def main() -> NoReturn:
    """Run a command, and exit with one of `EXIT_CODES`."""
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
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError):
            from codeparrot_ds.system.files import explain_os_error

            if explained := explain_os_error(error):
                _fail(str(explained))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(EXIT_CRASHED)
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
