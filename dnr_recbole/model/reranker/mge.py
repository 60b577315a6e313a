"""MG-E: several generators propose lists, one evaluator chooses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, cast

import torch
from torch import Tensor, nn

from dnr_recbole.config_schema import Definitions, implied
from dnr_recbole.config_sources import define_for_all, define_model
from dnr_recbole.data.slate import Slate, UnscoredSlate
from dnr_recbole.errors import ConfigError
from dnr_recbole.lists import list_scores, pick_best, top_positions
from dnr_recbole.model.abstract_reranker import AbstractReranker, Stage
from dnr_recbole.model.blocks.list_evaluator import ListEvaluator
from dnr_recbole.model.blocks.nets import UserItemToken
from dnr_recbole.model.context import Context, TokenContext
from dnr_recbole.model.losses import list_ce
from dnr_recbole.model.reranker._list_decoding import evaluator_loss, greedy_decode, hit_shares, list_utility
from dnr_recbole.model.reranker._list_distances import soft_pod
from dnr_recbole.model.reranker.nar4rec import NAR4Rec
from dnr_recbole.model.reranker.prm import PRM
from dnr_recbole.registry import get_reranker, register_reranker

RETRIEVER, CLIG = "retriever", "CLIG"


class GeneratorConfig:
    """The config of one generator: its own arguments, then the run's keys, then the defaults of its class."""

    def __init__(self, config, cls: type, arguments: Dict[str, Any]):
        definitions = Definitions()
        define_for_all(definitions, config["dataset"])
        define_model(definitions, cls)
        self.defaults = definitions.defaults
        self.config, self.arguments = config, {**implied(definitions.keys, arguments), **arguments}
        unknown = sorted(set(arguments) - set(self.defaults))
        if unknown:
            raise ConfigError(f"generator_args: {cls.__name__} has no key '{unknown[0]}'")

    def __getitem__(self, key: str) -> Any:
        if key in self.arguments:
            return self.arguments[key]
        return self.config[key] if key in self.config else self.defaults[key]


class Proposal(NamedTuple):
    """What a generator says about a request batch.

    Attributes:
        lists: ``[B, R, K]`` candidate positions.
        logits: ``[B, n]``.
    """

    lists: Tensor
    logits: Tensor


@dataclass(frozen=True)
class MGEContext(Context):
    """Attributes:
    tokens: ``[B, n, d]``, of the evaluator. generators: what each of them encoded, by its name.
    """

    tokens: Tensor
    generators: Dict[str, Context]


