from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import lightning_stitch

PACKAGE = Path(lightning_stitch.__file__).parent
FILES = {file.stem: file for file in sorted(PACKAGE.glob("**/*.py")) if file.stem != "__init__"}

# The order of DESIGN section 3, each of its groups drawn out into as many lines as its modules' own imports need.
# A module imports only from lines above its own.
GROUPS = (
    {"errors"},
    {"recipe", "held_out"},
    {"ensemble_recipe"},
    {
        "_rows",
        "targets",
        "confidence",
        "class_maps",
        "progress",
        "stopping",
        "_lightning",
        "_spool",
        "_copying",
        "_tensor_files",
        "_markdown",
    },
    {"_shuffling", "_resuming", "_preparing", "callback_order", "_target_values"},
    {"_meta"},
    {"functional", "regression", "layerwise", "neighbours", "_images"},
    {"class_means"},
    {"shortlist"},
    # similarity, sources, graph, activations, stitches, healing, cost
    {"similarity", "preprocessing", "_memory", "_operators", "_tracing", "_layout", "_blueprint"},
    {"_probing", "flops"},
    {"_dataflow", "_example_tracing", "_granularity", "_hub_files", "_module_sources"},
    {"_modes"},
    {"cost", "graph", "_timm_sources"},
    {"_finding"},
    {"sources", "stitches"},
    {"folding"},
    {"segments"},
    {"activations", "compositions", "latency", "_identity", "source_checks"},
    {"calibration_files", "journal", "fitting", "layer_healing"},
    # what is saved of a network: files and card
    {"licences", "composition_plot", "_pretrained_config", "_timm_hook"},
    {"_pretrained_places"},
    {"pretrained_files"},
    {"pretrained_reading"},
    {"_making_again"},
    {"model_card"},
    {"saving"},
    # network, heads, search
    {"candidates", "heads", "network"},
    {"scoring", "prefix_tree", "trials", "head_settings", "cross_fitting"},
    {"space", "healing"},
    {"search", "ranking", "paths", "refinement"},
    {"remembered", "careful_ranking"},
    {"results", "batches"},
    # compose, report, hub, export
    {"pool", "report", "candidate_table", "method_table", "preflight_table"},
    {"comparison", "shrinking", "personal", "ensembles", "method_plot"},
    {"classifier_files", "hub_repository"},
    {"publishing"},
    {"timm_network"},
    {"_timm_entry"},
    # module, data
    {"backbones", "thawing", "task_metrics", "prediction_table"},
    {"training_plan"},
    {"_labels", "_image_files"},
    {"module", "data", "finetuning"},
    {"head_fitting", "search_report"},
    {"slots"},
    {"callbacks", "predicting"},
    {"predict_command", "publish_callback", "publish_command"},
    # what compares methods, and runs trainers of its own
    {"contenders"},
    {"methods"},
    {"trainer"},
    {"cli"},
)
RANK = {module: rank for rank, group in enumerate(GROUPS) for module in group}
MAY_IMPORT_LIGHTNING = {
    "_lightning",
    *("_images", "_labels", "_resuming", "_preparing", "callback_order"),
    *("module", "data", "slots", "search_report", "callbacks", "predicting", "predict_command", "cli"),
    *("publish_callback", "publish_command"),
    *("finetuning", "contenders", "methods", "trainer"),
}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_stitch._lightning"}


def imported(module: str) -> set[str]:
    """Dotted names of the modules that a module imports anywhere: at its top, in functions, for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from lightning_stitch import x` means the module x.
            whole = node.module == "lightning_stitch"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {str(node.module)}
    return found


def imported_here(module: str) -> set[str]:
    """Those of this package, without its name."""
    return {name.removeprefix("lightning_stitch.") for name in imported(module) if name.startswith("lightning_stitch.")}


def test_every_module_has_its_place() -> None:
    assert sorted(FILES) == sorted(module for group in GROUPS for module in group)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    assert {other for other in imported_here(module) if RANK[other] >= RANK[module]} == set()


@pytest.mark.parametrize("module", FILES)
def test_only_modules_for_the_trainer_import_lightning(module: str) -> None:
    names = {name for name in imported(module) if LIGHTNING & {name, name.split(".")[0]}}
    assert not names or module in MAY_IMPORT_LIGHTNING


def test_recipe_needs_the_standard_library_alone() -> None:
    outside = {name for name in imported("recipe") if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"lightning_stitch.errors"}


@pytest.mark.parametrize(
    ("module", "other"),
    [("sources", "graph"), ("callbacks", "_lightning"), ("sources", "_timm_sources"), ("_labels", "_images")],
)
def test_the_reading_of_imports_sees_those_that_are_there(module: str, other: str) -> None:
    assert other in imported_here(module)


def test_the_reading_of_imports_sees_those_inside_functions() -> None:
    assert "timm" in imported("_timm_sources")
