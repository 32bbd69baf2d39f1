"""Downloads, tensor files, activations that wait on disk.

In reading order:

- `hub_download.py`: single files of a hub repository, with a clear error at once where they cannot be had
- `tensor_files.py`: files that are either there in full or not there at all
- `activation_store.py`: activations of all calibration images in an unnamed temporary file, read a few at a time
- `fingerprints.py`: hashes of tensors and settings, and how two descriptions differ, in words
- `journal.py`: the answers that cost a search something to find, in SQLite, so that a stopped search can go on

Downloads are huggingface_hub's, and so are its retries and its cache (`HF_HOME`). With `HF_HUB_OFFLINE=1` only the
cache is used: what is not in it is an error at once that names the file, its repository and the command that gets it.

Files are safetensors and JSON. Nothing is unpickled.

Example:
    >>> import torch
    >>> from lightning_stitch.io import tensors_hash
    >>> tensors_hash([torch.zeros(2)]) == tensors_hash([torch.zeros(2)])
    True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
