"""Items and users that the reranker never met: `id_dropout` teaches it what to do with an unknown one."""

import pytest
import torch

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate
from dnr_recbole.model.blocks.tables import SideTable
from dnr_recbole.testing import build, model_config, train_one_batch

N_USERS, N_ITEMS, N_OLD, WIDTH = 200, 121, 81, 6  # items from N_OLD on are in no training request


def world(known_to_space):
    """Requests whose positives lie near the history in a space, or are told by a feature; new items among them."""
    g = torch.Generator().manual_seed(7)
    space = torch.nn.functional.normalize(torch.randn(N_ITEMS, WIDTH, generator=g), dim=-1)
    feature = torch.randn(N_ITEMS, 1, generator=g)
    space[0], feature[0] = 0.0, 0.0
    if not known_to_space:
        space[N_OLD:] = 0.0

    def requests(size, low, high):
        candidates = torch.stack([torch.randperm(high - low, generator=g)[:10] + low for _ in range(size)])
        history = torch.randint(1, N_OLD, (size, 5), generator=g)
        near = (space[candidates].unsqueeze(2) * space[history].unsqueeze(1)).sum(-1).amax(-1)
        truth = near if known_to_space else feature[candidates].squeeze(-1)
        noise = 0.3 * truth.std() * torch.randn(truth.shape, generator=g)
        labels = (truth + noise >= (truth + noise).topk(2, dim=1).values[:, -1:]).float()
        full = torch.ones(size, 10, dtype=torch.bool)
        scores = torch.rand(size, 10, generator=g)
        users = torch.randint(1, N_USERS, (size,), generator=g)
        return Slate(
            users=users, history=history, history_mask=full[:, :5], candidates=candidates, mask=full, scores=scores,
            labels=labels,
        )  # fmt: skip

    trained = torch.arange(N_ITEMS) < N_OLD
    catalogue = Catalogue(
        n_users=N_USERS, n_items=N_ITEMS, item_popularity=torch.zeros(N_ITEMS), item_features=feature,
        user_features=torch.zeros(N_USERS, 0), spaces={"svd": space.view(1, 1, N_ITEMS, WIDTH)},
        items_trained=trained, users_trained=torch.ones(N_USERS, dtype=torch.bool),
    )  # fmt: skip
    return catalogue, requests(800, 1, N_OLD), requests(600, N_OLD, N_ITEMS)


def auc_of_new_items(catalogue, train, test, id_dropout, seed):
    config = model_config(
        "PRM", n_candidates=10, id_dropout=id_dropout, use_features=True, use_retriever_factors=False,
        dropout=0.0, rerank_loss="listce", affinity_spaces=["svd"],
    )  # fmt: skip
    model = build("PRM", config, catalogue, seed=seed).train()
    optimizers = {n: torch.optim.Adam(p, lr=3e-3) for n, p in model.parameter_groups().items()}
    for _ in range(12):
        for rows in torch.randperm(len(train.users)).split(100):
            train_one_batch(model, train.select(rows), optimizers)
    with torch.no_grad():
        scores = model.eval().predict(test.without_labels())
    pairs = scores.unsqueeze(2) - scores.unsqueeze(1)
    told = test.labels.unsqueeze(2) > test.labels.unsqueeze(1)
    return float((pairs[told] > 0).float().mean())


@pytest.mark.parametrize("known_to_space", [True, False], ids=["known to a space", "unseen everywhere"])
def test_new_items_are_ranked_better_than_by_an_untrained_row(known_to_space):
    data = world(known_to_space)
    with_dropout, without = (
        [auc_of_new_items(*data, id_dropout, seed) for seed in range(2)] for id_dropout in (0.2, 0.0)
    )
    assert min(with_dropout) > max(without)
    assert min(with_dropout) > 0.8


def test_an_id_that_training_did_not_hold_is_the_unknown_one():
    torch.manual_seed(0)
    columns = torch.randn(6, 2)
    table = SideTable(6, 4, columns=columns, id_dropout=0.3, trained=torch.tensor([0, 1, 1, 0, 0, 1]).bool()).eval()
    torch.nn.init.normal_(table.unknown)
    own = lambda i: table.project(columns[i])  # noqa: E731
    for ids in (torch.tensor([2, 3, 4, 0]), torch.tensor([2, 3, 4, 0] * 3)):  # few ids, and more than there are rows
        rows = table(ids)
        assert torch.allclose(rows[0], table.embedding.weight[2] + own(2), atol=1e-6)
        for place in (1, 2):
            assert torch.allclose(rows[place], table.unknown + own(int(ids[place])), atol=1e-6)
        assert (rows[3] == 0).all()


def test_training_replaces_the_share_that_is_asked_for():
    torch.manual_seed(0)
    table = SideTable(50, 4, id_dropout=0.3).train()
    torch.nn.init.ones_(table.unknown)
    ids = torch.randint(1, 50, (20_000,))
    replaced = (table(ids) == 1).all(-1)
    assert float(replaced.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(table.eval()(ids), table.embedding(ids))  # all were trained


def test_without_id_dropout_nothing_is_added():
    table = SideTable(6, 4, trained=torch.zeros(6).bool())
    assert list(table.state_dict()) == ["embedding.weight"] and table.unknown is None
    assert torch.equal(table(torch.tensor([3])), table.embedding.weight[3:4])
