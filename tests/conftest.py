"""What holds for every test."""

import pytest

from dnr_recbole import registry


@pytest.fixture(autouse=True)
def registered_models_stay():
    """A model that a test registers is gone after it: other tests go over all registered models."""
    registry.list_models()  # loads the package's own
    kept = [(table, dict(table)) for table in (registry._rerankers, registry._retrievers)]
    yield
    for table, models in kept:
        table.clear()
        table.update(models)
