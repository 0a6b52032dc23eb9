"""`python -m gatefit`, which `accelerate launch -m gatefit` runs too."""

from gatefit.commands.cli import main

main()
