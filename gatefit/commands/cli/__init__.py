"""The command line: one file for each command. It parses options, calls, and shows results."""

from gatefit.commands.cli.app import app, main

__all__ = ["app", "main"]
