"""What else the same data allow: a StitchNet beside linear probing and fine-tuning.

In reading order:

- `methods.py`: `compare_methods`: what each method is, and the table of all
- `contenders.py`: the classifiers that are set side by side, and what making each of them took
- `finetuning.py`: `FineTuning`: fine-tuning as a practitioner does it
- `linear_probe.py`: logistic regression on features
- `flops.py`: seconds, and floating-point operations counted as they happen
- `tables.py`: the table on the console, and what its seconds and FLOPs count (`COUNTED`)

**Chosen on the selection images, always**: the source (by the loss of its linear probe; for all other methods of its
closed-form head), learning rate, penalty and StitchNet. Test images choose nothing. Heads that are not trained through
a network are fitted on all labelled images but the test's, once that is chosen; fine-tuning trains on the train images
and chooses its rate and epochs by the selection images. The column `labels` counts them. Parameters, MACs and latency
are of the whole classifier.

**What a search gives** are five rows of one search: the best source read at all depths, the best one that ends early
or sees smaller images, sources side by side, and the StitchNet, each with its head; all but the source keep the budget.
Each counts the whole search.

**The StitchNet** is the best one of the search, also where the search itself would rather take a source or an early
exit; the column `search_choice` then names that. "closed-form head, fine-tuned" tells what its fine-tuning owes to the
head that it starts with. The outcome on solar cells: for accuracy's sake composing is not worth it
(tests/benchmarks/README.md).

Example:
    >>> from lightning_stitch.baselines import METHODS, FineTuning
    >>> "StitchNet" in METHODS and "full fine-tuning" in METHODS
    True
    >>> finetuning = FineTuning(epochs=20, learning_rates=[1e-4, 5e-4])  # both are tried, and both count
    >>> compare_methods(search, data, finetuning=finetuning, directory="methods")  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
