"""Import this, and timm knows the architecture "lightning_stitch".

Examples:
    >>> import timm
    >>> import lightning_stitch.timm
    >>> timm.is_model("lightning_stitch")
    True
"""

from lightning_stitch.networks.timm_entry import register

register()
