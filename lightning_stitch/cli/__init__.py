"""The command line, `lightning-stitch`.

In reading order:

- `main.py`: which command is meant, and how an error is told
- `parsers.py`: parsers from functions: a command's options are its function's parameters, their help is its docstring
- `trainer.py`: `StitchTrainer`: Lightning's Trainer with `check` and `compare` beside `fit` and `test`
- `refusals.py`: what a configuration is refused for, in one sentence
- `options_page.py`: the options of this package's classes, which `fit --help` begins with
- `compose.py`: a classifier for a folder of images, in one call
- `init.py`: a commented configuration for a folder of images
- `inspect.py`: cuts, costs and licence of one source
- `predict.py`: class names and probabilities of image files
- `export.py`: the network of a checkpoint as ONNX or as a program of PyTorch's
- `report.py`: the page of a search, made again
- `app.py`: an app in the browser
- `publish.py`: share the network of a checkpoint on the hub
- `__main__.py`: `python -m lightning_stitch.cli` is `lightning-stitch`

`fit`, `validate`, `test`, `predict_data`, `check` and `compare` take one configuration, of any LightningModule and
LightningDataModule. With `max_epochs: 0` a Trainer writes no checkpoint, so `fit` leaves `stitched.ckpt` in the log
directory. Under `lightning` (`pip install "lightning-stitch[cli,lightning]"`) the command line needs
`LIGHTNING_STITCH_NAMESPACE=lightning`; write `CSVLogger` rather than `pytorch_lightning.loggers.CSVLogger`, and a
configuration serves both packages.

Example::

    lightning-stitch compose photographs resnet18.a1_in1k efficientnet_b0.ra_in1k --budget 50%
    lightning-stitch check --config examples/solar_cells.yaml
    lightning-stitch fit --config examples/solar_cells.yaml
    lightning-stitch test --config examples/solar_cells.yaml --ckpt_path logs/solar_cells/version_0/stitched.ckpt
    lightning-stitch predict logs/solar_cells/version_0/stitched.ckpt new_images/ one_more.png --output predictions.csv
    lightning-stitch export logs/solar_cells/version_0/stitched.ckpt solar.onnx
    lightning-stitch compare --config examples/solar_cells.yaml --finetuning.epochs 5
    lightning-stitch compare --config examples/solar_cells.yaml --methods '["StitchNet", "full fine-tuning"]'
    lightning-stitch inspect resnet50.a1_in1k --json
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
