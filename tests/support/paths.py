"""Folders that tests read, said once, so that a test file may lie in any folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
