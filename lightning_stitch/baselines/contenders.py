"""The classifiers that a comparison of methods sets side by side, and what making each of them took."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch._lightning import isolate_rng, pl
from lightning_stitch.baselines.finetuning import Classifier, FineTuning, Trained, train_best
from lightning_stitch.baselines.flops import Meter, Spent
from lightning_stitch.baselines.linear_probe import fit_logistic
from lightning_stitch.cost import Budget
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.heads import fit_ridge_head
from lightning_stitch.networks import StitchedNetwork
from lightning_stitch.recipe import Recipe
from lightning_stitch.search import fragments_in_words
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources import Source
from lightning_stitch.stitching import Kind, chunks, segment
from lightning_stitch.training import FragmentSearch, StitchedClassifier

Method = Literal[
    "linear probe",
    "closed-form head",
    "head-only fine-tuning",
    "full fine-tuning",
    "closed-form head, fine-tuned",
    "all depths",
    "early exit",
    "smaller image",
    "side by side",
    "StitchNet",
    "StitchNet, fine-tuned",
]
METHODS: tuple[Method, ...] = get_args(Method)
# Those that are judged, against all others.
COMPOSED: frozenset[Method] = frozenset(("side by side", "StitchNet", "StitchNet, fine-tuned"))
# What one search gives, and which kind of candidate each is.
_KINDS: dict[Method, Kind] = {
    "all depths": "source",
    "early exit": "early exit",
    "smaller image": "smaller image",
    "side by side": "side by side",
    "StitchNet": "stitched",
}
SEARCHED: frozenset[Method] = frozenset((*_KINDS, "StitchNet, fine-tuned"))
# Whose heads are fitted on all labelled images, calibration's too; the others train on the train images.
ON_ALL_LABELS: frozenset[Method] = SEARCHED | {"linear probe", "closed-form head"}

# A head's loss on the selection images, the head, and the penalty it was fitted with, if one was chosen.
_Fit = tuple[float, nn.Module, float | None]


@dataclass(frozen=True, slots=True)
class Contender:
    """A finished classifier: a network from images in [0, 1] to features, and a head from these to logits.

    Attributes:
        name: What the network is: its source, or its fragments.
        spent: What making it took.
        selection_loss: Mean cross-entropy on the selection images, in nats, by which it was chosen; None: by none.
        learning_rate: The network's, or that of the head alone, in training; None: it was not trained.
        penalty: The linear probe's.
        source: Which source it is, by its place; None: it is composed.
        search_choice: What the search ranked first, where that is no StitchNet; None otherwise.
    """

    network: nn.Module
    head: nn.Module
    name: str
    spent: Spent
    selection_loss: float | None = None
    learning_rate: float | None = None
    penalty: float | None = None
    source: int | None = None
    search_choice: str | None = None


class Contenders:
    """Makes the classifiers; what several of them share is made once, and counts for each.

    The search's own table and journal stay unused. `seed` is of first weights and flips.

    Raises:
        CutError: If a source cannot be cut, or does not take such images.
    """

    def __init__(
        self,
        search: FragmentSearch,
        sources: Sequence[Source],
        data: CalibrationDataModule,
        finetuning: FineTuning,
        *,
        seed: int,
        trainer_options: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.search = copy.copy(search)
        self.search.compare = False
        self.search.search_settings = replace(search.search_settings, journal=None)
        self.data = data
        self.finetuning = finetuning
        self.seed = seed
        self.trainer_options = trainer_options
        self.device = device
        settings = CalibrationSettings(granularity=search.calibration_settings.granularity)
        self.parts = [segment(source, settings, data.image_shape) for source in sources]

    def make(self, method: Method) -> Contender | None:
        """Make a method's classifier, on the device; None: the search found none that keeps its budget.

        Raises:
            BudgetError: If no network keeps the search's budget; likewise whatever else a search raises.
        """
        ways: dict[Method, Callable[[], Contender]] = {
            "linear probe": self._linear_probe,
            "closed-form head": self._closed_form_of_all,
            "head-only fine-tuning": partial(self._finetuned, head_alone=True),
            "full fine-tuning": self._finetuned,
            "closed-form head, fine-tuned": partial(self._finetuned, closed_form=True),
            "StitchNet, fine-tuned": self._stitched_finetuned,
        }
        with isolate_rng():
            torch.manual_seed(self.seed)
            return self._found[1].get(method) if method in _KINDS else ways[method]()

    # -- on a source -------------------------------------------------------------------------------------------------

    def _network(self, index: int) -> nn.Module:
        part = self.parts[index]
        return nn.Sequential(part.preprocess, part.graph.fragment(None, part.end)).to(self.device).eval()

    def _linear(self, num_features: int) -> nn.Linear:
        return nn.Linear(num_features, self.data.num_classes).to(self.device)

    @cached_property
    def _features(self) -> tuple[list[TensorDataset], list[TensorDataset], Spent]:
        """What each source gives of the train and the selection images, which are read once, with their labels."""
        networks = {index: self._network(index) for index in range(len(self.parts))}
        with Meter() as meter:
            train = self._run(networks, self.data.head_dataloader())
            selection = self._run(networks, self.data.selection_dataloader())
        return train, selection, meter.spent

    def _run(self, networks: Mapping[int, nn.Module], loader: DataLoader) -> list[TensorDataset]:
        collected: dict[int, list[Tensor]] = {index: [] for index in networks}
        labels = []
        for images, targets in loader:
            images = images.to(self.device)
            labels.append(targets)
            for index, network in networks.items():
                with torch.inference_mode():
                    collected[index] += [network(x) for x in chunks(images, self.parts[index].images_at_once)]
        # Joined outside of inference mode, these are ordinary tensors again, on which a head can be trained.
        return [TensorDataset(torch.cat(x).float(), torch.cat(labels).to(self.device)) for x in collected.values()]

    @cached_property
    def _closed_form(self) -> Contender:
        def fit(train: TensorDataset, selection: TensorDataset) -> _Fit:
            head, _ = fit_ridge_head(*train.tensors, num_classes=self.data.num_classes)
            return _loss(head, selection), head, None

        return self._best_source(fit)

    def _closed_form_of_all(self) -> Contender:
        return self._fitted_to_all(self._closed_form, lambda *rows, **options: fit_ridge_head(*rows, **options)[0])

    def _linear_probe(self) -> Contender:
        def fit(train: TensorDataset, selection: TensorDataset) -> _Fit:
            fits: list[_Fit] = []
            for penalty in self.finetuning.probe_penalties:
                head = fit_logistic(*train.tensors, num_classes=self.data.num_classes, penalty=penalty)
                fits.append((_loss(head, selection), head, penalty))
            return min(fits, key=lambda each: each[0])

        chosen = self._best_source(fit)
        assert chosen.penalty is not None
        return self._fitted_to_all(chosen, partial(fit_logistic, penalty=chosen.penalty))

    def _fitted_to_all(self, chosen: Contender, fit: Callable[..., nn.Module]) -> Contender:
        """The same with a head for all labelled images, as the search fits its own once it has chosen."""
        assert chosen.source is not None
        with Meter() as meter:
            others = self._run(
                {chosen.source: self._network(chosen.source)}, self.data.labelled_dataloader("calibration")
            )
            parts = [rows[chosen.source].tensors for rows in self._features[:2]] + [rows.tensors for rows in others]
            features, labels = (torch.cat(x) for x in zip(*parts, strict=True))
            head = fit(features, labels, num_classes=self.data.num_classes)
        return replace(chosen, head=head, spent=chosen.spent + meter.spent)

    # What reads more than the last features, ends earlier or sees smaller images is chosen likewise: by a fit on rows
    # of `_features` that hold all that the sources' one pass gives.
    def _best_source(self, fit: Callable[[TensorDataset, TensorDataset], _Fit]) -> Contender:
        """The source whose head has the least loss on the selection images, the first of them where several have."""
        train, selection, spent = self._features
        with Meter() as meter:
            fits = [fit(*rows) for rows in zip(train, selection, strict=True)]
        source = min(range(len(fits)), key=lambda index: fits[index][0])
        loss, head, penalty = fits[source]
        name = self.parts[source].name
        return Contender(self._network(source), head, name, spent + meter.spent, loss, penalty=penalty, source=source)

    def _finetuned(self, *, head_alone: bool = False, closed_form: bool = False) -> Contender:
        start = self._closed_form
        assert start.source is not None
        network = self._network(start.source).requires_grad_(not head_alone)
        num_features = self._features[0][start.source].tensors[0].shape[1]
        head = copy.deepcopy(start.head) if closed_form else self._linear(num_features)
        rate = self.finetuning.head_learning_rate
        model = Classifier(network, head, head_learning_rate=None if closed_form else rate)
        with Meter() as meter:
            trained = self._train(model, learning_rates=(rate,) if head_alone else self.finetuning.learning_rates)
        spent = start.spent + meter.spent
        return Contender(
            network, head, start.name, spent, trained.loss, learning_rate=trained.learning_rate, source=start.source
        )

    def _train(self, model: pl.LightningModule, *, learning_rates: Sequence[float]) -> Trained:
        return train_best(
            model,
            self.data.train_dataloader,
            self.data.selection_dataloader(),
            self.finetuning,
            learning_rates=learning_rates,
            seed=self.seed,
            trainer_options=self.trainer_options,
        )

    # -- composed ----------------------------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> tuple[StitchedClassifier, dict[Method, Contender]]:
        """The best of each kind of one search, by the selection images, and the module that holds the StitchNet.

        Where there is no StitchNet, that is what the search itself would take. Sources are there over the budget, too.
        """
        model, limits = StitchedClassifier(self.data.num_classes), self.search.search_settings.limits
        self.search.fetch_sources()
        with Meter() as meter:
            trainer = pl.Trainer(
                max_epochs=0, callbacks=[self.search], enable_checkpointing=False, **self.trainer_options
            )
            trainer.fit(model, datamodule=self.data)
        result, searched, found = self.search.result, meter.spent, dict[Method, Contender]()
        assert result is not None
        assert model.network is not None
        assert model.head is not None
        first, own = result.best.candidate, (copy.deepcopy(model.network), copy.deepcopy(model.head))
        for method, kind in _KINDS.items():  # the StitchNet last, which stays in the module
            budget = Budget() if kind == "source" else limits
            with Meter() as meter:
                if result.within(budget, kind=kind) is not None:
                    self.search.install_within(trainer, budget, kind=kind)
                elif kind == "stitched":
                    model.install(*own)
                else:
                    continue
            network, head = copy.deepcopy(model.network), copy.deepcopy(model.head)
            assert isinstance(network, StitchedNetwork)
            assert head is not None
            choice = f"{first.kind}: {first.recipe.path}" if kind == "stitched" and first.kind != kind else None
            spent = searched + meter.spent
            found[method] = Contender(network, head, _name(network.recipe), spent, search_choice=choice)
        self.search.pool = None  # and with it the sources
        return model, found

    def _stitched_finetuned(self) -> Contender:
        model, found = self._found
        contender = found["StitchNet"]
        with Meter() as meter:
            trained = self._train(model, learning_rates=self.finetuning.learning_rates)
        assert model.network is not None
        assert model.head is not None
        return replace(
            contender,
            network=model.network,
            head=model.head,
            spent=contender.spent + meter.spent,
            selection_loss=trained.loss,
            learning_rate=trained.learning_rate,
        )


def _name(recipe: Recipe) -> str:
    """A source's name where it is whole, else what the network is made of."""
    whole = len(recipe.runs) == 1 and recipe.fragments[-1].end is None
    return recipe.runs[0].ref.source if whole else fragments_in_words(recipe)


@torch.no_grad()
def _loss(head: nn.Module, rows: TensorDataset) -> float:
    """Mean cross-entropy."""
    features, labels = rows.tensors
    return float(functional.cross_entropy(head(features), labels))
