"""Run the command as `python -m gatefit` or `accelerate launch -m gatefit`."""

from gatefit.commands.cli import main

main()
