from .class_names import look_up_classes
from .datamodule import CalibrationDataModule, calibration_samples_of
from .folders import open_class_folders
from .image_files import ImageFileSet, list_images, select_readable
from .images import Decoder
from .target_values import check_batch_labels, read_labels

__all__ = [
    "CalibrationDataModule",
    "Decoder",
    "ImageFileSet",
    "calibration_samples_of",
    "check_batch_labels",
    "list_images",
    "look_up_classes",
    "open_class_folders",
    "read_labels",
    "select_readable",
]
