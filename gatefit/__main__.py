"""`python -m gatefit`, which `accelerate launch -m gatefit` runs too."""

from gatefit.cli import main

main()
