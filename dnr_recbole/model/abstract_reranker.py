"""The interface of every reranker.

A reranker scores the n candidates of a request together. Its work is cut in two, so that a training framework
such as DNR can score the same requests under several retriever scores and pay for the shared part once:

* :meth:`AbstractReranker.encode` — all that does not depend on the retriever's scores;
* :meth:`AbstractReranker.score` — logits for given scores x.

Everybody else reads :meth:`AbstractReranker.logits`: those of ``score`` and what ``score_fusion: residual`` adds.

To write a reranker, subclass, decorate with ``register_reranker``, implement :meth:`~AbstractReranker.score`, and
put its hyper-parameters in ``properties/model/<ClassName>.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
    cast,
)

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import InputType, ModelType
from torch import Tensor, nn

from dnr_recbole.data.catalogue import Catalogue
from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import NEG_INF, gather_lists, top_positions
from dnr_recbole.model.blocks.dropout import Dropout
from dnr_recbole.model.context import C, Context
from dnr_recbole.model.inputs.embedder import PARTS, Embedder
from dnr_recbole.model.inputs.interaction import INTERACTIONS
from dnr_recbole.model.inputs.position_input import POSITION_INPUTS, make_position_input
from dnr_recbole.model.inputs.residual_slope import fit_slope
from dnr_recbole.model.inputs.score_fusion import ScoreFusion
from dnr_recbole.model.losses import LOSSES, list_ce
from dnr_recbole.model.objective_outputs import make_objective_outputs


class Step(NamedTuple):
    """One optimiser step: a loss, the parameter group(s) that it updates, and the terms to log."""

    loss: Tensor
    groups: Tuple[str, ...] = ("reranker",)
    terms: Dict[str, Tensor] = {}


@dataclass
class Stage:
    """A training stage before the main one, e.g. a pretrained personalised vector or evaluator.

    Attributes:
        name: for the log.
        epochs: passes over the training requests.
        loss: batch → scalar loss.
        parameters: what the stage trains; everything else is left alone.
        learning_rate: None takes the config's.
        finish: called once behind the last epoch, e.g. to freeze what was trained.
    """

    name: str
    epochs: int
    loss: Callable[[Slate], Tensor]
    parameters: List[nn.Parameter] = field(default_factory=list)
    learning_rate: Optional[float] = None
    finish: Optional[Callable[[], None]] = None


class AbstractReranker(AbstractRecommender, Generic[C]):
    """Base class of all rerankers; C is the :class:`~dnr_recbole.model.context.Context` of a model that has its own.

    Class attributes to set:
        family: one of "pointwise", "list refinement", "generator-evaluator", "diffusion", "diversity", "framework".
        paper: authors, venue, year and title.
        permutation: "equivariant" (permuting the candidates permutes the scores) or "score_order" (the model reads
            the candidates in descending order of the retriever's score, which it restores itself).
        supports_noise: whether training under synthetic scores makes sense, so that DNR may wrap the model.
        noise_refusal: why not, in words for the user.
        export_refusal: why its scoring cannot be written as one graph of tensor operations (docs/export.md), in words
            for the user; "" = it can.
        independent: whether a candidate's score depends on no other candidate (but for the rank of its own score).
        embeds: which parts of an :class:`~dnr_recbole.model.inputs.embedder.Embedder` the model reads.
        wraps_backbone: whether the model trains another one, named by the key ``backbone``, whose keys it has as well.
        interactions: the values of `history_interaction` that the model can use.
        position_inputs: the values of `position_input` that its training reads.
        objective_outputs: whether :meth:`score` returns ``[B, n, T]``, of ``n_outputs`` = T outputs, under
            `objective_outputs: apart`.
        fits_itself: whether :meth:`fit` trains the model at once, without gradients.
        bf16_from: device type → smallest size (requests of a batch × width d) at which a training step was measured to
            be faster in bf16 than in fp32, where the device has it (docs/speed.md).
        needs: an optional package that the model imports, and what to ask pip for; None = nothing.
        text_parts: buffers of bytes that are texts, such as a model of another library; artefacts keep them as such.
        score_adds_residual: whether :meth:`score` returns logits that hold :meth:`with_residual`'s term already, as
            where a model makes its lists of the numbers that its logits are made of.

    Args:
        config: a :class:`dnr_recbole.config.Config` (read with ``config["key"]``).
        catalogue: sizes and side tables.
    """

    type = ModelType.GENERAL
    input_type = InputType.LISTWISE

    family = "list refinement"
    paper = ""
    permutation = "equivariant"
    supports_noise = True
    noise_refusal = ""
    export_refusal = ""
    bf16_from: Mapping[str, float] = {"cpu": 2**14, "cuda": 2**20}
    independent = False
    embeds: Tuple[str, ...] = PARTS
    wraps_backbone = False
    interactions: Tuple[str, ...] = INTERACTIONS
    position_inputs: Tuple[str, ...] = POSITION_INPUTS
    objective_outputs = False
    fits_itself = False
    needs: Optional[Tuple[str, str]] = None
    score_adds_residual = False
    text_parts: Tuple[str, ...] = ()

    def __init__(self, config, catalogue: Catalogue):
        super().__init__()
        if config["history_interaction"] not in self.interactions:
            name, usable = type(self).__name__, " or ".join(self.interactions)
            raise ConfigError(f"history_interaction={config['history_interaction']}: {name} can use {usable}")
        self.dim: int = config["embedding_size"]
        self.slate_size: int = config["slate_size"]
        self.n_items = catalogue.n_items
        self.embedder = self.make_embedder(config, catalogue)
        self.dropout = Dropout(config["dropout"])
        self.fusion = ScoreFusion(config["score_fusion"], self.dim, config["n_candidates"], catalogue.n_scores)
        self.likelihood = LOSSES.find(config["rerank_loss"])
        self.position_input = make_position_input(config, type(self))
        self.objectives = make_objective_outputs(config, type(self), self.likelihood)
        self.n_outputs = 1 if self.objectives is None else len(self.objectives)

    # ------------------------------------------------------------------ what a model implements

    def make_embedder(self, config: Any, catalogue: Catalogue) -> Embedder:
        """What :attr:`embedder` is; override it where what is read depends on the config."""
        return Embedder(config, catalogue, self.embeds, self.independent)

    def encode(self, slate: UnscoredSlate) -> C:
        """Encode what does not depend on scores or labels.

        Default: candidate and history vectors, and the user's vector plus the mean of the history as user state.
        """
        candidates, history = self.embed(slate)
        user = self.embedder.user(slate, history)
        return cast(C, Context(self.dropout(candidates), history, self.dropout(user)))

    def score(self, context: C, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """The model's own logits ``[B, n]`` of q(z = 1 | x, u), given retriever scores ``x`` ``[B, n]``, or
        ``[B, n, S]`` of several retrievers (``self.fusion`` reads both). With ``n_outputs`` T above 1, ``[B, n, T]``.

        To be read by :meth:`logits`. Values at padding are ignored. ``x`` may be synthetic and made of labels: it is
        what the model reads, while lists that stand for what was shown are ordered by ``slate.logged_scores``.
        """
        raise NotImplementedError

    def loss(self, context: C, slate: Slate, x: Tensor) -> Tensor:
        """Training loss under scores ``x``; default −log q(z | x) by ``rerank_loss``.

        What the model learns *from* does not depend on ``x``: targets, and the lists that evaluators and discriminators
        see, come from labels, ``slate.logged_scores`` and the model's own output.
        """
        return self.criterion(self.logits(context, slate, x), slate)

    def training_steps(self, slate: Slate) -> Iterator[Union[Tensor, Step]]:
        """The losses of one batch; an optimiser step is taken after each before the next is computed.

        ``slate.scores`` are what :meth:`loss` calls ``x``.
        """
        yield self.loss(self.encode(slate), slate, slate.scores)

    def predict(self, slate: Slate) -> Tensor:
        """Final ranking scores ``[B, n]``; padding gets a very low one.

        The same for the same request at any time: a model that samples draws fixed noise.
        """
        return self.forward(slate).masked_fill(~slate.mask, NEG_INF)

    def prepare(self, train) -> None:
        """Called once before anything is trained, pretraining included; never when a training is resumed.

        What it sets must be in the ``state_dict``: of several processes, each calls it and all continue with the state
        of the first, and a resumed training has that of its checkpoint.

        Default: the slope of ``score_fusion: residual`` starts at its fit
        (:func:`~dnr_recbole.model.inputs.residual_slope.fit_slope`); without it nothing happens.

        Args:
            train: the trainer's :class:`~dnr_recbole.data.dataloader.SlateLoader`; ``train.dataset`` holds all training
                requests in every process.
        """
        if self.fusion.slope is None:
            return
        start = fit_slope(train.dataset, listwise=self.likelihood is list_ce)
        with torch.no_grad():  # further scores start with nothing
            self.fusion.slope.view(-1)[0] = start
        wrong = ": in these requests, positives score lower than others" if start < 0 else ""
        self.logger.info(f"{type(self).__name__}: the slope of score_fusion residual starts at {start:.4f}{wrong}")

    def fit(self, train: Iterable[Slate], valid: Iterable[Slate]) -> None:
        """The whole training of a model that ``fits_itself``, in the place of epochs; called after :meth:`prepare`.

        What it sets must be in the ``state_dict``. Each process is given all requests and must come to the same.

        Args:
            train, valid: all requests in batches, with labels.
        """
        raise NotImplementedError

    def pretraining(self) -> List[Stage]:
        """Stages to run before the main training; none by default."""
        return []

    # ------------------------------------------------------------------ what every model has

    def embed(self, slate: UnscoredSlate) -> Tuple[Tensor, Tensor]:
        """The embedder's vectors of the candidates ``[B, n, d]``, with their positions, and of the history
        ``[B, H, d]``."""
        candidates, history = self.embedder(slate)
        if self.position_input is not None:
            candidates = self.position_input.on_vectors(candidates, slate)
        return candidates, history

    def logits(self, context: C, slate: UnscoredSlate, x: Tensor) -> Tensor:
        """Logits ``[B, n]`` (or ``[B, n, T]``) of q(z = 1 | x, u): :meth:`score`'s, and what the score fusion adds."""
        logits = self.score(context, slate.unscored(), x)
        return logits if self.score_adds_residual else self.with_residual(logits, x)

    def with_residual(self, logits: Tensor, x: Tensor) -> Tensor:
        """``logits`` ``[B, n]`` (or ``[B, n, T]``) plus a · log-odds(x) ``[B, n]``; ``logits`` without
        ``score_fusion: residual``."""
        residual = self.fusion.residual(x)
        if residual is None:
            return logits
        return logits + (residual if logits.dim() == residual.dim() else residual.unsqueeze(-1))

    def forward(self, slate: Slate) -> Tensor:
        """Logits ``[B, n]`` under the slate's own retriever scores; of several objectives, those of their mean."""
        logits = self.logits(self.encode(slate), slate, slate.scores)
        return logits if self.objectives is None else self.objectives.together(logits, slate.mask)

    def criterion(self, logits: Tensor, slate: Slate) -> Tensor:
        """−log q(z | x) of the request's feedback under ``logits`` ``[B, n]``, weighted as the slate says; of logits
        ``[B, n, T]``, the weighted mean over the objectives."""
        if self.position_input is not None:
            logits = self.position_input.on_logits(logits, slate)
        if self.objectives is not None:
            return self.objectives.loss(logits, slate)
        return self.likelihood(logits, slate.feedback, slate.mask, slate.weights)

    def list_criterion(self, logits: Tensor, slate: Slate, lists: Tensor, mask: Tensor) -> Tensor:
        """The same of lists: logits, ``lists`` of candidates (negative = nothing) and their mask, ``[B, R, K]``."""
        weights = None if slate.weights is None else gather_lists(slate.weights, lists).flatten(0, 1)
        labels = gather_lists(slate.feedback, lists).flatten(0, 1)
        return self.likelihood(logits.flatten(0, 1), labels, mask.flatten(0, 1), weights)

    def calculate_loss(self, slate: Slate) -> Tensor:
        """RecBole's name for the loss of a batch."""
        return self.loss(self.encode(slate), slate, slate.scores)

    def generate(self, slate: Slate) -> Tensor:
        """The list to show: candidate positions ``[B, K]``, best first, −1 behind the last valid one."""
        return top_positions(self.predict(slate), slate.mask, self.slate_size)

    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        """How good the best list is that the model could have shown, for a model that chooses among few lists.

        Returns:
            name of a set of lists → hits of its best list ``[B]`` as a share of min(K, positives of the request), NaN
            for a request without a positive; empty where every list can be shown. Reads ``slate.labels``; every run
            reports the means beside the result.
        """
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch; models with a schedule override it."""

    @property
    def phase(self) -> str:
        """Name of the part of the training that the model is in, for models with several; "" for others."""
        return ""

    @property
    def waits(self) -> bool:
        """Whether early stopping must not end the training yet, since a later phase has not begun."""
        return False

    selects_anew = False  # whether the best epoch is chosen anew among those of a later phase

    def after_epoch(self, means: Dict[str, float]) -> None:
        """Called by the trainer after each epoch with the means of the loss and of every term."""

    def parameter_groups(self) -> Dict[str, List[nn.Parameter]]:
        """Named groups with an optimiser each; :class:`Step` refers to the names."""
        return {"reranker": [p for p in self.parameters() if p.requires_grad]}

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *rest: Any) -> None:
        self._upgrade(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _upgrade(self, state_dict: Dict[str, Any], prefix: str) -> None:
        """Give weights of earlier versions their names of today: until 0.1 an embedder's parts were the model's own."""
        moved = tuple(f"{prefix}{part}." for part in PARTS if part not in self._modules)
        if "embedder" in self._modules:
            for name in [name for name in state_dict if name.startswith(moved)]:
                state_dict[f"{prefix}embedder.{name[len(prefix) :]}"] = state_dict.pop(name)
