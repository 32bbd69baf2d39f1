"""Lightning's hooks: everything that a Trainer runs.

In reading order: `module.py` (`StitchedClassifier`) with `task_metrics.py` and `thawing.py`; `fragment_search.py`
(`FragmentSearch`) with `places.py`, `backbone_place.py` and `data_checks.py` (where the network goes, and for which
data), `callback_order.py` and `search_report.py`; then what a trained network is used for: `checkpoints.py`,
`predicting.py`, `finished.py` and `publish_after_fit.py`; `one_call.py` (`compose`) is all of it in one call.

**Optimizers.** All parameters are there from the start, in groups named "head", "stitch_2", "fragment_2", ..., so that
`LearningRateMonitor` shows `lr-AdamW/stitch_2` and a checkpoint of any epoch can be resumed, also under another
schedule. LBFGS, which knows no groups, will not do. What is frozen stays so through stochastic weight averaging, too;
`EMAWeightAveraging` rounds frozen weights in the last digit. A few labels are soon trained too far: choose learning
rate and epochs on held-out images.

**Stages.** A network that stops when it is sure is tested and predicts that way. Training runs all of it, its loss is
the sum over its stages, and thresholds stay until `StitchedClassifier.fit_thresholds` sets them by images held out.

**Files.** A search leaves candidates.csv, report.html with its figures, report.json and, of a comparison,
comparison.csv and comparison.json in the log directory; without a logger in the Trainer's `default_root_dir`, or where
that is the working directory in `stitch_logs/version_N` there. With max_epochs=0 `stitched.ckpt` is beside them.

**Messages** go through the logger "lightning_stitch", by default to the standard output: a search's summary is always
said. Bars are shown where the Trainer shows its own.

**Callbacks.** `FragmentSearch` stands before callbacks that look at the module when they are set up (`WeightAveraging`,
`StochasticWeightAveraging`, `ModelPruning`, `BackboneFinetuning`).

**Resuming.** `fit(ckpt_path=...)` ends with the checkpoint's network. Lightning names the checkpoint only after the
callbacks are set up, so that a module without a recipe is searched for once, for nothing. Loading the module first
(`load_from_checkpoint`) spares that, and so does `FragmentSearch.ckpt_path`, which `lightning-stitch fit --ckpt_path
FILE` sets.

**Modules of your own.** `examples/finetune_stitched.py` has one; `StitchedBackbone` says how widths are matched. Where
its forward is a linear layer behind the backbone, `StitchedClassifier.of_module` makes a classifier of it, to be saved,
published and exported; `predict`, `export` and `publish` take its checkpoint, if the search fitted that layer
(`head_attribute`).

Example:
    >>> from lightning_stitch.training import FragmentSearch, StitchedClassifier
    >>> model = StitchedClassifier(num_classes=2, thaw={0: "head", 3: "all"}, lr=1e-3)
    >>> search = FragmentSearch(["resnet50.a1_in1k", "densenet121.ra_in1k"])
    >>> pl.Trainer(max_epochs=0, callbacks=[search]).fit(model, data)  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
