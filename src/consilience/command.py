"""How the command line's commands show their help."""

from __future__ import annotations

from typing import get_type_hints

import click
from typer.core import TyperArgument, TyperCommand


class Command(TyperCommand):
    """A command whose help is as it was written: beside a newer click, typer forgets the help of arguments, and
    beside rich it writes ``\\[required]``."""

    def get_help(self, ctx: click.Context) -> str:
        """The whole help text."""
        hints = get_type_hints(getattr(self.callback, "__wrapped__", self.callback), include_extras=True)
        for param in self.params:
            if isinstance(param, TyperArgument) and param.name:
                param.help = hints[param.name].__metadata__[0].help
        return super().get_help(ctx).replace("\\[", "[")

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: typer's part of the help has the arguments, and click's newer one would repeat them."""
