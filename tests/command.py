"""The command line as a user has it: in a process of its own, or in this one, where torch is imported already."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from consilience import cli

Done = subprocess.CompletedProcess[str]


def consilience(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """A command in a process of its own: one that dies, or that starts processes."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-m", "consilience.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300, check=False
    )


def here(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """A command in this process, which takes seconds less."""
    before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["consilience", *arguments]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ, env or {}),
        warnings.catch_warnings(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        os.chdir(cwd)
        try:
            cli.main(arguments)
        except SystemExit as left:
            return Done(arguments, left.code if isinstance(left.code, int) else 1, out.getvalue(), err.getvalue())
        finally:
            os.chdir(before)
    raise AssertionError("the command line always exits")
