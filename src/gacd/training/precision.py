"""bf16 autocast that leaves the images alone."""

from typing import Any

from lightning_fabric.plugins.precision import MixedPrecision


class Bf16Autocast(MixedPrecision):
    """bf16-mixed without Fabric's cast of the inputs.

    Between 1/2 and 1 bf16 numbers are 1/256 apart: an attack's steps of 2/255 would be off by up to
    a quarter, and its images could leave the eps ball. The networks' own products are in bf16 all
    the same.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def convert_input(self, data: Any) -> Any:
        """The data as they are."""
        return data
