"""Devices as the models of speed and memory see them: one row of data sheet figures each.

Dense figures only; vendors also print twice as much "with sparsity". If a vendor gives two rates for one dtype, the row
has the one with float32 accumulation, which engines use (RTX 4090 in FP8: 330, not 661). GB of a card's memory are 2^30
bytes, as drivers report them; GB/s and TFLOPS are decimal. `note` gives the source of figures from elsewhere.

Peaks of GeForce cards are counted, as in NVIDIA's architecture papers: multiprocessors · boost clock · 512 operations
of a dense product in 16 bits with float32 accumulation, twice as many in FP8, four times in INT8, eight times in FP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

Kind = Literal["cuda", "rocm", "metal", "cpu", "hpu", "npu"]
PCIE = 32e9  # bytes/s of 16 lanes of PCI Express 4.0, one way; 5.0 has twice as much
# Share of the memory that one program may use: macOS keeps a quarter of the shared memory (Metal's
# recommendedMaxWorkingSetSize), a desktop some. Engines keep their own share in `MemoryModel`.
_USABLE_SHARE: dict[Kind, float] = {"cuda": 1.0, "rocm": 1.0, "metal": 0.75, "cpu": 0.9, "hpu": 1.0, "npu": 1.0}
# Number formats of `Device.peak`. "f32" is there for processors only, where matrices are multiplied in it.
PEAK_DTYPES = ("f32", "bf16", "fp16", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True)
class Device:
    """One accelerator, or the processors of one machine with their memory.

    name                as one types it: "h100"
    label               as one reads it, with the size of the memory
    kind                "cuda", "rocm", "metal", "cpu": what engines have kernels for; "hpu" (Gaudi), "npu" (Ascend)
    memory_bytes        all of it; what a program may use of it is less (`usable_share`)
    bandwidth           bytes/s between memory and chip: the data sheet's, or measured reading
    peak                dtype of `PEAK_DTYPES` → operations/s of a dense matrix product (a multiplication and an
                        addition are two); a dtype that is absent has no instruction of its own there
    source              address of the data sheet, or how it was measured
    compute_capability  of CUDA: (9, 0); None elsewhere
    consumer            True for cards that are sold for desktops and for Macs
    note                what a reader of the figures should know
    link                bytes/s in one direction between two such cards: NVLink, Infinity Fabric, or PCI Express 4.0
    direct              True if the link is one of the former: cards read each other's memory
    count               cards of this kind that a model is divided among; all other figures are of one
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
    link: float = PCIE
    direct: bool = False
    count: int = 1

    def __post_init__(self) -> None:
        unknown = set(self.peak) - set(PEAK_DTYPES)
        assert not unknown, f"{self.name}: no such dtype {unknown}"
        object.__setattr__(self, "peak", MappingProxyType(dict(self.peak)))

    def has(self, dtype: str) -> bool:
        """True if the device multiplies matrices of this dtype in hardware."""
        return dtype in self.peak

    def times(self, count: int) -> Device:
        """`count` cards of this kind."""
        return self if count == 1 else replace(self, count=count, label=f"{count} × {self.label}")

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
_GEFORCE = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"
_T4 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_V100 = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_A10 = "https://www.nvidia.com/en-us/data-center/products/a10-gpu/"
_A30 = "https://www.nvidia.com/en-us/data-center/products/a30-gpu/"
_L40 = "https://www.nvidia.com/en-us/data-center/l40/"
_CHINA = "https://willitrunai.com/gpus/h20-96gb"
_L20 = "https://www.techpowerup.com/gpu-specs/l20.c4206"
_A800 = "https://www.techpowerup.com/gpu-specs/a800-sxm4-80-gb.c3966"
_H800 = "https://www.techpowerup.com/gpu-specs/h800-sxm5.c3975"
_B300 = "https://www.nvidia.com/en-us/data-center/hgx/"
_A6000 = "https://www.nvidia.com/en-us/products/workstations/rtx-a6000/"
_6000_ADA = "https://www.nvidia.com/en-us/products/workstations/rtx-6000/"
_PRO_6000 = "https://www.nvidia.com/en-us/products/workstations/professional-desktop-gpus/rtx-pro-6000/"
_ORIN = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/"
_THOR = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/"
_SPARK = "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"
_MI250 = "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250.html"
_MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
_MI325X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"
_MI350X = "https://www.amd.com/en/products/accelerators/instinct/mi350/mi350x.html"
_MI355X = "https://www.amd.com/en/products/accelerators/instinct/mi350/mi355x.html"
_GAUDI3 = "https://www.intel.com/content/www/us/en/products/details/processors/ai-accelerators/gaudi3.html"
_ASCEND = "https://github.com/vllm-project/vllm-ascend"
_HALVED = "the data sheet's figures are with sparsity; these are half of them"


