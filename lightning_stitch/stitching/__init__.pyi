from .activations import Calibrated, Grid, calibrate, centred_or_none, positions, rows_on_grids, rows_to_fit
from .calibration import Calibration, saved_settings, settings_identity, source_identity
from .candidates import Candidate, Kind, Read, Step, Way, piece_keys, pieces_of, tree_of
from .fitting import fit_stitch, stitch_from_fit
from .folding import (
    PLACES,
    Array,
    Entering,
    Leaving,
    cheapest_places,
    fold_into_consumer,
    fold_into_producer,
    stitch_cost,
)
from .image_checks import Batch, check_images, images_of, is_empty, object_to
from .images import WithoutLabels, read_images, store_images
from .segments import Segmented, chunks, segment
from .stitches import Stitch, is_bridgeable, stitch_spec
from .taps import Reading

__all__ = [
    "PLACES",
    "Array",
    "Batch",
    "Calibrated",
    "Calibration",
    "Candidate",
    "Entering",
    "Grid",
    "Kind",
    "Leaving",
    "Read",
    "Reading",
    "Segmented",
    "Step",
    "Stitch",
    "Way",
    "WithoutLabels",
    "calibrate",
    "centred_or_none",
    "cheapest_places",
    "check_images",
    "chunks",
    "fit_stitch",
    "fold_into_consumer",
    "fold_into_producer",
    "images_of",
    "is_bridgeable",
    "is_empty",
    "object_to",
    "piece_keys",
    "pieces_of",
    "positions",
    "read_images",
    "rows_on_grids",
    "rows_to_fit",
    "saved_settings",
    "segment",
    "settings_identity",
    "source_identity",
    "stitch_cost",
    "stitch_from_fit",
    "stitch_spec",
    "store_images",
    "tree_of",
]
