"""PRM: what the position embedding and the personalised vector do, and deep stacks."""

import pytest
import torch

from dnr_recbole.testing import build, random_catalogue, random_slate


def shuffled(slate):
    order = torch.rand(slate.candidates.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order, slate.shuffled(order)


def test_without_position_embedding_it_is_equivariant_in_the_items():
    model, slate = build("PRM"), random_slate(ragged=False)
    torch.nn.init.zeros_(model.fusion.rank_embedding.weight)
    order, moved = shuffled(slate)
    moved = moved.with_scores(slate.scores)
    torch.testing.assert_close(model(slate).gather(1, order), model(moved), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_pv", [False, True])
def test_item_and_rank_move_together(use_pv):
    model, slate = build("PRM", use_pv=use_pv), random_slate(ragged=False)
    torch.nn.init.normal_(model.fusion.rank_embedding.weight)
    order, moved = shuffled(slate)
    torch.testing.assert_close(model(slate).gather(1, order), model(moved), atol=1e-5, rtol=1e-4)
    assert (model(slate) - model(slate.with_scores(1 - slate.scores))).abs().max() > 1e-3, "the rank must matter"


@pytest.mark.parametrize("loss", ["bce", "listce"])
def test_padding_takes_no_part_in_the_loss(loss):
    model, slate = build("PRM", rerank_loss=loss), random_slate()
    logits = model(slate)
    assert torch.equal(model.criterion(logits.masked_fill(~slate.mask, 50.0), slate), model.criterion(logits, slate))


@pytest.mark.parametrize("folds", [1, 3])
def test_the_personalised_vector_gets_no_gradient(folds):
    model, slate = build("PRM", use_pv=True, pv_folds=folds).train(), random_slate()
    (stage,) = model.pretraining()
    before = [p.clone() for p in model.pv.parameters()]
    optimizer = torch.optim.Adam(stage.parameters, lr=0.01)
    for _ in range(3):
        loss = stage.loss(slate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.pv.parameters())), "its own stage trains it"
    stage.finish()
    assert not any(p.requires_grad for p in model.pv.parameters())
    assert not {id(p) for p in model.pv.parameters()} & {id(p) for g in model.parameter_groups().values() for p in g}
    model.zero_grad(set_to_none=True)
    model.train().calculate_loss(slate).backward()
    assert all(p.grad is None for p in model.pv.parameters())
    assert model.pv_to_token.weight.grad.abs().sum() > 0


def test_the_personalised_vector_learns_clicks():
    model, slate = build("PRM", use_pv=True, dropout=0.0), random_slate(seed=5, ragged=False)
    (stage,) = model.pretraining()
    optimizer = torch.optim.Adam(stage.parameters, lr=0.01)
    first = float(stage.loss(slate).detach())
    for _ in range(60):
        loss = stage.loss(slate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * first


def test_cross_fitting_keeps_a_user_from_its_own_net():
    model, slate = build("PRM", use_pv=True, pv_folds=2), random_slate(batch=1)
    own = int(slate.users[0]) % 2
    model.pv.loss(slate).backward()
    norm = lambda net: sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None)  # noqa: E731
    assert norm(model.pv.nets[own]) == 0 and norm(model.pv.nets[1 - own]) > 0
    vectors = model.pv(slate).unflatten(-1, (2, -1))
    assert vectors[:, :, own].abs().sum() > 0 and vectors[:, :, 1 - own].abs().sum() == 0


def test_without_vector_the_model_is_the_same_one():
    names = lambda **o: set(build("PRM", **o).state_dict())  # noqa: E731
    plain = names()
    assert not [k for k in plain if k.startswith("pv") or "gamma" in k]
    assert plain < names(use_pv=True)
    assert plain < names(layer_scale=0.1)
    assert build("PRM", use_pv=True, pv_epochs=0).pretraining() == []


def test_ten_layers_train_stably():
    """Gradients keep their size through the stack, which fits eight requests at the default rate."""
    slate = random_slate(seed=5, ragged=False)
    model = build("PRM", catalogue=random_catalogue(), n_layers=10, dropout=0.0).train()
    model.calculate_loss(slate).backward()
    norms = [block.attention.out.weight.grad.norm().item() for block in model.blocks]
    assert max(norms) < 10 * min(norms)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for _ in range(200):
        loss = model.calculate_loss(slate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0] and max(losses) < 3 * losses[0]
