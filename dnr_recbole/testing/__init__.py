"""What any reranker must satisfy, as a test class that a model outside this package can inherit too.

::

    from dnr_recbole.testing import RerankerContract
    from my_package import MyReranker

    class TestMyReranker(RerankerContract):
        model = MyReranker

pytest then runs every test of the contract on ``MyReranker``, on the device that the environment variable
``DNR_TEST_DEVICE`` names (default: cpu).

The contract lies in four parts, ``prediction``, ``training``, ``settings`` and ``fusion``; ``inputs`` makes the
requests and models that they test with.
"""

from dnr_recbole.testing.fusion import FusionContract
from dnr_recbole.testing.inputs import (
    DEVICE,
    N_ITEMS,
    N_USERS,
    as_artefact,
    as_table,
    build,
    model_config,
    random_catalogue,
    random_slate,
    seeded,
    train_one_batch,
    training_steps,
    two_scores,
)
from dnr_recbole.testing.settings import SettingsContract
from dnr_recbole.testing.training import TrainingContract

__all__ = [
    "DEVICE",
    "N_ITEMS",
    "N_USERS",
    "RerankerContract",
    "as_artefact",
    "as_table",
    "build",
    "model_config",
    "random_catalogue",
    "random_slate",
    "seeded",
    "train_one_batch",
    "training_steps",
    "two_scores",
]


class RerankerContract(SettingsContract, FusionContract, TrainingContract):
    """Inherit, set ``model`` (a class or a registered name), and run with pytest.

    Attributes:
        model: the reranker under test.
        overrides: config keys to change for it.
        overfit_epochs, overfit_learning_rate: budget of the overfitting test.
        steep_slope: of ``score_fusion: residual``, so large that the model's other logits do not count, yet small
            enough for a probability to tell the best candidates apart where a model needs that.
        steep_overrides: config keys under which a steep slope leaves the incoming order to the list that is shown, e.g.
            to switch a trade-off off; None = a rule of the model's own makes the list whatever the logits.
    """