def _cuda(
    name: str, label: str, gib: int, gb_per_second: float, capability: tuple[int, int], source: str,
    consumer: bool = False, note: str = "", nvlink: float | None = None, **tera: float,
) -> Device:  # fmt: skip
    """nvlink: GB/s in both directions together, as data sheets print it."""
    peak = {dtype: value * _T for dtype, value in tera.items()}
    if "bf16" in peak:
        peak["fp16"] = peak["bf16"]
    link = PCIE if nvlink is None else nvlink / 2 * _GB
    return Device(name, label, "cuda", gib * _GIB, gb_per_second * _GB, peak, source, capability, consumer, note, link,
                  nvlink is not None)  # fmt: skip


def _geforce(
    chip: str, gib: int, gb_per_second: float, multiprocessors: int, boost: float, capability: tuple[int, int],
    source: str = _GEFORCE, size_in_name: bool = False,
) -> Device:  # fmt: skip
    """boost: GHz."""
    name = "rtx-" + chip.lower().replace(" ", "-") + (f"-{gib}gb" if size_in_name else "")
    base = round(multiprocessors * boost * 512 / 1000, 1)
    tera = {"bf16": base, "int8": round(4 * base, 1)}
    if capability >= (8, 9):
        tera["fp8"] = round(2 * base, 1)
    if capability < (12, 0):
        tera["int4"] = round(8 * base, 1)
    else:
        tera["fp4"] = round(8 * base, 1)
    label = f"NVIDIA RTX {chip} {gib} GB"
    return _cuda(name, label, gib, gb_per_second, capability, source, True, "", None, **tera)


