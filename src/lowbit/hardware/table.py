"""Devices as the models of speed and memory see them: one row of data sheet figures each.

Dense figures only; vendors also print twice as much "with sparsity". If a vendor gives two rates for one dtype, the row
has the one with float32 accumulation, which engines use (RTX 4090 in FP8: 330, not 661). GB of a card's memory are 2^30
bytes, as drivers report them; GB/s and TFLOPS are decimal. `note` gives the source of figures from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["cuda", "rocm", "metal", "cpu"]
# Share of the memory that one program may use: macOS keeps a quarter of the shared memory (Metal's
# recommendedMaxWorkingSetSize), a desktop some. Engines keep their own share in `MemoryModel`.
_USABLE_SHARE: dict[Kind, float] = {"cuda": 1.0, "rocm": 1.0, "metal": 0.75, "cpu": 0.9}
# Number formats of `Device.peak`. "f32" is there for processors only, where matrices are multiplied in it.
PEAK_DTYPES = ("f32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True)
class Device:
    """One accelerator, or the processors of one machine with their memory.

    name                as one types it: "h100"
    label               as one reads it, with the size of the memory
    kind                "cuda", "rocm", "metal", "cpu": what engines have kernels for
    memory_bytes        all of it; what a program may use of it is less (`usable_share`)
    bandwidth           bytes/s between memory and chip: the data sheet's, or measured reading
    peak                dtype of `PEAK_DTYPES` → operations/s of a dense matrix product (a multiplication and an
                        addition are two); a dtype that is absent has no instruction of its own there
    source              address of the data sheet, or how it was measured
    compute_capability  of CUDA: (9, 0); None elsewhere
    consumer            True for cards that are sold for desktops and for Macs
    note                what a reader of the figures should know
    """

    name: str
    label: str
    kind: Kind
    memory_bytes: int
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    source: str
    compute_capability: tuple[int, int] | None = None
    consumer: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.peak) - set(PEAK_DTYPES)
        assert not unknown, f"{self.name}: no such dtype {unknown}"
        object.__setattr__(self, "peak", MappingProxyType(dict(self.peak)))

    def has(self, dtype: str) -> bool:
        """True if the device multiplies matrices of this dtype in hardware."""
        return dtype in self.peak

    @property
    def sixteen_bit_peak(self) -> float:
        """operations/s where activations stay in 16 bits (or 32, where that is the quickest a processor has)."""
        return max(self.peak.get(dtype, 0.0) for dtype in ("bf16", "fp16", "f32"))

    @property
    def usable_share(self) -> float:
        """Of the memory, what one program may use."""
        return _USABLE_SHARE[self.kind]


_GIB = 1024**3
_GB = 1e9
_T = 1e12

_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_B200 = "https://www.nvidia.com/en-us/data-center/hgx/"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
_HALVED = "the data sheet's figures are with sparsity; these are half of them"


def _cuda(
    name: str, label: str, gib: int, gb_per_second: float, capability: tuple[int, int], source: str,
    consumer: bool = False, note: str = "", **tera: float,
) -> Device:  # fmt: skip
    peak = {dtype: value * _T for dtype, value in tera.items()}
    peak["fp16"] = peak["bf16"]
    return Device(name, label, "cuda", gib * _GIB, gb_per_second * _GB, peak, source, capability, consumer, note)


_NVIDIA = (
    _cuda("a100-40gb", "NVIDIA A100 SXM 40 GB", 40, 1555, (8, 0), _A100, bf16=312, int8=624, int4=1248),
    _cuda("a100-80gb", "NVIDIA A100 SXM 80 GB", 80, 2039, (8, 0), _A100, bf16=312, int8=624, int4=1248,
          note="the PCIe card has 1935 GB/s"),
    _cuda("h100", "NVIDIA H100 SXM 80 GB", 80, 3350, (9, 0), _H100, bf16=989.4, fp8=1978.9, int8=1978.9, note=_HALVED),
    _cuda("h100-pcie", "NVIDIA H100 PCIe 80 GB", 80, 2000, (9, 0), _H100, bf16=756, fp8=1513, int8=1513, note=_HALVED),
    _cuda("h200", "NVIDIA H200 SXM 141 GB", 140, 4800, (9, 0), _H200, bf16=989.4, fp8=1978.9, int8=1978.9,
          note=f"{_HALVED}; of the 141 GB drivers report 140 × 2^30 bytes"),
    _cuda("b200", "NVIDIA B200 (HGX) 180 GB", 179, 8000, (10, 0), _B200, bf16=2250, fp8=4500, int8=4500, fp4=9000,
          note=f"at 1000 W; {_HALVED}, except for FP4, which NVIDIA gives both ways"),
    _cuda("l4", "NVIDIA L4 24 GB", 24, 300, (8, 9), _L4, bf16=121, fp8=242.5, int8=242.5, note=_HALVED),
    _cuda("l40s", "NVIDIA L40S 48 GB", 48, 864, (8, 9), _L40S, bf16=362.05, fp8=733, int8=733, int4=733),
    _cuda("rtx-3090", "NVIDIA RTX 3090 24 GB", 24, 936, (8, 6), _AMPERE, consumer=True, bf16=71, int8=284, int4=568),
    _cuda("rtx-4090", "NVIDIA RTX 4090 24 GB", 24, 1008, (8, 9), _ADA, consumer=True,
          bf16=165.2, fp8=330.3, int8=660.6, int4=1321.2),
    _cuda("rtx-5090", "NVIDIA RTX 5090 32 GB", 32, 1792, (12, 0), _BLACKWELL, consumer=True,
          bf16=209.5, fp8=419, int8=838, fp4=1676),
)  # fmt: skip

_AMD = (
    Device("mi300x", "AMD Instinct MI300X 192 GB", "rocm", 192 * _GIB, 5300 * _GB,
           {"bf16": 1307.4 * _T, "fp16": 1307.4 * _T, "fp8": 2614.9 * _T, "int8": 2614.9 * _T}, _MI300X,
           note="FP8 is the FNUZ kind; engines convert E4M3 while they load"),
)  # fmt: skip

_APPLE_NOTE = (
    "memory is the largest configuration sold (--memory says another); Apple states the bandwidth; TFLOPS are GPU "
    "cores × 128 lanes × 2 × clock, the same in 16 and 32 bits (hmc-tech.com; M1, M2: philipturner/metal-benchmarks)"
)


def _apple(chip: str, gib: int, gb_per_second: float, cores: int, tera: float, page: str) -> Device:
    name = chip.lower().replace(" ", "-")
    peak = {"fp16": tera * _T, "bf16": tera * _T}
    source = f"https://support.apple.com/en-us/{page}"
    label = f"Apple {chip} ({cores} GPU cores)"
    return Device(name, label, "metal", gib * _GIB, gb_per_second * _GB, peak, source, consumer=True, note=_APPLE_NOTE)


_APPLE = (
    _apple("M1", 16, 68, 8, 2.6, "111883"),
    _apple("M1 Pro", 32, 200, 16, 5.2, "111902"),
    _apple("M1 Max", 64, 400, 32, 10.4, "111901"),
    _apple("M1 Ultra", 128, 800, 64, 20.8, "111900"),
    _apple("M2", 24, 100, 10, 3.58, "111869"),
    _apple("M2 Pro", 32, 200, 19, 6.8, "111340"),
    _apple("M2 Max", 96, 400, 38, 13.6, "111838"),
    _apple("M2 Ultra", 192, 800, 76, 27.2, "111835"),
    _apple("M3", 24, 100, 10, 3.58, "117735"),
    _apple("M3 Pro", 36, 150, 18, 6.44, "117736"),
    _apple("M3 Max", 128, 400, 40, 14.3, "117737"),
    _apple("M3 Ultra", 512, 819, 80, 28.6, "122211"),
    _apple("M4", 32, 120, 10, 3.76, "121552"),
    _apple("M4 Pro", 64, 273, 20, 7.53, "121553"),
    _apple("M4 Max", 128, 546, 40, 17.2, "121554"),
)

DEVICES: dict[str, Device] = {device.name: device for device in (*_NVIDIA, *_AMD, *_APPLE)}

# Other spellings, after `measured.plain`: short names of cards with several rows, and long names.
ALIASES: dict[str, str] = {
    "a100": "a100-80gb", "a10040": "a100-40gb", "a10080": "a100-80gb", "a100sxm": "a100-80gb",
    "a100pcie": "a100-80gb", "a100pcie40gb": "a100-40gb", "a100sxm440gb": "a100-40gb",
    "h100sxm": "h100", "h10080gb": "h100", "h100sxm5": "h100", "h200sxm": "h200", "h200141gb": "h200",
    "b200180gb": "b200", "3090": "rtx-3090", "4090": "rtx-4090", "5090": "rtx-5090", "instinctmi300x": "mi300x",
}  # fmt: skip
