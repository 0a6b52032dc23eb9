"""Analyses and edits of plain torch.fx graphs. Nothing here knows of gates."""
