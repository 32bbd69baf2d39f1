from .class_names import look_up_classes
from .datamodule import CalibrationDataModule
from .image_files import ImageFileSet, list_images, select_readable
from .images import Decoder

__all__ = ["CalibrationDataModule", "Decoder", "ImageFileSet", "list_images", "look_up_classes", "select_readable"]
