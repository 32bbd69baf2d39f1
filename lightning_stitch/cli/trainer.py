"""The commands that take a configuration: LightningCLI's, with `check` and `compare` beside `fit` and `test`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_stitch._lightning import NAMESPACE, explain_both_loaded, pl
from lightning_stitch.baselines import METHODS, FineTuning, Method, compare_methods, print_methods
from lightning_stitch.cli.refusals import OneSentenceParser
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import SourceError, StitchError
from lightning_stitch.io import check_content
from lightning_stitch.progress import Bar, Silent
from lightning_stitch.sources import Preflight, preflight, print_preflight, refusal
from lightning_stitch.tables import Record
from lightning_stitch.training import FragmentSearch, StitchedClassifier, check_order, place_for_network

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI
else:
    LightningCLI = import_module(f"{NAMESPACE}.cli").LightningCLI

_RECIPE = FineTuning()
_RESOLVED = ("best", "last", "hpc", "registry")  # not paths: the Trainer knows what they stand for


class StitchTrainer(pl.Trainer):
    """A Trainer that can also check sources and compare methods, for the search that is among its callbacks.

    Its first logger says where to write.
    """

    # By another name on the command line, where `predict` takes a checkpoint and image files.
    predict_data = pl.Trainer.predict

    def check(
        self,
        model: pl.LightningModule,
        datamodule: CalibrationDataModule | None = None,
        json: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Preflight:
        """Check the sources of a search before anything is downloaded: the configuration is that of `fit`.

        Prints one line for each source: whether it fits and why not, its cuts, cost, licence and download.

        Args:
            model: The module that the search is for.
            datamodule: The images.
            json: Whether to print JSON instead.
            ckpt_path: Not used; here because configurations of `fit` have it.
            weights_only: Likewise.

        Returns:
            What `preflight` tells of them.

        Raises:
            SourceError: After printing, if a source cannot be used and the search would not go on without it.
            StitchError: If there is no FragmentSearch among the callbacks; after printing, if the images, the module
                and the search do not suit each other.
        """
        search = self._search("check")
        check_order(self, search)
        place = place_for_network(model, search.attribute, search.head_attribute)
        unfit: list[StitchError] = []

        def image_shape() -> tuple[int, int, int] | None:
            shape = None
            try:
                if isinstance(datamodule, CalibrationDataModule):
                    datamodule.prepare_data()
                    shape = datamodule.image_shape
                if datamodule is not None:
                    search.check_run(self, model, datamodule)
            except StitchError as error:
                unfit.append(error)
            return shape

        settings = search.settings_until(place.head_settings.until)
        checked = preflight(search.sources, image_shape=image_shape, settings=settings, regardless=True)
        beside = checked  # what is said of the sources alone
        checked = replace(checked, problems=(*checked.problems, *map(str, unfit)))
        if json:
            print(dumps(checked.to_dict(), indent=2))
        else:
            print_preflight(checked)
        if beside.problems or not (beside.fits or search.skip_rejected):
            raise SourceError(refusal(beside))
        if unfit:
            raise unfit[0]
        return checked

    def _search(self, command: str) -> FragmentSearch:
        searches = [callback for callback in self.callbacks if isinstance(callback, FragmentSearch)]  # type: ignore[attr-defined]
        if len(searches) != 1:
            raise StitchError(f"{command} needs one FragmentSearch among trainer.callbacks; found {len(searches)}.")
        return searches[0]

    def compare(
        self,
        model: pl.LightningModule,
        datamodule: CalibrationDataModule | None = None,
        methods: list[Method] = list(METHODS),  # noqa: B006 (never changed; shown as the default in the help)
        finetuning: FineTuning = _RECIPE,
        plot: bool = True,
        seed: int = 0,
    ) -> list[Record]:
        """Compare a StitchNet with linear probing and fine-tuning on the same sources and split.

        The configuration is that of `fit`. Prints the table and writes methods.csv, methods.json and methods.png in
        the log directory.

        Args:
            model: A StitchedClassifier; new ones are made of its number of classes.
            datamodule: The images.
            methods: Which methods to compare.
            finetuning: How networks and heads are trained.
            plot: Whether to draw accuracy against training FLOPs, with matplotlib.
            seed: Of the heads' first weights and of flips; the data module has its own.

        Returns:
            One row for each method (`compare_methods`).

        Raises:
            StitchError: If there is no FragmentSearch among the callbacks, or as `compare_methods`.
        """
        search = self._search("compare")
        if not isinstance(model, StitchedClassifier):
            raise StitchError(f"compare takes a StitchedClassifier; found {type(model).__name__}.")
        if datamodule is not None:
            model.take_classes(datamodule.num_classes)
        if datamodule is not None and datamodule.num_classes != model.num_classes:
            raise StitchError(
                f"The data have {datamodule.num_classes} classes, StitchedClassifier has "
                f"num_classes={model.num_classes}."
            )
        if self.fast_dev_run:  # type: ignore[attr-defined]
            raise StitchError("compare has no fast_dev_run; lower finetuning.epochs and the data's train_samples.")
        directory = Path(self.log_dir or self.default_root_dir)
        options = {"accelerator": self.accelerator, "devices": self.num_devices, "precision": self.precision}
        if self.num_devices == 1 and self.strategy.root_device.index is not None:
            options["devices"] = [self.strategy.root_device.index]
        with Silent() if self.progress_bar_callback is None else Bar() as progress:
            rows = compare_methods(
                search,
                datamodule,  # type: ignore[arg-type]
                methods=methods,
                finetuning=finetuning,
                directory=directory,
                plot=plot,
                seed=seed,
                trainer_options=options,
                progress=progress,
            )
        print_methods(rows, title="Test images: what can be done with these sources and labels, and what it takes")
        print(f"The table is in {directory / 'methods.csv'} and {directory / 'methods.json'}.")
        if plot:
            print(f"Accuracy against training FLOPs is drawn in {directory / 'methods.png'}.")
        return rows


class StitchCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, that keeps the result of a run without training.

    With `max_epochs: 0` a Trainer writes no checkpoint, so one is written after fit: `stitched.ckpt` in the log
    directory, which `test`, `predict` and `load_from_checkpoint` take.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `check` and `compare`, which take the same configuration."""
        commands = LightningCLI.subcommands()
        commands["predict_data"] = commands.pop("predict")
        return {**commands, "check": {"model", "datamodule"}, "compare": {"model", "datamodule"}}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, and refuse a checkpoint that is not there before it is read and images and sources are looked for."""
        super().parse_arguments(parser, args)
        given = self.config[self.config.subcommand].get("ckpt_path")
        if given is None or str(given).startswith(_RESOLVED) or "://" in str(given):
            return
        if not Path(given).exists():
            raise StitchError(f"The checkpoint {given} (--ckpt_path) does not exist.")
        if Path(given).is_file():
            check_content(Path(given))

    def before_fit(self) -> None:
        """Spare a search whose network a checkpoint replaces; "last" and the like only the Trainer can resolve."""
        path = self.config["fit"].ckpt_path
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FragmentSearch) and path is not None and Path(path).is_file():
                callback.ckpt_path = path

    def after_fit(self) -> None:
        """Save what a search without training made."""
        if self.trainer.max_epochs != 0 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        searches = [callback for callback in self.trainer.callbacks if isinstance(callback, FragmentSearch)]  # type: ignore[attr-defined]
        path = next((search.checkpoint for search in searches if search.checkpoint is not None), None)
        if path is None:
            path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "stitched.ckpt"
            self.trainer.save_checkpoint(path)
        if self.trainer.is_global_zero:
            print(f"The stitched network is in {path}.")


def run_configured(arguments: Sequence[str] | None) -> None:
    """Run one of `StitchCLI`'s commands.

    Args:
        arguments: The command and its options; None: those of the process.
    """
    try:
        StitchCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            trainer_class=StitchTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=OneSentenceParser,
            # A table of modules, whose FLOPs are 0 before anything ran, under the table of what was found.
            trainer_defaults={"enable_model_summary": False},
            # A second run with the same version directory would stop at the first one's saved configuration.
            save_config_kwargs={"overwrite": True},
            args=None if arguments is None else list(arguments),
        )
    except SystemExit as stop:
        # jsonargparse says only that a class is no subclass, by a name that both packages share.
        if stop.code == 2 and (hint := explain_both_loaded()) is not None:
            print(f"note: {hint}", file=sys.stderr)
        raise
