"""Client of a hosted frozen vision transformer: images to prompted pictures, embeddings to classes, without torch."""

from __future__ import annotations

from fastprompt_client.client import Client, Prediction, Verification
from fastprompt_client.folder import FolderError
from fastprompt_client.host import HostError, HostMismatch

__version__ = "0.1.0"
__all__ = ["Client", "FolderError", "HostError", "HostMismatch", "Prediction", "Verification", "__version__"]
