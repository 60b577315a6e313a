"""Where things lie, for tests at any depth."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
