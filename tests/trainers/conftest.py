"""Fixtures of the trainers' tests alone."""

from __future__ import annotations

import pytest

from tests.support.preference_sets import Load
from trainers.data import preference_pairs


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`preference_pairs.load` with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda source, *args, **options: preference_pairs.load(source, *args, cache_dir=cache, **options)