_SHARED = "the memory is shared with the processor"
_NVIDIA = (
    _cuda("t4", "NVIDIA T4 16 GB", 16, 320, (7, 5), _T4, fp16=65, int8=130, int4=260, note="no bfloat16"),
    _cuda("v100", "NVIDIA V100 SXM2 32 GB", 32, 900, (7, 0), _V100, fp16=125, nvlink=300,
          note="no bfloat16, no integers in tensor cores; vLLM's quantized kernels begin at compute capability 7.5"),
    _cuda("a10", "NVIDIA A10 24 GB", 24, 600, (8, 6), _A10, bf16=125, int8=250, int4=500),
    _cuda("a30", "NVIDIA A30 24 GB", 24, 933, (8, 0), _A30, bf16=165, int8=330, int4=661, nvlink=200),
    _cuda("a100-40gb", "NVIDIA A100 SXM 40 GB", 40, 1555, (8, 0), _A100, bf16=312, int8=624, int4=1248, nvlink=600),
    _cuda("a100-80gb", "NVIDIA A100 SXM 80 GB", 80, 2039, (8, 0), _A100, bf16=312, int8=624, int4=1248, nvlink=600,
          note="the PCIe card has 1935 GB/s"),
    _cuda("a800", "NVIDIA A800 SXM 80 GB", 80, 2039, (8, 0), _A800, bf16=312, int8=624, int4=1248, nvlink=400),
    _cuda("h100", "NVIDIA H100 SXM 80 GB", 80, 3350, (9, 0), _H100, bf16=989.4, fp8=1978.9, int8=1978.9, nvlink=900,
          note=_HALVED),
    _cuda("h100-pcie", "NVIDIA H100 PCIe 80 GB", 80, 2000, (9, 0), _H100, bf16=756, fp8=1513, int8=1513, note=_HALVED),
    _cuda("h800", "NVIDIA H800 SXM 80 GB", 80, 3350, (9, 0), _H800, bf16=989.4, fp8=1978.9, int8=1978.9, nvlink=400,
          note=_HALVED),
    _cuda("h20", "NVIDIA H20 96 GB", 96, 4000, (9, 0), _CHINA, bf16=148, fp8=296, int8=296, nvlink=900,
          note="NVIDIA publishes no data sheet"),
    _cuda("h200", "NVIDIA H200 SXM 141 GB", 140, 4800, (9, 0), _H200, bf16=989.4, fp8=1978.9, int8=1978.9, nvlink=900,
          note=f"{_HALVED}; of the 141 GB drivers report 140 × 2^30 bytes"),
    _cuda("b200", "NVIDIA B200 (HGX) 180 GB", 179, 8000, (10, 0), _B200, bf16=2250, fp8=4500, int8=4500, fp4=9000,
          nvlink=1800, note=f"at 1000 W; {_HALVED}, except for FP4, which NVIDIA gives both ways"),
    _cuda("b300", "NVIDIA B300 (HGX) 288 GB", 268, 8000, (10, 3), _B300, bf16=2250, fp8=4500, int8=125, fp4=13500,
          nvlink=1800, note=f"{_HALVED}, except for FP4, which NVIDIA gives both ways; 288 GB are 268 × 2^30 bytes"),
    _cuda("l4", "NVIDIA L4 24 GB", 24, 300, (8, 9), _L4, bf16=121, fp8=242.5, int8=242.5, note=_HALVED),
    _cuda("l20", "NVIDIA L20 48 GB", 48, 864, (8, 9), _L20, bf16=119.5, fp8=239, int8=239,
          note="NVIDIA publishes no data sheet"),
    _cuda("l40", "NVIDIA L40 48 GB", 48, 864, (8, 9), _L40, bf16=181.05, fp8=362, int8=362, int4=724),
    _cuda("l40s", "NVIDIA L40S 48 GB", 48, 864, (8, 9), _L40S, bf16=362.05, fp8=733, int8=733, int4=733),
    _cuda("rtx-a6000", "NVIDIA RTX A6000 48 GB", 48, 768, (8, 6), _A6000, bf16=154.8, int8=309.7, int4=619.3,
          nvlink=112.5, note=_HALVED),
    _cuda("rtx-6000-ada", "NVIDIA RTX 6000 Ada 48 GB", 48, 960, (8, 9), _6000_ADA, bf16=364.2, fp8=728.5, int8=728.5,
          int4=1457, note=_HALVED),
    _cuda("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell 96 GB", 96, 1792, (12, 0), _PRO_6000, bf16=503.8, fp8=1007.6,
          int8=1007.6, fp4=2015.2, note="188 multiprocessors × 2.617 GHz × 1024 operations, twice and four times as "
          "many; NVIDIA prints 4000 TOPS of FP4 with sparsity"),
    _geforce("3060", 12, 360, 28, 1.777, (8, 6)),
    _geforce("3060 Ti", 8, 448, 38, 1.665, (8, 6)),
    _geforce("3070", 8, 448, 46, 1.725, (8, 6)),
    _geforce("3070 Ti", 8, 608, 48, 1.770, (8, 6)),
    _geforce("3080", 10, 760, 68, 1.710, (8, 6), size_in_name=True),
    _geforce("3080", 12, 912, 70, 1.710, (8, 6), size_in_name=True),
    _geforce("3080 Ti", 12, 912, 80, 1.665, (8, 6)),
    _cuda("rtx-3090", "NVIDIA RTX 3090 24 GB", 24, 936, (8, 6), _AMPERE, consumer=True, bf16=71, int8=284, int4=568),
    _geforce("3090 Ti", 24, 1008, 84, 1.860, (8, 6)),
    _geforce("4060", 8, 272, 24, 2.460, (8, 9)),
    _geforce("4060 Ti", 8, 288, 34, 2.535, (8, 9), size_in_name=True),
    _geforce("4060 Ti", 16, 288, 34, 2.535, (8, 9), size_in_name=True),
    _geforce("4070", 12, 504, 46, 2.475, (8, 9)),
    _geforce("4070 Super", 12, 504, 56, 2.475, (8, 9)),
    _geforce("4070 Ti", 12, 504, 60, 2.610, (8, 9)),
    _geforce("4070 Ti Super", 16, 672, 66, 2.610, (8, 9)),
    _geforce("4080", 16, 717, 76, 2.505, (8, 9)),
    _geforce("4080 Super", 16, 736, 80, 2.550, (8, 9)),
    _cuda("rtx-4090", "NVIDIA RTX 4090 24 GB", 24, 1008, (8, 9), _ADA, consumer=True,
          bf16=165.2, fp8=330.3, int8=660.6, int4=1321.2),
    _geforce("5060", 8, 448, 30, 2.497, (12, 0)),
    _geforce("5060 Ti", 8, 448, 36, 2.572, (12, 0), size_in_name=True),
    _geforce("5060 Ti", 16, 448, 36, 2.572, (12, 0), size_in_name=True),
    _geforce("5070", 12, 672, 48, 2.512, (12, 0)),
    _geforce("5070 Ti", 16, 896, 70, 2.452, (12, 0)),
    _geforce("5080", 16, 960, 84, 2.617, (12, 0)),
    _cuda("rtx-5090", "NVIDIA RTX 5090 32 GB", 32, 1792, (12, 0), _BLACKWELL, consumer=True,
          bf16=209.5, fp8=419, int8=838, fp4=1676),
    _cuda("jetson-orin-nano", "NVIDIA Jetson Orin Nano Super 8 GB", 8, 102, (8, 7), _ORIN, consumer=True, bf16=16.75,
          int8=33.5, note=f"{_SHARED}; {_HALVED}"),
    _cuda("jetson-agx-orin", "NVIDIA Jetson AGX Orin 64 GB", 64, 204.8, (8, 7), _ORIN, consumer=True, bf16=42.5,
          int8=85, note=f"{_SHARED}; {_HALVED}, of the GPU alone (170 TOPS of the 275)"),
    _cuda("jetson-agx-thor", "NVIDIA Jetson AGX Thor (T5000) 128 GB", 128, 273, (11, 0), _THOR, consumer=True,
          bf16=258.75, fp8=517.5, int8=517.5, fp4=1035, note=f"{_SHARED}; from 2070 TFLOPS of FP4 with sparsity"),
    _cuda("dgx-spark", "NVIDIA DGX Spark (GB10) 128 GB", 128, 273, (12, 1), _SPARK, consumer=True, bf16=62.5, fp8=125,
          int8=250, fp4=500, note=f"{_SHARED}; from 1000 TFLOPS of FP4 with sparsity, by the ratios of GeForce cards"),
)  # fmt: skip

