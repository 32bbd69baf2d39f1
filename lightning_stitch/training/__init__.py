"""Lightning's hooks: everything that a Trainer runs.

In reading order:

- `module.py`: `StitchedClassifier`: a stitched network with a head, as a LightningModule
- `fragment_search.py`: `FragmentSearch`: the callback that runs the search before fitting
- `places.py`: where it puts the network: a `StitchedClassifier`'s own, or another module's attribute
- `backbone_place.py`: that attribute of your own LightningModule
- `data_checks.py`: what both places check of the data
- `search_report.py`: what a search inside a Trainer writes, logs and prints
- `thawing.py`: what trains, from which epoch on, at which learning rate
- `task_metrics.py`: what each task is trained by, measured by and told as
- `checkpoints.py`: a finished classifier, out of a checkpoint or a saved folder
- `callback_order.py`: which callbacks must stand behind the search
- `predicting.py`: `predict_files`, the data module `ImageFiles` and the callback `PredictionWriter`
- `publish_after_fit.py`: `PublishAfterFit`: publish when fit is over, from rank zero

**Thawing.** `thaw` is one of these, or a schedule by epoch such as `{0: "head", 3: "stitches", 6: "all"}`:

| thaw | what trains |
|---|---|
| "head" | the head alone |
| "stitches" | also the layers that hold the stitches' numbers |
| "neighbours" | also the nearest layers before and behind each stitch, with the normalisations on the way |
| "all" (default) | everything |

A stitch that was folded lives in a layer of a fragment (`describe()` says in which), so "stitches" trains that layer.
What is frozen keeps parameters and BatchNorm buffers bit for bit, through validation, stochastic weight averaging and
a resumed run; `EMAWeightAveraging` averages frozen weights as well and rounds them in the last digit. The network
stays in eval mode while it trains; `train_mode=True` puts thawed layers, and no others, in train mode.
`backbone_lr_factor` is the fragments' learning rate relative to that of head and stitches; `fragment_lr_decay` lowers
it for each fragment further from the head. A few labels are soon trained too far (tests/benchmarks/README.md): choose
learning rate and epochs on held-out images.

The optimizer holds all parameters from the start, in groups named "head", "stitch_1", "fragment_1", ..., so that
`LearningRateMonitor` shows `lr-AdamW/stitch_1`, and a checkpoint of any epoch can be resumed, also under another
schedule. It must have groups of parameters, so LBFGS will not do. Under `strategy="ddp"` a schedule thaws on all
ranks alike; under FSDP and DeepSpeed schedules were not tried.

**Order of callbacks.** `FragmentSearch` stands before callbacks that look at the module when they are set up
(`WeightAveraging`, `StochasticWeightAveraging`, `ModelPruning`, `BackboneFinetuning`); another order is refused with
the one that works.

**Resuming.** A run that restores a checkpoint, `fit(ckpt_path=...)`, ends with the checkpoint's network. Lightning
names the checkpoint only after callbacks are set up, so that a module without a recipe is searched for once, for
nothing. Loading the module first (`load_from_checkpoint`) spares that, and so does `FragmentSearch.ckpt_path`, which
`lightning-stitch fit --ckpt_path FILE` sets.

**Ranks.** Every rank runs the same search, and rank zero's recipe is used. `ddp_spawn` leaves nothing in the parent
process. FSDP, DeepSpeed and ModelParallel need `StitchedClassifier(recipe=...)`.

**Predicting.** The checkpoint is all it takes: size and channels come from its recipe, mean and standard deviation
are in the network, class names are in the hyper-parameters (`FragmentSearch` takes them from the data module;
`--class_names` gives them to a checkpoint without). Files and folders, folders with those inside, are sorted by name,
and a file that is named twice is one row. An unreadable image is an error and leaves no file, unless
`skip_unreadable`; a file that is there is replaced only with `overwrite`. In a Trainer, and in YAML for
`lightning-stitch predict_data`, `ImageFiles` and `PredictionWriter` do the same; on several devices rank zero gathers
the rows and writes one file, in the same order. `PredictionWriter` takes any module whose `predict_step` gives a row
of numbers for each image; `class_names` and `task` of the module name the columns.

**Publishing from YAML**, when fit is over::

    callbacks:
      - class_path: lightning_stitch.PublishAfterFit
        init_args:
          repo_id: me/solar
          private: true
          details: {class_path: lightning_stitch.CardDetails, init_args: {dataset: me/solar-cells}}

**Both Lightnings** (`lightning_stitch._lightning`). `pytorch_lightning` and `lightning.pytorch` hold the same classes
twice, and a Trainer of the one refuses modules of the other. The one that the process imported first is used, or the
one that `LIGHTNING_STITCH_NAMESPACE` names ("lightning" or "pytorch_lightning"). `pip install
"lightning-stitch[lightning]"` installs both packages, which live side by side; where only `lightning` is installed
(`pip install --no-deps lightning-stitch`, and the other dependencies by hand), it is taken without being named. Plain
checkpoints serve both; those of LightningCLI are taken over by `lightning-stitch predict`. Callbacks refuse a Trainer
or a module of the other package in `setup`, by both names and with the mend, before sources are fetched. What
Lightning itself refuses, before anything of this library runs, is a module or a data module given to the other
package's Trainer (`model must be a LightningModule`), and its words name one package. So where both packages are
loaded and the variable is not set, making a `StitchedClassifier` or a `FragmentSearch` warns whose classes they are.

Example:
    >>> from lightning_stitch.training import FragmentSearch, StitchedClassifier
    >>> model = StitchedClassifier(num_classes=2, thaw={0: "head", 3: "all"}, lr=1e-3)
    >>> search = FragmentSearch(["resnet50.a1_in1k", "densenet121.ra_in1k"])
    >>> pl.Trainer(max_epochs=0, callbacks=[search]).fit(model, data)  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
