"""Saved folders, their cards, and repositories on the hub.

In reading order:

- `folder.py`: what a saved folder holds, and reading its config.json
- `picture.py`: the composition drawn, with matplotlib
- `card.py`: README.md with metadata that the hub reads; `CardDetails` is what the author says
- `saving.py`: write config.json, model.safetensors and the card
- `structure.py`: what fragments did when they were saved, node by node, and what they do now
- `loading.py`: read them, from whomever they come
- `repository.py`: a hub repository to write to: what it holds, one commit, errors in words that help
- `space.py`: the files of a Space, whose page predicts with what was published
- `publishing.py`: `publish`: check, write, load again and compare, then upload

**Loading checks**, whoever wrote the folder: the size (before a download) and sha256 of the weights, and every tensor
against the recipe, whose structure is built without memory. Fields that this version does not know and other formats
are refused. A `python:` source needs `trust_factory=True`, which runs its code. A live module cannot be saved; the
error offers `export`. A stranger's recipe can still take long to build; Ctrl-C ends it. Folders and checkpoints say
what their fragments do: where a source's code does something else by now, a warning names the node and the versions.

**Publishing checks** licences, your credentials, a README.md that is there (`existing_card=`), the visibility asked
for, and that the saved folder gives the same outputs. `PublishAfterFit` checks all but the last before it trains.
Folders of your machine are left out of what is written.

**Licence**: that of all sources, where they are under the same one. Several become "other", with each source's
listed; unknown ones warn; those that forbid derivatives or sharing refuse unless `CardDetails(licence_override=...)`
gives a reason, which the card shows. It is no legal advice.

Publishing is tested with the real client against a stand-in for the hub, which fails on purpose; the real hub's own
rules and its Xet storage were out of reach.

Example:
    >>> from lightning_stitch.hub import CardDetails
    >>> details = CardDetails(dataset="me/solar-cells", metrics={"accuracy": 0.93}, num_images=512)
    >>> details.split
    'test'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
