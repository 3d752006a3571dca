"""What a device and its links can do: one YAML that users edit, or that a calibration writes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from peer_dist.config import ConfigError
from peer_dist.config.load import read_tree, sentence
from peer_dist.kinds.section import Ranks, Section
from peer_dist.reading import as_yaml

MOST_PRICE = 1e9
Figure = Annotated[float, Field(ge=1, le=1e30)]
"""Bytes, or bytes or FLOPs a second."""
Share = Annotated[float, Field(ge=1e-6, le=1)]
Price = Annotated[float, Field(ge=0, le=MOST_PRICE)]
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Flops(Section):
    """By dtype."""

    float32: Figure
    bfloat16: Figure


class Achievable(Section):
    """What is reached of a device's figures, as fractions; 1 where they were measured."""

    flops: Share = 1.0
    hbm: Share = 1.0
    gather: Share = 1.0
    node_link: Share = 1.0
    network: Share = 1.0
    memory: Share = 1.0
    bus: Share = 1.0
    host: Share = 1.0
    disk: Share = 1.0


class Hardware(Section):
    """A device (one rank's) and its links; see ``hardware.yaml``. Bytes, seconds, and bytes/s in one direction.

    Attributes:
        device: what a run on it takes ``train.precision: auto`` and the sizes of its temporaries from.
        flops_per_s: of dense matrix products.
        gather_bytes_per_s: of expert rows read at random by the kernels.
        activation_bytes_per_s: of what a layer keeps for its backward pass, written and read by all that are no matrix
            products; None: as ``hbm_bytes_per_s``.
        node_link_latency_s, network_latency_s: of a collective.
        layer_overhead_s: of a layer's forward and backward pass, beyond what its work takes.
        step_overhead_s: of an optimizer step, likewise.
        bus_bytes_per_s: of copies between a GPU and pinned host memory.
        bus_gather_bytes_per_s: of rows that a GPU's kernels read from there at random.
        host_memory_bytes: of a GPU's share of its node's memory.
        host_bytes_per_s: of rows that a rank's share of the processors reads and writes there.
        disk_bytes: of a rank's share of the scratch disk.
        disk_bytes_per_s: of large reads and writes.
        disk_reads_per_s, disk_writes_per_s: rows at random.
        gpus_per_node: devices (ranks) of a node.
        price_per_hour: of a device.
    """

    name: str
    device: Literal["cuda", "cpu"] = "cuda"
    memory_bytes: Figure
    hbm_bytes_per_s: Figure
    flops_per_s: Flops
    gather_bytes_per_s: Figure
    activation_bytes_per_s: Figure | None = None
    node_link_bytes_per_s: Figure
    node_link_latency_s: Seconds = 0.0
    network_bytes_per_s: Figure
    network_latency_s: Seconds = 0.0
    layer_overhead_s: Seconds = 0.0
    step_overhead_s: Seconds = 0.0
    bus_bytes_per_s: Figure | None = None
    bus_gather_bytes_per_s: Figure | None = None
    host_memory_bytes: Figure | None = None
    host_bytes_per_s: Figure | None = None
    disk_bytes: Figure | None = None
    disk_bytes_per_s: Figure | None = None
    disk_reads_per_s: Figure | None = None
    disk_writes_per_s: Figure | None = None
    gpus_per_node: Ranks
    price_per_hour: Price | None = None
    achievable: Achievable = Field(default_factory=Achievable)

    @property
    def memory(self) -> float:
        """Bytes that a run may take."""
        return self.memory_bytes * self.achievable.memory

    def flops(self, itemsize: int) -> float:
        """FLOPs per second in the dtype of so many bytes."""
        return self.flops_per_s.float32 if itemsize == 4 else self.flops_per_s.bfloat16

    def dump(self, path: Path) -> None:
        """Write a file that :func:`load_hardware` reads."""
        entry = self.model_dump(mode="json", exclude={"name"})
        path.write_text(as_yaml({self.name: entry}), encoding="utf-8")


def load_hardware(name: str) -> Hardware:
    """A device of ``hardware.yaml``, or that of a YAML file: a mapping from its name to its figures.

    Raises:
        ConfigError: no device has the name, or the file does not describe one.
    """
    with resources.as_file(resources.files(__package__).joinpath("hardware.yaml")) as known:
        if not name.endswith((".yaml", ".yml")):
            devices = read_tree(known)
            if name not in devices:
                raise ConfigError(f"--gpu: {name!r} is not known; {', '.join(devices)}, or a .yaml file like {known}")
            return _parse(name, devices[name], str(known))
    devices = read_tree(name)
    if len(devices) != 1:
        raise ConfigError(f"{name}: must describe one device, under its name; it has {len(devices)} entries")
    ((device, entry),) = devices.items()
    return _parse(device, entry, name)


def _parse(name: str, entry: Any, source: str) -> Hardware:
    if not isinstance(entry, dict):
        raise ConfigError(f"{source}: {name}: must hold a device's figures; see the package's hardware.yaml")
    try:
        return Hardware.model_validate({"name": name, **entry})
    except ValidationError as error:
        raise ConfigError(sentence(error, f"{source}: {name}", {}, Hardware)) from None
