from .class_names import look_up_classes
from .datamodule import CalibrationDataModule, calibration_samples_of
from .folders import open_class_folders
from .image_files import ImageFileSet, LabelledImages, decode_images, is_files, list_images, select_readable
from .labels import number_labels
from .target_values import check_batch_labels

__all__ = [
    "CalibrationDataModule",
    "ImageFileSet",
    "LabelledImages",
    "calibration_samples_of",
    "check_batch_labels",
    "decode_images",
    "is_files",
    "list_images",
    "look_up_classes",
    "number_labels",
    "open_class_folders",
    "select_readable",
]