_XGMI = 448e9  # bytes/s one way: seven Infinity Fabric links of 128 GB/s, both ways, of MI300 and MI350
_FNUZ = "FP8 is the FNUZ kind; engines convert E4M3 while they load"


def _instinct(
    name: str, label: str, gib: int, gb_per_second: float, source: str, note: str = "", link: float = _XGMI,
    **tera: float,
) -> Device:  # fmt: skip
    peak = {dtype: value * _T for dtype, value in tera.items()}
    peak["fp16"] = peak["bf16"]
    return Device(name, label, "rocm", gib * _GIB, gb_per_second * _GB, peak, source, None, False, note, link, True)


_AMD = (
    _instinct("mi250", "AMD Instinct MI250 128 GB", 128, 3276.8, _MI250, bf16=362.1, int8=362.1, link=150e9,
              note="two dies, which ROCm shows as two devices of 64 GB: engines divide a model among them"),
    _instinct("mi300x", "AMD Instinct MI300X 192 GB", 192, 5300, _MI300X, bf16=1307.4, fp8=2614.9, int8=2614.9,
              note=_FNUZ),
    _instinct("mi325x", "AMD Instinct MI325X 256 GB", 256, 6000, _MI325X, bf16=1307.4, fp8=2614.9, int8=2614.9,
              note=_FNUZ),
    _instinct("mi350x", "AMD Instinct MI350X 288 GB", 288, 8000, _MI350X, bf16=2306.9, fp8=4613.7, int8=4613.7,
              fp4=9227.5),
    _instinct("mi355x", "AMD Instinct MI355X 288 GB", 288, 8000, _MI355X, bf16=2516.6, fp8=5033.2, int8=5033.2,
              fp4=10066.3),
)  # fmt: skip

# Devices whose kernels engines have in plugins of the makers: memory can be estimated, nothing is advised.
_OTHERS = (
    Device("gaudi3", "Intel Gaudi 3 128 GB", "hpu", 128 * _GIB, 3700 * _GB,
           {"bf16": 1835 * _T, "fp8": 1835 * _T}, _GAUDI3, link=600e9, direct=True),
    Device("ascend-910b", "Huawei Ascend 910B 64 GB", "npu", 64 * _GIB, 1600 * _GB,
           {"bf16": 313 * _T, "fp16": 313 * _T, "int8": 626 * _T}, _ASCEND, link=196e9, direct=True,
           note="Huawei publishes no data sheet; figures of the variant B3, by third parties, and they differ"),
)  # fmt: skip

