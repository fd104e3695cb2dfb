"""Mesh, process groups, collectives. Importing it quiets what the pinned libraries always say."""

import warnings

for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
