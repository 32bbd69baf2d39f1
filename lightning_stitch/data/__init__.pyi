from .datamodule import CalibrationDataModule
from .image_files import ImageFileSet, list_images, select_readable
from .images import Decoder

__all__ = ["CalibrationDataModule", "Decoder", "ImageFileSet", "list_images", "select_readable"]