_APPLE_NOTE = (
    "memory is the largest configuration sold (--memory says another); Apple states the bandwidth; TFLOPS are GPU "
    "cores × 128 lanes × 2 × clock, the same in 16 and 32 bits (hmc-tech.com; M1, M2: philipturner/metal-benchmarks)"
)


_M5_NOTE = (
    "memory is the largest configuration sold (--memory says another); TFLOPS are 4 times those of the M4 with as many "
    "cores: Apple claims over 4 times its peak in matrix products, by accelerators in each GPU core"
)


def _apple(
    chip: str, gib: int, gb_per_second: float, cores: int, tera: float, page: str, note: str = _APPLE_NOTE
) -> Device:
    name = chip.lower().replace(" ", "-")
    peak = {"fp16": tera * _T, "bf16": tera * _T}
    source = page if page.startswith("https:") else f"https://support.apple.com/en-us/{page}"
    label = f"Apple {chip} ({cores} GPU cores)"
    return Device(name, label, "metal", gib * _GIB, gb_per_second * _GB, peak, source, consumer=True, note=note)


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
    _apple("M5", 32, 153, 10, 15.0, "https://www.apple.com/newsroom/2025/10/apple-unleashes-m5-the-next-big-leap-in-ai-"
           "performance-for-apple-silicon/", _M5_NOTE),
    _apple("M5 Pro", 64, 307, 20, 30.1, "https://www.lowyat.net/2026/385170/apple-m5-pro-m5-max", _M5_NOTE),
    _apple("M5 Max", 128, 614, 40, 68.8, "https://www.lowyat.net/2026/385170/apple-m5-pro-m5-max", _M5_NOTE),
)  # fmt: skip

DEVICES: dict[str, Device] = {device.name: device for device in (*_NVIDIA, *_AMD, *_OTHERS, *_APPLE)}

# Other spellings, after `measured.plain`: short names of cards with several rows, and long names.
ALIASES: dict[str, str] = {
    "a100": "a100-80gb", "a10040": "a100-40gb", "a10080": "a100-80gb", "a100sxm": "a100-80gb",
    "a100pcie": "a100-80gb", "a100pcie40gb": "a100-40gb", "a100sxm440gb": "a100-40gb",
    "h100sxm": "h100", "h10080gb": "h100", "h100sxm5": "h100", "h200sxm": "h200", "h200141gb": "h200",
    "b200180gb": "b200", "3090": "rtx-3090", "4090": "rtx-4090", "5090": "rtx-5090",
    "teslat4": "t4", "teslav100": "v100", "v10032gb": "v100", "v100sxm2": "v100", "a80080gb": "a800", "h2096gb": "h20",
    "a6000": "rtx-a6000", "6000ada": "rtx-6000-ada", "rtx6000": "rtx-6000-ada", "rtxpro6000blackwell": "rtx-pro-6000",
    "pro6000": "rtx-pro-6000", "3080": "rtx-3080-10gb", "4060ti": "rtx-4060-ti-16gb", "5060ti": "rtx-5060-ti-16gb",
    "orin": "jetson-agx-orin", "agxorin": "jetson-agx-orin", "orinnano": "jetson-orin-nano",
    "thor": "jetson-agx-thor", "jetsonthor": "jetson-agx-thor", "spark": "dgx-spark", "gb10": "dgx-spark",
    "mi300": "mi300x", "mi325": "mi325x", "mi350": "mi350x", "mi355": "mi355x", "mi250x": "mi250",
    "gaudi": "gaudi3", "910b": "ascend-910b",
}  # fmt: skip

# Dollars per hour of one card, to have a cost per token that can be compared; --price says another. Prices move.
PRICES: dict[str, float] = {
    "rtx-3090": 0.22, "rtx-4090": 0.34, "rtx-5090": 0.69, "l4": 0.44, "l40": 0.69, "l40s": 0.79, "rtx-pro-6000": 0.89,
    "a100-80gb": 1.39, "h100-pcie": 1.99, "h100": 2.69, "h200": 3.59, "b200": 5.98,
}  # fmt: skip
PRICE_SOURCE = "RunPod's prices of March 2026, as deploybase.ai/articles/runpod-gpu-pricing lists them"