@register_reranker
class MGE(AbstractReranker[MGEContext]):
    """Multi-generator reranking with a comprehensive list generator (Yang et al., SIGIR 2025), known as MG-E.

    ``generators`` names them: ``retriever`` (its top K) and any registered rerankers, which share the item
    and user tables and are trained by their own losses; NAR4Rec contributes one list per α of its contrastive
    decoding. ``clig`` adds the paper's comprehensive list generator, a PRM trained by list cross-entropy −
    ``clig_weight`` · soft-POD against the lists that the others propose, i.e. it is paid for preferred items
    and for ordering them unlike the rest (the weighting of the two is ours). The evaluator learns the labels
    of listed items on a mixture of the lists of all generators and random ones, since one trained on a single
    generator's lists would misjudge the others; the list with the highest expected DCG is shown.

    Logits (for the candidates outside the list, and for a training framework) are the mean of the generators'
    logits. The lists' distances and comprehensiveness are in :mod:`dnr_recbole.model.reranker._list_distances`.

    Under ``score_fusion: residual`` each generator has a slope of its own, where its docstring says, and the
    evaluator here has one more, in its logits.

    Rows of ``generator_args`` set a generator's own keys, e.g. ``{"NAR4Rec": {"n_lists": 4}, "CLIG":
    {"n_layers": 1}}``; keys that this model has itself (``n_layers``, ``n_heads``, ``d_ff``, ``rerank_loss``,
    ``score_fusion``, ``evaluator_…``) hold for all generators otherwise.
    """

    family = "generator-evaluator"
    position_inputs = ("vector",)
    paper = "Yang et al., SIGIR 2025: Comprehensive List Generation for Multi-Generator Reranking"
    permutation = "equivariant"
    score_adds_residual = True

    def __init__(self, config, catalogue):
        super().__init__(config, catalogue)
        names: List[str] = list(dict.fromkeys(config["generators"]))
        self.use_retriever = RETRIEVER in names
        self.generators = nn.ModuleDict()
        self._shared: List[Tuple[str, str]] = []  # prefixes of a generator's table, and of the table that it is
        # The look-up refuses names that nobody registered; arguments of generators left out are ignored.
        self.arguments: Dict[str, Any] = {
            name if name == CLIG else get_reranker(name).__name__: arguments
            for name, arguments in (config["generator_args"] or {}).items()
        }
        for name in names:
            if name != RETRIEVER:
                cls = get_reranker(name)
                if issubclass(cls, MGE) or cls.family == "framework" or cls.fits_itself:
                    raise ConfigError(f"generators: {cls.__name__} cannot be a generator of MGE")
                self._add(cls.__name__, cls, config, catalogue)
        self.others = list(self.generators)
        if config["clig"]:
            self._add(CLIG, PRM, config, catalogue)
        if not self.generators:
            raise ConfigError("generators: name at least one reranker, or set clig to True")
        self.clig_weight: float = config["clig_weight"]
        self.clig_temperature: float = config["clig_temperature"]
        self.evaluator_weight: float = config["evaluator_weight"]
        self.token = UserItemToken(self.dim, self.dim)
        self.evaluator = ListEvaluator(
            self.dim, config["evaluator_hidden"], self.slate_size, config["evaluator_kind"],
            n_heads=config["n_heads"],
        )  # fmt: skip

    def _add(self, name: str, cls: type, config, catalogue) -> None:
        generator = cls(GeneratorConfig(config, cls, self.arguments.get(name) or {}), catalogue)
        if isinstance(generator, NAR4Rec):
            generator.leave_choice_to_another()
        if getattr(generator, "freeze_evaluator", False):
            raise ConfigError(
                f"generator_args: {name} shares its item and user tables with the other generators, which go on moving "
                "them under a frozen evaluator: set freeze_evaluator to False"
            )
        shared = generator.embedder.share(self.embedder)
        self._shared += [(f"generators.{name}.embedder.{table}.", f"embedder.{table}.") for table in shared]
        self.generators[name] = generator

    def state_dict(self, *args: Any, prefix: str = "", **rest: Any) -> Dict[str, Any]:
        """The shared tables stand there once."""
        state = super().state_dict(*args, prefix=prefix, **rest)
        twice = tuple(prefix + own for own, _ in self._shared)
        for name in [name for name in state if name.startswith(twice)]:
            del state[name]
        return state

    def _upgrade(self, state_dict: Dict[str, Any], prefix: str) -> None:
        super()._upgrade(state_dict, prefix)
        for own, table in self._shared:
            for name in [name for name in state_dict if name.startswith(prefix + table)]:
                state_dict[prefix + own + name[len(prefix + table) :]] = state_dict[name]

    # ------------------------------------------------------------------ encoding, once per generator

    def encode(self, slate: UnscoredSlate) -> MGEContext:
        context = super().encode(slate)
        return MGEContext.of(
            context,
            tokens=self.token(context.candidates, context.user),
            generators={name: generator.encode(slate) for name, generator in self.generators.items()},
        )

    def score(self, context: MGEContext, slate: UnscoredSlate, x: Tensor) -> Tensor:
        logits = [g.logits(context.generators[name], slate, x) for name, g in self.generators.items()]
        return torch.stack([value.float() for value in logits]).mean(0)

    # ------------------------------------------------------------------ lists

    def propose(self, name: str, context: MGEContext, slate: Slate, x: Tensor) -> Proposal:
        """Lists and logits of generator ``name``."""
        generator, own = self.generators[name], context.generators[name]
        if isinstance(generator, NAR4Rec):
            matched = generator.match(cast(TokenContext, own), slate, x)
            return Proposal(generator.decode(matched, slate), generator.own_logits(matched))
        logits = generator.logits(own, slate, x)
        return Proposal(self._lists(generator, logits, slate, x), logits)

    def _lists(self, generator: AbstractReranker, logits: Optional[Tensor], slate: Slate, x: Tensor) -> Tensor:
        """The one list ``[B, 1, K]`` of a generator, from its logits where its ranking is theirs."""
        with torch.no_grad():
            if logits is not None and ranks_by_logits(generator):
                return top_positions(logits.detach().float(), slate.mask, self.slate_size).unsqueeze(1)
            return generator.generate(slate.with_scores(x.detach()).without_labels()).unsqueeze(1)

    def pool(self, context: MGEContext, slate: Slate, x: Tensor) -> Tuple[Tensor, Tensor]:
        """All proposed lists ``[B, M, K]``, in the order of the generators, and mean logits ``[B, n]``."""
        proposals = [self.propose(name, context, slate, x) for name in self.generators]
        lists = self._retriever_lists(slate) + [p.lists for p in proposals]
        return torch.cat(lists, dim=1), torch.stack([p.logits.float() for p in proposals]).mean(0)

    def _retriever_lists(self, slate: Slate) -> List[Tensor]:
        """The top K by the retriever's own scores even under synthetic ones, which are made of labels."""
        if not self.use_retriever:
            return []
        return [top_positions(slate.logged_scores, slate.mask, self.slate_size).unsqueeze(1)]

    def utility(self, context: MGEContext, slate: Slate, x: Tensor, lists: Tensor) -> Tensor:
        """What the evaluator gives for lists ``[B, M, K]``: expected DCG ``[B, M]``."""
        tokens, residual = self._tokens(context, slate, x), self.fusion.residual(x)
        return list_utility(self.evaluator, tokens, context.user, lists, residual)

    def _tokens(self, context: MGEContext, slate: Slate, x: Tensor) -> Tensor:
        return self.fusion(context.tokens, x, slate.mask)

    def predict(self, slate: Slate) -> Tensor:
        context = self.encode(slate)
        lists, logits = self.pool(context, slate, slate.scores)
        best = pick_best(lists, self.utility(context, slate, slate.scores, lists))
        return list_scores(best, logits, slate.mask)

    @torch.no_grad()
    def oracle(self, slate: Slate) -> Dict[str, Tensor]:
        """``lists``: choosing among the lists that all generators propose."""
        lists, _ = self.pool(self.encode(slate), slate, slate.scores)
        return {"lists": hit_shares(lists, slate, self.slate_size).amax(1)}

    # ------------------------------------------------------------------ training

    def learn(self, name: str, context: MGEContext, slate: Slate, x: Tensor) -> Tuple[Tensor, Tensor]:
        """One list ``[B, 1, K]`` and the own loss of generator ``name``, in one pass where possible."""
        generator, own = self.generators[name], context.generators[name]
        if isinstance(generator, NAR4Rec):
            matched = generator.match(cast(TokenContext, own), slate, x)
            with torch.no_grad():
                lists = greedy_decode(generator.log_matching(matched, slate.mask).unsqueeze(1), slate.mask)
            return lists, generator.generator_loss(matched, slate)
        if type(generator).loss is not AbstractReranker.loss:
            return self._lists(generator, None, slate, x), generator.loss(own, slate, x)
        logits = generator.logits(own, slate, x)
        return self._lists(generator, logits, slate, x), generator.criterion(logits, slate)

    def loss(self, context: MGEContext, slate: Slate, x: Tensor) -> Tensor:
        learned = [self.learn(name, context, slate, x) for name in self.others]
        total = sum((loss for _, loss in learned), x.new_zeros(()))
        lists = self._retriever_lists(slate) + [own for own, _ in learned]
        if CLIG in self.generators:
            logits = self.generators[CLIG].logits(context.generators[CLIG], slate, x)
            total = total + self.clig_loss(logits, slate, torch.cat(lists, dim=1) if lists else None)
            lists.append(self._lists(self.generators[CLIG], logits, slate, x))
        lists.append(top_positions(torch.rand_like(slate.logged_scores), slate.mask, self.slate_size).unsqueeze(1))
        judged = evaluator_loss(
            self.evaluator,
            self._tokens(context, slate, x),
            context.user,
            torch.cat(lists, dim=1),
            slate,
            self.fusion.residual(x),
        )
        return total + self.evaluator_weight * judged

    def clig_loss(self, logits: Tensor, slate: Slate, existing: Optional[Tensor]) -> Tensor:
        """Preference and comprehensiveness: ListCE − λ · soft-POD against lists ``[B, m, K]``."""
        loss = list_ce(logits, slate.feedback, slate.mask, slate.weights)
        if existing is None or self.clig_weight == 0:
            return loss
        return loss - self.clig_weight * soft_pod(logits.float(), existing, slate.mask, self.clig_temperature)

    def set_epoch(self, epoch: int) -> None:
        for generator in self.generators.values():
            generator.set_epoch(epoch)

    def prepare(self, train) -> None:
        super().prepare(train)
        for generator in self.generators.values():
            generator.prepare(train)

    def pretraining(self) -> List[Stage]:
        """The stages of all generators, one after another; each trains the shared tables as it would its own."""
        stages: List[Stage] = []
        for name, generator in self.generators.items():
            own = generator.pretraining()
            stages += [dataclasses.replace(stage, name=f"{name}, {stage.name}") for stage in own]
        return stages

    def parameter_groups(self) -> Dict[str, List[nn.Parameter]]:
        """One group of everything but what a generator itself leaves to its pretraining."""
        generators = self.generators.values()
        trained = {id(p) for g in generators for group in g.parameter_groups().values() for p in group}
        frozen = {id(p) for g in generators for p in g.parameters()} - trained
        return {"reranker": [p for p in self.parameters() if p.requires_grad and id(p) not in frozen]}


def ranks_by_logits(generator: AbstractReranker) -> bool:
    """Whether a generator's list is the top of its logits."""
    cls = type(generator)
    return cls.predict is AbstractReranker.predict and cls.generate is AbstractReranker.generate
