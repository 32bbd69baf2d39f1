"""Space, strategies, ranking, results.

In reading order:

- `space.py`: which fragment may follow which, how well they match, what that costs
- `scoring.py`: a running network against all receivers of a step at once
- `costs.py`: what any composition costs, and the least that one can cost, before anything is run
- `strategies.py`: `Beam`, networks of every size class from one search, and `DepthFirst`, the StitchNet paper's
  search
- `paths.py`: compositions along a given path: the sources as they are and self-stitched, early exits, what a user
  names
- `evaluation.py`: many candidates over the same images at once, what they begin with alike run once
- `ranking.py`: the order of candidates by what they gave on the selection images
- `results.py`: `SearchResult`: what was found, under which budget, and whether it was worth it
- `latency.py`: how long one image takes, measured where the networks are to run
- `stopping.py`: when a search stops composing before its strategy has said all
- `identity.py`: what a search depends on: where two differ, one's journal is not the other's

**Budgets** (`lightning_stitch.cost`). Every StitchNet and early exit of a result, and the network that is chosen,
keeps every limit; a way that cannot be completed within them is not walked. `max_activation_bytes` the search does
not go by: what it finds is assembled and counted, and kept only within the limit; before an image is read only a
limit below the image's own bytes is refused. `max_latency_ms` is the median of 9 runs of one image on the search's
device, after 3 to warm up. The search goes by the sum of its pieces' times, measured once, and may exceed the limit
by a quarter; what it finds is assembled, measured and kept only within the limit. It is the one limit under which a
search need not repeat exactly. `min_score` is the least leave-one-out accuracy on the selection images, or without
labels the least value of the ranking's first score.

**Early exits** are candidates of every search: each source ended at each of its cuts, that cut averaged over its
positions, with the same closed-form head (`exits=False` leaves them out). They are of sources alone, not of
compositions. `FragmentSearch` writes every candidate with its fragments, costs, scores and whether it is on the
Pareto sets to candidates.csv in the log directory.

**Rankings.** "loo_soft_r2" (the default with labels), "loo_r2", "consensus" (the default without), "cka_product" (the
paper's), or a function of your own. Scores hold leave-one-out accuracy and log-loss where there are labels, whatever
the ranking.

**Stopping and going on.** `time_limit` (seconds from the call) and Ctrl-C end the composing; what there is by then is
ranked and returned, the sources among it. Ctrl-C while images are calibrated or candidates ranked ends the search.
The same search with the same `journal` goes on where it was, after `kill -9` too, to the result of an uninterrupted
one, bit for bit on the same kind of machine. The journal (`lightning_stitch.io.journal`), a directory with an SQLite
file, remembers what the search was answered (CKAs, fitted stitches, features of selection images, latencies), not
where its strategy stood, so that it works for your own strategy, too, if that is deterministic. A `max_candidates` or
`time_limit` may be raised, and the ranking changed; another search's journal is refused, and what differs is named.
Of several ranks each has a directory of its own in it. Delete it when you are done.

Example:
    >>> import torch
    >>> from lightning_stitch import Budget, Pool, load_sources
    >>> images = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> pool = Pool(load_sources([{"spec": "test_resnet", "pretrained": False}]), (3, 64, 64))
    >>> result = pool.search([images[:16]], [images[16:]], max_candidates=4)
    >>> cheap = result.within(Budget(max_macs=result.best_source.candidate.cost.macs / 2))
    >>> cheap.candidate.kind
    'early exit'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
