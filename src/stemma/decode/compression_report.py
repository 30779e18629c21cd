"""What a compressed cache keeps, layer by layer."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CompressionReport", "LayerReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one layer keeps, mean over rows."""

    layer: int
    window: int | None
    """Its sliding window where that is shorter than the longest row. Such rows are bounded: what the window shows of
    them is kept, and is not part of the budget."""
    seen: float
    """Tokens."""
    kept: float
    """Tokens that are stored."""
    retained_mass: float | None
    """Share of the prompt's importance that was kept; None where it was not observed."""
    bytes: int
    """Keys, values, positions and attention mass of all rows, holes included and free room not."""


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What a cache keeps."""

    rows: int
    layers: tuple[LayerReport, ...]
    kept_bytes: int
    """Of all layers, see `LayerReport.bytes`."""
    allocated_bytes: int
    """The same with the room for new tokens."""
    whole_bytes: int
    """Keys and values of all tokens seen, rows not padded, where no window bounds them."""
    kept_share: float
    """Tokens kept over tokens seen, where no window bounds them."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        mib = 2**20
        lines = [
            f"{self.rows} rows, {self.kept_share:.1%} of the tokens kept; {self.kept_bytes / mib:.2f} MiB of "
            f"{self.whole_bytes / mib:.2f} MiB, {self.allocated_bytes / mib:.2f} MiB allocated",
            "layer      seen      kept  mass       KiB",
        ]
        for layer in self.layers:
            mass = "    –" if layer.retained_mass is None else f"{layer.retained_mass:.3f}"
            window = "" if layer.window is None else f"  window {layer.window}"
            lines.append(
                f"{layer.layer:5d} {layer.seen:9.1f} {layer.kept:9.1f} {mass} {layer.bytes / 1024:9.1f}{window}"
            )
        return "\n".join(lines)
