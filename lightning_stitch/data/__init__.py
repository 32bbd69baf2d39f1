"""Images and labels.

Composing takes four disjoint sets of images: calibration (no labels used), train (the head), selection (choosing),
test (reporting). In reading order:

- `datamodule.py`: `CalibrationDataModule` draws these sets from a dataset, a folder or another data module
- `samplers.py`: the datasets of another data module, and which of their images its loaders draw
- `folders.py`: which folders are sets and classes, which files are images, what is left out
- `origins.py`: datasets taken apart through Subset, ConcatDataset and wrappers; their files
- `images.py`: images as datasets give them, checked and decoded to float tensors in [0, 1]
- `transforms.py`: random transforms, and the same datasets without
- `overlaps.py`: images that are the same, by their files' bytes or by what is drawn
- `target_values.py`: one image's target, checked
- `labels.py`: targets of whole datasets, and draws that are stratified by classes
- `class_names.py`: classes numbered by their names, whatever number each dataset gives them
- `image_files.py`: image files, folders of them and images in memory as datasets

Draws depend on seed and datasets alone, and each epoch's order on seed and epoch, so that a run which crashed and was
resumed ends with the weights of one that went through. Under several processes all must have drawn the same images.

Random transforms of `train` act in `train_dataloader` alone. All that is fitted in closed form or evaluated is drawn
with the transform of a val or test set of the same class, else without torchvision's random steps; a warning says where
chance is left.

`task="none"` is for images without labels; `image_folder` still holds them in at least one folder inside, as if that
were a class. Transforms of a dataset of your own are not in a recipe: predict with your own dataloader then. Image
files are resized as `image_size` says and upright as their EXIF orientation says; grey ones are repeated to three
channels, alpha is dropped, 16 bits count as such. PIL images from a dataset are converted alike.

Example:
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from lightning_stitch.data import CalibrationDataModule
    >>> digits = TensorDataset(torch.rand(100, 1, 8, 8), torch.arange(100) % 10)
    >>> CalibrationDataModule(digits, calibration_samples=20).summary
    {'calibration': 20, 'train': 48, 'selection': 16, 'test': 16}
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
