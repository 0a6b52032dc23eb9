"""Where the repository's files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
