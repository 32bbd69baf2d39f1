from .activations import Calibrated, Grid, calibrate_all, centred_or_none, positions, rows_on_grids, rows_to_fit
from .candidates import Candidate, Kind, Step
from .fitting import fit_rows, fit_stitch, fitted_stitch
from .folding import choose_placement, consumer_layers, fold_into_consumer, fold_into_producer, stitch_cost
from .images import Batch, WithoutLabels, images_of, put_down, read_again
from .saved_calibration import (
    calibrate_once,
    load_calibration,
    save_calibration,
    saved_settings,
    settings_identity,
    source_identity,
)
from .segments import Segmented, check_same_outputs, chunks, segment
from .stitches import GlobalAverage, Stitch, is_bridgeable, stitch_memory, stitch_spec

__all__ = [
    "Batch",
    "Calibrated",
    "Candidate",
    "GlobalAverage",
    "Grid",
    "Kind",
    "Segmented",
    "Step",
    "Stitch",
    "WithoutLabels",
    "calibrate_all",
    "calibrate_once",
    "centred_or_none",
    "check_same_outputs",
    "choose_placement",
    "chunks",
    "consumer_layers",
    "fit_rows",
    "fit_stitch",
    "fitted_stitch",
    "fold_into_consumer",
    "fold_into_producer",
    "images_of",
    "is_bridgeable",
    "load_calibration",
    "positions",
    "put_down",
    "read_again",
    "rows_on_grids",
    "rows_to_fit",
    "save_calibration",
    "saved_settings",
    "segment",
    "settings_identity",
    "source_identity",
    "stitch_cost",
    "stitch_memory",
    "stitch_spec",
]
