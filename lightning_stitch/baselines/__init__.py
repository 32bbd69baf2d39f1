"""What else the same data allow: a StitchNet beside linear probing and fine-tuning.

In reading order:

- `methods.py`: `compare_methods`: what each method is, and the table of all
- `contenders.py`: the classifiers that are set side by side, and what making each of them took
- `finetuning.py`: `FineTuning`: fine-tuning as a practitioner does it, the best epoch by the selection images kept
- `flops.py`: seconds, and floating-point operations counted as they happen
- `tables.py`: the table on the console, as CSV and JSON
- `plots.py`: the figure: test accuracy against what training took

**Chosen on the selection images, always**: the source (by the loss of its linear probe; for all other methods of its
closed-form head), epoch, learning rate and StitchNet. Test images choose nothing. Labels are those of train and
selection images together, the same for every method.

**Counted**: all that a method needs from loaded sources to the finished classifier. On a source that is one pass of
every source over the train and selection images, and a head on each; for what is trained every epoch, forward and
backward, and the passes over the selection images, for every learning rate tried; for a StitchNet the whole search
(cutting, calibration, CKAs, solves, ranking) and the head; for what is fine-tuned also what it starts from. FLOPs are
counted as they run: convolutions, matrix products and attention by torch's formulas, Cholesky factors, solves and
eigendecompositions besides; two for each multiply-accumulate. Loading sources, test images and measuring latency
count for none. Seconds are wall time; `cpu_seconds` beside them depend less on what else runs. Parameters, MACs and
latency are of the whole classifier.

**The StitchNet** is the best one of the search, also where the search itself would rather take a source or an early
exit; the column `search_choice` then names that.

**Fine-tuning** is AdamW with a constant rate, the best epoch kept; `FineTuning` has flips, patience and moving
BatchNorm statistics (they stay by default). "closed-form head, fine-tuned" tells what a StitchNet's fine-tuning owes
to the head that it starts with.

The outcome on solar cells: for accuracy's sake composing is not worth it (tests/benchmarks/README.md).

Example:
    >>> from lightning_stitch.baselines import METHODS, FineTuning
    >>> "StitchNet" in METHODS and "full fine-tuning" in METHODS
    True
    >>> finetuning = FineTuning(epochs=10, learning_rates=[1e-4, 5e-4])  # both are tried, and both count
    >>> compare_methods(search, data, finetuning=finetuning, directory="methods")  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
