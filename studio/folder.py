"""The studio's folder and the folders in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Studio:
    """The folders that the server reads and writes; nothing outside of them."""

    folder: Path  # absolute

    @property
    def datasets(self) -> Path:
        """One folder for each dataset, as `zeroprior train` reads it."""
        return self.folder / "datasets"

    @property
    def outputs(self) -> Path:
        """One folder for each run, also of runs that were started elsewhere."""
        return self.folder / "outputs"

    @property
    def images(self) -> Path:
        """Generated images, by day."""
        return self.outputs / "images"

    @property
    def weights(self) -> Path:
        """Uploaded LoRAs."""
        return self.folder / "weights"

    @property
    def trash(self) -> Path:
        """Deleted items, until they are restored or expire."""
        return self.folder / "trash"
